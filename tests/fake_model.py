"""An engine around a model that only remembers: its next token is a hash of all tokens before (with a sliding window,
of those in it), as the KV cache holds them. A wrong block table, a block freed too early or used twice changes the
output, and no schedule may.
"""

import functools
import zlib
from collections import deque
from dataclasses import replace

import numpy as np

from cupaged.backends import sampling_reference
from cupaged.config import EngineConfig, ModelConfig
from cupaged.engine.block_pool import NULL_BLOCK
from cupaged.engine.engine import Engine
from cupaged.engine.sequence import SequenceState
from cupaged.errors import OutOfMemoryError
from cupaged.sampling_params import SamplingParams

VOCAB_SIZE = 50
EOS = 0
BYTES_PER_TOKEN = 16  # one layer, one head, head_dim 1, float64, K and V

MODEL = ModelConfig(
    architecture="FakeForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=1,
    intermediate_size=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    max_position_embeddings=1 << 16,
    eos_token_ids=(EOS,),
)


def most_likely_token(token_ids) -> int:
    token_ids = np.asarray(token_ids)
    assert np.isfinite(token_ids).all()
    return zlib.crc32(token_ids.astype(np.int32).tobytes()) % VOCAB_SIZE


def drawn_token(best: int, seed: int, counter: int) -> int:
    return zlib.crc32(f"{best} {seed} {counter}".encode()) % VOCAB_SIZE


def expected_output(prompt, num_tokens, *, seed=None, ignore_eos=False, window=None) -> list[int]:
    """What a request gives, as a function of the prompt alone. seed None: greedy."""
    token_ids = list(prompt)
    for counter in range(num_tokens):
        token = most_likely_token(token_ids if window is None else token_ids[-window:])
        token_ids.append(token if seed is None else drawn_token(token, seed, counter))
        if token_ids[-1] == EOS and not ignore_eos:
            break
    return token_ids[len(prompt) :]


def poisoned(shape, dtype):
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xFF)  # NaN for floats, -1 for integers
    return array


class FakeBackend:
    """NumPy memory, poisoned with NaN; a greedy sampler, and one that hashes (best token, seed, counter)."""

    name = "cpu"
    has_graphs = False
    description = "fake"
    dtype = np.dtype(np.float64)

    def __init__(self):
        self.out_of_memory = False
        self.closed = False

    def empty(self, shape, dtype):
        if self.out_of_memory:
            raise OutOfMemoryError("no memory is left")
        return poisoned(shape, dtype)

    def copy_in(self, dst, src):
        dst[...] = src

    def copy(self, dst, src):
        dst[...] = src

    def to_host(self, src):
        return src.copy()

    def fetch(self, src):
        copied = src.copy()
        return lambda: copied

    def empty_host(self, shape, dtype):
        return self.empty(shape, dtype)

    def copy_blocks(self, dst, src, pairs):
        assert pairs.dtype == np.int32
        destinations, sources = set(pairs[:, 1].tolist()), set(pairs[:, 0].tolist())
        assert len(destinations) == len(pairs)
        assert dst is not src or not destinations & sources
        for source, destination in pairs.tolist():
            slab, index = divmod(source, src.layout.blocks_per_slab)
            block = src.slabs[slab][:, :, index]
            slab, index = divmod(destination, dst.layout.blocks_per_slab)
            dst.slabs[slab][:, :, index] = block

    def address(self, array):
        return array.ctypes.data

    def memory_info(self):
        return 8 << 30, 16 << 30

    def upload_batch(self, batch):
        return batch

    def take_tokens(self, token_ids, drawn):
        for i in np.flatnonzero(token_ids < 0):
            token_ids[i] = drawn[-token_ids[i] - 1]

    def flush(self):
        """Compute what was put off: nothing, here."""

    def close(self):
        self.closed = True

    keep_allowed = staticmethod(sampling_reference.keep_allowed)
    edit_logits = staticmethod(sampling_reference.edit_logits)
    logprobs = staticmethod(sampling_reference.logprobs)

    def sample(self, token_ids, logits, rows, vocab_size, *, greedy=False):
        assert not (greedy and rows["temperature"].any())
        for i, (row, params) in enumerate(zip(logits[:, :vocab_size], rows, strict=True)):
            if not np.isfinite(row).any():
                token_ids[i] = -1
            elif params["temperature"] == 0:
                token_ids[i] = row.argmax()
            else:
                token_ids[i] = drawn_token(int(row.argmax()), int(params["seed"]), int(params["counter"]))


