"""What a step costs the host: an engine on a device that computes nothing. It needs no GPU.

    python host_cost.py --json results/cpu-host-cost.json

A step is all that Engine.step does: scheduling, the batch and its upload, the launch of a graph, sampling parameters,
the drawn tokens' way into sequences and text, outputs. Copies and launches return at once, and the device's tokens are
random. Times are those of the thread on its processor (time.thread_time), so that other programs disturb them little;
each is the mean of a round of STEPS steps, in which each sequence takes new blocks, and the least of ROUNDS rounds.

"final": requests that are told of at their end, token ids only. "delta": an output for each token, with its text.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers

from cupaged.backends import cuda
from cupaged.backends.cuda import CudaBackend
from cupaged.benchmark.environment import environment
from cupaged.config import EngineConfig, ModelConfig
from cupaged.engine.block_pool import BlockPool
from cupaged.engine.engine import Engine
from cupaged.engine.prefix import PrefixBlock, PrefixKey
from cupaged.kernels.compile import set_loader
from cupaged.kernels.device import DeviceInfo, set_device_info
from cupaged.models.decoder import Decoder
from cupaged.sampling_params import RequestOutputKind, SamplingParams
from cupaged.tokenizer import Tokenizer
from cupaged.weights.packing import random_weights

BATCHES = (1, 16, 64, 256, 1024)
POOL_SIZES = (1_000, 10_000, 100_000)
STEPS = 16
ROUNDS = 20
PROMPT_LEN = 128
MAX_MODEL_LEN = PROMPT_LEN + (ROUNDS + 1) * STEPS + 64
MAX_NUM_TOKENS = 16384  # a step: the prompts are in after a few
VOCAB_SIZE = 8192

MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_layers=2,
    num_heads=1, num_kv_heads=1, head_dim=64, max_position_embeddings=MAX_MODEL_LEN, eos_token_ids=(0,),
)  # fmt: skip


class IdleDevice:
    """In a CupyDevice's place: arrays are NumPy's, nothing is copied or computed."""

    description = "a device that does nothing"

    def __init__(self):
        rng = random.Random(0)
        self._token_ids = itertools.cycle([np.array(rng.choices(range(1, VOCAB_SIZE), k=2048)) for _ in range(64)])

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    def pinned(self, num_bytes):
        return np.zeros(num_bytes, np.uint8)

    def copy(self, dst, src):
        pass

    def start_copy(self, dst, src):
        return lambda: None

    def start_fetch(self, dst, src):
        dst[...] = next(self._token_ids)[: len(dst)]
        return lambda: None

    def capture(self, function):
        function()
        return lambda: None

    def to_host(self, src):
        return src

    def address(self, array):
        return array.ctypes.data

    def memory_info(self):
        return 8 << 30, 8 << 30


def new_engine(num_seqs: int) -> Engine:
    set_device_info(DeviceInfo("sm_80", num_sms=108, max_shared_bytes=166912))  # so that nothing asks for the driver
    set_loader(lambda file, name: lambda grid, block, args, shared_mem=0: None)
    cuda.load_kernels = lambda kernels: None
    backend = CudaBackend(IdleDevice(), ml_dtypes.bfloat16)
    backend.reserve(MODEL, MAX_NUM_TOKENS, num_seqs, MAX_MODEL_LEN)
    decoder = Decoder(
        MODEL, random_weights(MODEL, backend), backend,
        max_num_tokens=MAX_NUM_TOKENS, max_num_logits=num_seqs, max_model_len=MAX_MODEL_LEN,
    )  # fmt: skip
    config = EngineConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=MAX_NUM_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=1 << 30,
    )
    return Engine(config, MODEL, decoder, backend, new_tokenizer())


def new_tokenizer() -> Tokenizer:
    """Byte-level BPE, as most models have it, of made-up words."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    rng, merges, words = random.Random(0), [], {"Ġ": None} | dict.fromkeys("abcdefghijklmnopqrstuvwxyz")
    vocab = {character: i for i, character in enumerate(alphabet)}
    while len(vocab) < VOCAB_SIZE:
        pair = rng.choice(list(words)), rng.choice("abcdefghijklmnopqrstuvwxyz")
        if (word := "".join(pair)) not in vocab:
            merges.append(pair)
            vocab[word] = len(vocab)
            words[word] = None
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, {}, None, Path("made up"))


