"""The engine: requests in, a step at a time, outputs out."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index

from cupaged.backends.base import Backend
from cupaged.config import EngineConfig, ModelConfig
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import BlockPool
from cupaged.engine.logit_edits import LogitRules
from cupaged.engine.output_text import OutputText
from cupaged.engine.runner import Runner
from cupaged.engine.sampler import Logprobs
from cupaged.engine.scheduler import Schedule, Scheduler
from cupaged.engine.sequence import Request, Sequence, SequenceState
from cupaged.errors import OutOfMemoryError
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.memory.budget import fit_max_model_len, format_bytes, kv_cache_bytes, num_kv_blocks
from cupaged.outputs import CompletionOutput, Logprob, RequestOutput
from cupaged.sampling_params import RequestOutputKind, SamplingParams


@dataclass(frozen=True)
class EngineStats:
    """The engine's state now, and its counts since it began. Blocks are KV cache blocks."""

    num_running: int
    num_waiting: int
    max_blocks: int  # the cache's limit
    num_blocks: int  # of which this many have memory
    num_used_blocks: int
    num_free_blocks: int  # have memory and are unused
    peak_used_blocks: int
    num_slabs: int
    kv_cache_bytes: int  # of all slabs
    num_unfilled_slots: int  # token slots in used blocks that hold no token: what paging wastes
    mean_waste: float  # their share of the used blocks' slots, over all steps
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int