class FakeDecoder:
    """Writes tokens where the model would write K, positions where it would write V, and reads them back.

    fail: raise instead of launching the next step. during_forward: is called in each step. nan_after: a token id; a
    sequence that ends with it gets NaN. window: it looks at so many tokens, the last one included.
    """

    def __init__(self, window: int | None = None):
        self.window = window
        self.fail: BaseException | None = None
        self.during_forward = None
        self.nan_after: int | None = None
        self.batches = []  # (num_decodes, query lengths) of each step

    def forward(self, batch, arena):
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        if self.during_forward is not None:
            self.during_forward()
        return self.compute(batch, arena)

    def compute(self, batch, arena):
        check_batch(batch, arena, self.window)
        self.batches.append((batch.num_decodes, np.diff(batch.query_start_loc).tolist()))
        slabs, indices, offsets = locate(batch.slot_mapping, arena)
        for slab, index, offset, token, position in zip(
            slabs, indices, offsets, batch.token_ids, batch.positions, strict=True
        ):
            arena.slabs[slab][0, :, index, 0, offset, 0] = token, position

        self._computed = batch, arena
        return self.compute_logits(batch.logits_indices)

    def compute_logits(self, indices):
        batch, arena = self._computed
        logits = np.zeros((len(indices), VOCAB_SIZE), np.float32)
        nothing = np.full(arena.layout.slab_shape, np.nan)
        memory = np.stack([nothing if slab is None else slab for slab in arena.slabs])
        for row, last in zip(logits, indices, strict=True):
            i = int(np.searchsorted(batch.query_start_loc, last, side="right")) - 1
            end, block_size = batch.positions[last] + 1, arena.layout.block_size
            positions = np.arange(0 if self.window is None else max(0, end - self.window), end)
            slots = batch.block_tables[i][positions // block_size] * block_size + positions % block_size
            slabs, indices, offsets = locate(slots, arena)
            token_ids, written_positions = memory[slabs, 0, :, indices, 0, offsets, 0].T
            assert (written_positions == positions).all()
            row[:] = self.logits_after(token_ids)
            if token_ids[-1] == self.nan_after:
                row[:] = np.nan
        return logits

    def logits_after(self, token_ids) -> np.ndarray:
        """[VOCAB_SIZE] float32."""
        return np.eye(VOCAB_SIZE, dtype=np.float32)[most_likely_token(token_ids)]


class SpreadDecoder(FakeDecoder):
    """As FakeDecoder, but the other tokens have logits of their own, so that there is something to search."""

    def logits_after(self, token_ids):
        return spread_logits(token_ids)


class LateBackend(FakeBackend):
    """FakeBackend on a device that computes as late as it may: when somebody waits, and then only up to what is waited
    for. What goes up is read at once; all else is looked at when it is computed.

    log: ("launch" or "wait", number of the step), in the order in which the host did so.
    """

    def __init__(self):
        super().__init__()
        self.log = []
        self.num_launched = 0  # steps
        self._put_off = deque()
        self._num_done = 0
        self._batch = {}  # by name, the memory of the batch that was uploaded last

    def later(self, compute, *args):
        """Returns what waits for it."""
        self._put_off.append((compute, args))
        number = self._num_done + len(self._put_off)

        def wait():
            while self._num_done < number:
                self._num_done += 1
                compute, args = self._put_off.popleft()
                try:
                    compute(*args)
                except BaseException:
                    self._num_done += len(self._put_off)
                    self._put_off.clear()
                    raise

        return wait

    def flush(self):
        self.later(lambda: None)()

    def copy_in(self, dst, src):
        self.later(np.copyto, dst, src.copy())

    def copy(self, dst, src):
        self.later(np.copyto, dst, src)

    def to_host(self, src):
        self.flush()
        return src.copy()

    def fetch(self, src):
        fetched, step = poisoned(src.shape, src.dtype), self.num_launched
        wait = self.later(np.copyto, fetched, src)

        def result():
            self.log.append(("wait", step))
            wait()
            return fetched

        return result

    def upload_batch(self, batch):
        arrays = {}
        for name, array in vars(batch).items():
            if isinstance(array, np.ndarray):
                if name not in self._batch or self._batch[name].size < array.size:
                    self._batch[name] = poisoned((2 * array.size,), np.int32)
                arrays[name] = self._batch[name][: array.size].reshape(array.shape)
                self.copy_in(arrays[name], array)
        return replace(batch, **arrays)

    def copy_blocks(self, dst, src, pairs):
        self.later(super().copy_blocks, dst, src, pairs)

    def take_tokens(self, token_ids, drawn):
        self.later(super().take_tokens, token_ids, drawn)

    def keep_allowed(self, *args):
        self.later(sampling_reference.keep_allowed, *args)

    def edit_logits(self, *args):
        self.later(sampling_reference.edit_logits, *args)

    def logprobs(self, *args):
        self.later(sampling_reference.logprobs, *args)

    def sample(self, *args, greedy=False):
        self.later(functools.partial(super().sample, greedy=greedy), *args)


class LateDecoder(FakeDecoder):
    """On a LateBackend. fail_late: raise when the next step is computed."""

    def __init__(self, backend, decoder, max_num_logits):
        self._backend = backend
        self._decoder = decoder
        self._logits = backend.empty((max_num_logits, VOCAB_SIZE), np.float32)
        self.fail = self.fail_late = self.during_forward = None

    @property
    def batches(self):
        return self._decoder.batches

    def compute(self, batch, arena):
        self._backend.num_launched += 1
        self._backend.log.append(("launch", self._backend.num_launched))
        logits = self._logits[: len(batch.logits_indices)]
        self._backend.later(self._compute_now, logits, batch, arena)
        return logits

    def compute_logits(self, indices):
        logits = self._logits[: len(indices)]
        self._backend.later(lambda: np.copyto(logits, self._decoder.compute_logits(indices)))
        return logits

    def _compute_now(self, logits, batch, arena):
        if self.fail_late is not None:
            error, self.fail_late = self.fail_late, None
            raise error
        logits[...] = self._decoder.compute(batch, arena)


def spread_logits(token_ids) -> np.ndarray:
    """[VOCAB_SIZE] float32, a hash of all tokens. EOS is likely."""
    best = most_likely_token(token_ids)
    logits = np.random.default_rng(np.asarray(token_ids, np.int32)).normal(0, 2, VOCAB_SIZE)
    logits[EOS] += 3
    logits[best] = 0.1 + logits.max()
    return logits.astype(np.float32)


def locate(slots, arena):
    """(slab, block in it, token in that) of each slot."""
    block_ids, offsets = np.divmod(slots, arena.layout.block_size)
    return *np.divmod(block_ids, arena.layout.blocks_per_slab), offsets


def check_batch(batch, arena, window=None):
    """The promises of Batch's docstring."""
    arrays = {k: v for k, v in vars(batch).items() if isinstance(v, np.ndarray)}
    assert len(arrays) == 7
    for name, array in arrays.items():
        assert array.dtype == np.int32, name
        assert array.flags.c_contiguous, name
    query_lens = np.diff(batch.query_start_loc)
    assert (batch.token_ids >= -1).all()  # -1: drawn from a row without a finite logit, by who has ended
    assert batch.query_start_loc[0] == 0
    assert batch.query_start_loc[-1] == batch.num_tokens == len(batch.positions) == len(batch.slot_mapping)
    assert (query_lens > 0).all()
    assert (query_lens[: batch.num_decodes] == 1).all()
    assert batch.max_query_len == max(query_lens[batch.num_decodes :], default=0)
    assert batch.max_seq_len == batch.seq_lens.max()
    assert batch.block_tables.shape[0] == batch.num_seqs == len(query_lens)
    assert batch.block_tables.shape[1] * arena.layout.block_size >= batch.max_seq_len
    for i in range(batch.num_seqs):
        tokens = slice(batch.query_start_loc[i], batch.query_start_loc[i + 1])
        expected = np.arange(batch.seq_lens[i] - query_lens[i], batch.seq_lens[i])
        assert (batch.positions[tokens] == expected).all()
        blocks, offsets = batch.block_tables[i][expected // arena.layout.block_size], expected % arena.layout.block_size
        assert (batch.slot_mapping[tokens] == blocks * arena.layout.block_size + offsets).all()
        first = 0 if window is None else max(0, expected[0] + 1 - window) // arena.layout.block_size
        needed = batch.block_tables[i, first : expected[-1] // arena.layout.block_size + 1]
        assert (needed >= 0).all()
        assert (batch.block_tables[i, :first] == -1).all()
        assert all(arena.slabs[block_id // arena.layout.blocks_per_slab] is not None for block_id in needed)
    assert len(np.unique(batch.slot_mapping)) == batch.num_tokens


def make_engine(num_blocks=64, tokenizer=None, model=MODEL, decoder=None, **config) -> Engine:
    """An engine with FakeDecoder, or another one, at `engine.runner.decoder` and FakeBackend at `engine.backend`; with
    async_scheduling LateBackend, and a LateDecoder around the decoder."""
    config = {"block_size": 8, "seed": 1, "max_model_len": 8 * num_blocks, **config}
    num_bytes = num_blocks * config["block_size"] * BYTES_PER_TOKEN
    config, decoder = (
        EngineConfig(kv_cache_memory_bytes=num_bytes, **config),
        decoder or FakeDecoder(model.sliding_window),
    )
    backend = FakeBackend()
    if config.async_scheduling:
        backend = LateBackend()
        decoder = LateDecoder(backend, decoder, min(config.max_num_seqs, config.max_num_batched_tokens))
    return Engine(config, model, decoder, backend, tokenizer)


def model_with(**fields) -> ModelConfig:
    return replace(MODEL, **fields)


def run_all(engine) -> dict:
    """Step until nothing is left; the last output of each request, by its id."""
    last = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
        audit(engine)
    return last


def audit(engine):
    """Check the books, by the engine's own audit and against what the sequences and the cache's memory say; poison
    what holds nothing."""
    assert engine.audit() == []
    engine.backend.flush()
    pool, scheduler, block_size = engine.pool, engine.scheduler, engine.config.block_size
    references = dict.fromkeys(pool.block_ids(), 0)
    for request in scheduler.running:
        for seq in request.unfinished:
            assert seq.state is SequenceState.RUNNING
            for block_id in seq.block_table:
                if block_id != NULL_BLOCK:
                    references[block_id] += 1
            assert cached_tokens(engine, seq, seq.block_table, engine.arena) == seq.token_ids[: seq.num_cached_tokens]
    for seq in scheduler.leaving:
        assert seq.state is SequenceState.FINISHED
        for block_id in seq.block_table:
            if block_id != NULL_BLOCK:
                references[block_id] += 1
    for request in scheduler.waiting:
        assert not any(seq.block_table for seq in request.sequences)
        for seq in request.active:
            cached = cached_tokens(engine, seq, seq.swapped_table, engine.swap_arena)
            assert cached == seq.token_ids[: seq.num_cached_tokens]
    if engine.swap is not None:
        swapped = {b for request in scheduler.waiting for seq in request.active for b in seq.swapped_table}
        swapped -= {NULL_BLOCK}
        assert engine.swap.pool.num_blocks - engine.swap.pool.num_free_blocks == len(swapped)
        engine.swap_arena.poison(engine.swap.pool.unused_blocks())
    assert {b: pool.ref_count(b) for b in references} == references
    assert pool.num_free_blocks == sum(count == 0 for count in references.values())

    for block_id in references:
        content = pool.content(block_id)
        if content is not None:
            slots = block_id * block_size + np.arange(block_size)
            assert tokens_at(slots, engine.arena).astype(np.int32).tobytes() == content.prefix.tokens
        elif references[block_id] == 0:
            slab, index = divmod(block_id, engine.arena.layout.blocks_per_slab)
            engine.arena.slabs[slab][:, :, index] = np.nan


def preempt(engine, request):
    """As a step would do it that lacks blocks; what is swapped is copied at once. A step in flight comes to nothing."""
    if engine.pipeline.in_flight is not None:
        step, engine.pipeline.in_flight = engine.pipeline.in_flight, None
        step.wait()
        engine.scheduler.complete(replace(step.schedule, sequences=[], num_tokens=[]))
    if request.finished:
        return
    engine.scheduler.preempt(request)
    if engine.swap is not None and (outs := engine.swap.take_outs()):
        engine._swap(engine.swap_arena, engine.arena, outs)


def cached_tokens(engine, seq, table, arena) -> list[int]:
    """What the cache holds of `seq`; its own tokens where they are before the window."""
    block_size = engine.config.block_size
    start = engine.blocks.first_needed_block(seq.num_cached_tokens) * block_size
    positions = np.arange(start, seq.num_cached_tokens)
    slots = np.array(table, int)[positions // block_size] * block_size + positions % block_size
    return [*seq.token_ids[:start], *tokens_at(slots, arena).tolist()]


def tokens_at(slots, arena):
    slabs, indices, offsets = locate(np.asarray(slots, int), arena)
    return np.array([arena.slabs[s][0, 0, i, 0, o, 0] for s, i, o in zip(slabs, indices, offsets, strict=True)])


# -- prompts, parameters, and what should come of them --------------------------------------------------------


def prompt_of(length, salt=0):
    return [(i * 7 + salt) % VOCAB_SIZE for i in range(length)]


def params_of(n=1, seed=3, max_tokens=20, **fields):
    return SamplingParams(n=n, seed=seed, max_tokens=max_tokens, **{"ignore_eos": True, **fields})


def expected_outputs(prompt, params):
    """The outputs of `params.n` requests with one output each, seeded one after another."""
    return [
        expected_output(prompt, params.max_tokens, seed=params.seed + i, ignore_eos=params.ignore_eos)
        for i in range(params.num_sequences)
    ]


def assert_scored(prompt_logprobs, prompt, k, window=None):
    """prompt_logprobs are those of a SpreadDecoder for all of `prompt`, with the k likeliest tokens."""
    first, *entries = prompt_logprobs
    assert first is None
    assert len(entries) == len(prompt) - 1
    for end, entry in enumerate(entries, 1):
        logits = spread_logits(prompt[:end] if window is None else prompt[:end][-window:]).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-expected).tolist()
        assert set(entry) == {prompt[end], *order[:k]}
        for token_id, logprob in entry.items():
            assert abs(logprob.logprob - expected[token_id]) <= 1e-5
            assert logprob.rank == 1 + order.index(token_id)


def tokens(output):
    return [completion.token_ids for completion in output.outputs]