def decoding_engine(num_seqs: int, kind: RequestOutputKind) -> Engine:
    """An engine in which num_seqs sequences decode."""
    engine = new_engine(num_seqs)
    params = SamplingParams(
        temperature=0.8, max_tokens=(ROUNDS + 1) * STEPS + 32, ignore_eos=True,
        output_kind=kind, detokenize=kind is RequestOutputKind.DELTA,
    )  # fmt: skip
    rng = random.Random(1)
    for i in range(num_seqs):
        prompt_len = PROMPT_LEN - rng.randrange(16)  # blocks fill up at different steps
        engine.add_request(str(i), rng.choices(range(1, VOCAB_SIZE), k=prompt_len), params)
    while engine.scheduler.waiting or engine.last_step.num_decodes < num_seqs:
        engine.step()
    return engine


def steps_ms() -> list[dict[str, float]]:
    """A row for each of BATCHES. Rounds of all take turns, as the machine is quicker at times."""
    kinds = {"final_ms": RequestOutputKind.FINAL_ONLY, "delta_ms": RequestOutputKind.DELTA}
    engines = {(n, name): decoding_engine(n, kind) for n in BATCHES for name, kind in kinds.items()}
    gc.collect()
    gc.freeze()  # as `cupaged bench` does, and who streams to many should
    rounds: dict[tuple[int, str], list[float]] = {key: [] for key in engines}
    for _ in range(ROUNDS):
        for key, engine in engines.items():
            rounds[key].append(mean_ms(lambda _, engine=engine: engine.step(), range(STEPS)))
    assert all(engine.last_step.num_decodes == num_seqs for (num_seqs, _), engine in engines.items())
    return [{"sequences": n, **{name: min(rounds[n, name]) for name in kinds}} for n in BATCHES]


def block_us(num_blocks: int) -> dict[str, float]:
    """Of a block in a pool of so many: to take and to give back, and to take where a cached one has to go for it."""
    pool = BlockPool(lambda: 0)
    pool.add_blocks(num_blocks)
    allocate, free, evict = [], [], []
    for _ in range(ROUNDS):
        allocate.append(mean_ms(lambda _: pool.allocate(1), range(num_blocks)))
        free.append(mean_ms(lambda block_id: pool.free([block_id]), range(num_blocks)))
    for turn in range(ROUNDS):
        block_ids, link = pool.allocate(num_blocks), PrefixKey("")
        for i, block_id in enumerate(block_ids):
            digest = turn.to_bytes(8, "little") + i.to_bytes(8, "little")
            link = pool.register(block_id, PrefixBlock(digest, b"", digest), link)
        pool.free(reversed(block_ids))
        assert pool.num_cached_blocks == num_blocks
        evict.append(mean_ms(lambda _: pool.allocate(1), range(num_blocks)))
        assert pool.num_evictions == num_blocks * (turn + 1)
        pool.free(pool.block_ids())
    return {name: 1e3 * min(times) for name, times in (("allocate", allocate), ("free", free), ("evict", evict))}


def mean_ms(run: Callable[[int], object], values: range) -> float:
    """Of a call, one for each value."""
    start = time.thread_time()
    for value in values:
        run(value)
    return (time.thread_time() - start) * 1e3 / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    file = parser.parse_args().json
    steps = steps_ms()
    for row in steps:
        print(
            "{sequences:5} sequences: a step {final_ms:.3f} ms, with text {delta_ms:.3f} ms".format(**row), flush=True
        )
    blocks = []
    for num_blocks in POOL_SIZES:
        blocks.append({"blocks": num_blocks, **{f"{name}_us": us for name, us in block_us(num_blocks).items()}})
        print(
            " ".join(
                f"{name} {value:.3f}" if name != "blocks" else f"{value:7} blocks:"
                for name, value in blocks[-1].items()
            )
        )
    if file is not None:
        report = {"benchmark": "host_cost", "environment": environment(new_engine(1).backend)}
        file.write_text(json.dumps({**report, "steps": steps, "blocks": blocks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