class Engine:
    """Runs requests on a model whose weights are in place. Not for several threads at once.

    decoder: has `forward(batch, arena)`, as models.decoder.Decoder. tokenizer: turns prompts and outputs from and
    to text; without it both are token ids only.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, decoder, backend: Backend, tokenizer=None):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.backend = backend
        self.arena = self._make_arena()
        self.max_model_len = fit_max_model_len(config, model, self.arena.layout, self.arena.max_blocks)

        self.pool = BlockPool(self.arena.grow)
        self.pool.add_blocks(self._first_blocks())
        self.scheduler = Scheduler(
            BlockManager(self.pool, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self.runner = Runner(
            backend,
            decoder,
            self.arena,
            # A padded embedding has ids that stand for no token.
            vocab_size=model.vocab_size if tokenizer is None else min(model.vocab_size, tokenizer.vocab_size),
            max_num_seqs=self.scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
        )
        self._requests: dict[str, Request] = {}
        self._rng = random.Random(config.seed)
        self._num_steps = self._num_prompt_tokens = self._num_output_tokens = 0
        self._used_slots = self._unfilled_slots = 0  # summed over steps
        self._peak_used_blocks = 0

    def add_request(self, request_id: str, prompt: str | Iterable[int], params: SamplingParams | None = None) -> None:
        """Queue a request. Raises ValueError, naming what is wrong, for one that can't be run."""
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by a request that has not finished")
        params = params or SamplingParams()
        token_ids = self.encode(prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: strings need a tokenizer; this engine has none")
        seed = params.seed if params.seed is not None else self._rng.getrandbits(64)
        text = prompt if isinstance(prompt, str) else None
        logit_rules = None
        if LogitRules.asked_by(params):
            logit_rules = LogitRules(
                params,
                token_ids,
                vocab_size=self.runner.vocab_size,
                eos_token_ids=self.model.eos_token_ids,
                tokenizer=self.tokenizer,
            )
        request = Request(request_id, text, token_ids, params, seed, time.monotonic(), logit_rules)
        for seq in request.sequences:
            if params.detokenize and self.tokenizer is not None:
                decoder = self.tokenizer.decoder(params.skip_special_tokens)
                seq.output_text = OutputText(decoder, params.stop, params.include_stop_str_in_output, params.min_tokens)
            self.scheduler.add(seq)
        self._requests[request_id] = request

    def encode(self, prompt: str | Iterable[int]) -> list[int]:
        """The token ids of a prompt. Raises ValueError, naming what is wrong, for one that can't be run."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: text needs a tokenizer; this engine has none, so give token ids")
            if not prompt:
                raise ValueError("prompt is empty: give at least one character")
            token_ids = self.tokenizer.encode(prompt)
        else:
            try:
                token_ids = [index(token_id) for token_id in prompt]
            except TypeError:
                raise ValueError(f"prompt must be text or integer token ids; got {prompt!r:.100}") from None
        if not token_ids:
            raise ValueError("prompt is empty: give at least one token")
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self.model.vocab_size:
                raise ValueError(f"prompt: token ids must be in [0, {self.model.vocab_size}); got {token_id}")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens, which with one more for the output is over "
                f"max_model_len={self.max_model_len}: shorten it or raise max_model_len"
            )
        return token_ids

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def has_request(self, request_id: str) -> bool:
        """Whether it was added and has not finished."""
        return request_id in self._requests

    def step(self) -> list[RequestOutput]:
        """Run one step; returns what is new, as each request's output_kind says.

        An exception ends all requests of the step, and frees their blocks; the engine goes on with the others.
        """
        schedule = self.scheduler.schedule()
        try:
            for seq in schedule.failed:
                self._settle_text(seq, len(seq.token_ids))
            touched = schedule.failed + (self._run(schedule) if schedule.sequences else [])
            outputs = [output for seq in touched if (output := self._output(seq)) is not None]
        except BaseException:
            for seq in schedule.sequences + schedule.failed:
                if seq.state is not SequenceState.FINISHED:
                    self.scheduler.finish(seq, "error")
                self._requests.pop(seq.request.request_id, None)
            raise
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns what it has got so far. None, and no harm done, when it has finished already."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for seq in request.sequences:
            if seq.state is not SequenceState.FINISHED:
                self._finish(seq, "abort")
        return self._output(request.sequences[0])

    def stats(self) -> EngineStats:
        num_used = self.pool.num_blocks - self.pool.num_free_blocks
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            max_blocks=self.arena.max_blocks,
            num_blocks=self.pool.num_blocks,
            num_used_blocks=num_used,
            num_free_blocks=self.pool.num_free_blocks,
            peak_used_blocks=self._peak_used_blocks,
            num_slabs=len(self.arena.slabs),
            kv_cache_bytes=len(self.arena.slabs) * self.arena.layout.bytes_per_slab,
            num_unfilled_slots=num_used * self.config.block_size - self._num_filled_slots(),
            mean_waste=self._unfilled_slots / self._used_slots if self._used_slots else 0.0,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=self.scheduler.num_preemptions,
        )

    def close(self) -> None:
        """End all requests and give the memory back."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self.runner = None
        self.arena.close()
        self.backend.close()

    # -- memory --------------------------------------------------------------------------------------------

    def _make_arena(self) -> KVArena:
        def layout(max_blocks: int) -> KVLayout:
            return KVLayout.choose(
                num_layers=self.model.num_layers,
                num_kv_heads=self.model.num_kv_heads,
                block_size=self.config.block_size,
                head_dim=self.model.head_dim,
                dtype=self.backend.dtype,
                max_blocks=max_blocks,
            )

        max_bytes = kv_cache_bytes(self.config, self.backend)
        max_blocks = num_kv_blocks(max_bytes, layout(1).bytes_per_block)
        return KVArena(layout(max_blocks), self.backend, max_blocks)

    def _first_blocks(self) -> int:
        """Take the first slab, or all of them when the cache is preallocated; returns how many blocks that makes."""
        while self.arena.grow() and self.config.preallocate:
            pass
        if not self.arena.slabs or (self.config.preallocate and self.arena.num_blocks < self.arena.max_blocks):
            layout = self.arena.layout
            wanted = layout.bytes_per_slab * (self.arena.max_slabs if self.config.preallocate else 1)
            free, _ = self.backend.memory_info()
            raise OutOfMemoryError(
                f"the KV cache wants {format_bytes(wanted)} at the start, and {format_bytes(free)} are free: lower "
                "kv_cache_memory_bytes (--kv-cache-memory) or gpu_memory_utilization (--gpu-memory-utilization)"
            )
        return self.arena.num_blocks

    def _num_filled_slots(self) -> int:
        return sum(seq.num_cached_tokens for seq in self.scheduler.running)

    # -- a step --------------------------------------------------------------------------------------------

    def _run(self, schedule: Schedule) -> list[Sequence]:
        """Compute the schedule and take in its tokens; returns the sequences that got one."""
        now = time.monotonic()
        for seq in schedule.sequences:
            if seq.request.metrics.first_scheduled_time is None:
                seq.request.metrics.first_scheduled_time = now
                self._num_prompt_tokens += seq.num_prompt_tokens

        result = self.runner.run(schedule)

        for seq, num_tokens in zip(schedule.sequences, schedule.num_tokens, strict=True):
            seq.num_cached_tokens += num_tokens
        self._count_step()
        now = time.monotonic()
        for row, (seq, token_id) in enumerate(zip(result.sequences, result.token_ids, strict=True)):
            if seq.request.metrics.first_token_time is None:
                seq.request.metrics.first_token_time = now
            if result.logprobs is not None and seq.logprobs is not None:
                self._add_logprobs(seq, result.logprobs, row)
            self._add_token(seq, token_id)
        return result.sequences

    def _count_step(self) -> None:
        num_used = self.pool.num_blocks - self.pool.num_free_blocks
        used_slots = num_used * self.config.block_size
        self._num_steps += 1
        self._used_slots += used_slots
        self._unfilled_slots += used_slots - self._num_filled_slots()
        self._peak_used_blocks = max(self._peak_used_blocks, num_used)

    def _add_token(self, seq: Sequence, token_id: int) -> None:
        """Append a drawn token and finish the sequence if it is the last."""
        if token_id < 0:
            seq.error = f"the model gave no finite logit after {len(seq.token_ids)} tokens"
            if seq.logit_edits is not None:
                seq.error += ", or none to a token that logit_bias, min_tokens, bad_words and allowed_token_ids allow"
            self._finish(seq, "error")
            return
        params = seq.request.params
        seq.token_ids.append(token_id)
        self._num_output_tokens += 1
        if token_id in self.model.eos_token_ids and not params.ignore_eos:
            self._finish(seq, "stop", ends_with_stop_token=True)
        elif token_id in params.stop_token_ids:
            self._finish(seq, "stop", token_id, ends_with_stop_token=True)
        elif params.stop and (found := self._decode(seq, len(seq.token_ids))) is not None:
            self.scheduler.finish(seq, "stop", found)
        elif seq.num_output_tokens == params.max_tokens or len(seq.token_ids) >= self.max_model_len:
            self._finish(seq, "length")

    def _finish(
        self, seq: Sequence, reason: str, stop_reason: int | None = None, *, ends_with_stop_token: bool = False
    ) -> None:
        """Settle the text of a sequence that no stop string has ended so far, and take it out of the schedule."""
        hide_last = ends_with_stop_token and not seq.request.params.include_stop_str_in_output
        found = self._settle_text(seq, len(seq.token_ids) - hide_last)
        if found is not None:
            reason, stop_reason = "stop", found
        self.scheduler.finish(seq, reason, stop_reason)

    def _settle_text(self, seq: Sequence, end: int) -> str | None:
        """The text ends with token `end` - 1; returns a stop string that shows up in its last bytes."""
        if seq.output_text is None:
            return None
        found = self._decode(seq, end)
        return found if found is not None else seq.output_text.flush()

    def _decode(self, seq: Sequence, end: int) -> str | None:
        """Bring the text up to token `end`; returns the stop string that this completes, if any."""
        found = None
        for token_id in seq.token_ids[seq.num_decoded_tokens : end]:
            found = seq.output_text.push(token_id)
        seq.num_decoded_tokens = max(end, seq.num_decoded_tokens)
        return found

    def _add_logprobs(self, seq: Sequence, logprobs: Logprobs, row: int) -> None:
        end = 1 + seq.request.params.logprobs
        token_ids, values = logprobs.token_ids[row, :end].tolist(), logprobs.logprobs[row, :end].tolist()
        ranks = [int(logprobs.ranks[row]), *range(1, end)]
        entries: dict[int, Logprob] = {}
        for token_id, value, rank in zip(token_ids, values, ranks, strict=False):
            if token_id not in entries:  # the drawn token is often among the most likely
                text = self.tokenizer.decode([token_id], False) if self.tokenizer is not None else None
                entries[token_id] = Logprob(value, rank, text)
        seq.logprobs.append(entries)
        seq.cumulative_logprob += values[0]

    # -- outputs -------------------------------------------------------------------------------------------

    def _output(self, seq: Sequence) -> RequestOutput | None:
        """What to tell of `seq` after a step; None when its request is to be told of at its end only."""
        request, kind = seq.request, seq.request.params.output_kind
        finished = seq.state is SequenceState.FINISHED and request.finished
        if finished:
            request.metrics.finished_time = time.monotonic()
        elif kind is RequestOutputKind.FINAL_ONLY:
            return None
        if seq.output_text is not None and not finished:
            self._decode(seq, len(seq.token_ids))
        text = seq.output_text.text if seq.output_text is not None else ""
        start, first_char = 0, 0
        if kind is RequestOutputKind.DELTA:
            start, first_char = seq.num_sent_tokens, seq.num_sent_chars
            seq.num_sent_tokens, seq.num_sent_chars = seq.num_output_tokens, len(text)
        completion = CompletionOutput(
            index=seq.index,
            text=text[first_char:],
            token_ids=seq.token_ids[seq.num_prompt_tokens + start :],
            cumulative_logprob=seq.cumulative_logprob if seq.logprobs is not None else None,
            logprobs=seq.logprobs[start:] if seq.logprobs is not None else None,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            error=seq.error,
        )
        return RequestOutput(
            request.request_id, request.prompt, request.prompt_token_ids, [completion], finished, request.metrics
        )
