"""What tests of whole models on the CUDA backend share, whether its kernels run on the CPU or on a GPU."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from model.conftest import Driver

from cupaged.backends.reference import ReferenceBackend
from cupaged.config import EngineConfig
from cupaged.engine.engine import Engine
from cupaged.models.decoder import Decoder
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights

GOLDEN = Path(__file__).parent / "model" / "golden"
MODELS = ["llama", "llama_untied", "mistral", "qwen2", "qwen3"]  # those in GOLDEN


class RoundingBackend(ReferenceBackend):
    """The plain implementation in a 16-bit type, transformers' among them: NumPy in float32, each result rounded, that
    of a matrix product and, once more, its sum with the residual."""

    def __init__(self, dtype):
        super().__init__()
        self._rounded_to = dtype

    def round_weights(self, weights):
        for part in (weights, *weights.layers):
            self._round(*(array for array in vars(part).values() if isinstance(array, np.ndarray)))

    def _round(self, *arrays):
        for array in arrays:
            array[...] = array.astype(self._rounded_to)

    def rms_norm(self, out, x, weight, eps):
        super().rms_norm(out, x, weight, eps)
        self._round(out)

    def linear(self, out, x, weight, bias=None, *, accumulate=False):
        result = np.empty_like(out)
        super().linear(result, x, weight, bias)
        self._round(result)
        out[...] = result if not accumulate else out + result
        self._round(out)

    def rope_and_store_kv(self, qkv, arena, layer, positions, slot_mapping, *args):
        super().rope_and_store_kv(qkv, arena, layer, positions, slot_mapping, *args)
        self._round(qkv, *(slab[layer] for slab in arena.slabs))

    def paged_attention(self, out, *args):
        super().paged_attention(out, *args)
        self._round(out)

    def linear_silu_and_mul(self, out, x, weight):
        super().linear_silu_and_mul(out, x, weight)  # its linear is the one above
        self._round(out)


@functools.cache
def golden(name: str) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        arrays = dict(arrays)
    prompts = np.split(arrays["prompts"], np.cumsum(arrays["lengths"])[:-1])
    return arrays | {"prompts": [prompt.tolist() for prompt in prompts]}


def new_driver(name: str, backend) -> Driver:
    checkpoint = Checkpoint(GOLDEN / name)
    weights = load_weights(checkpoint.tensors, checkpoint.config, backend)
    if isinstance(backend, RoundingBackend):
        backend.round_weights(weights)
    return Driver(checkpoint.config, weights, backend, block_size=8)


def new_engine(
    name: str, backend, *, num_blocks=256, max_model_len=400, max_num_seqs=8, max_num_tokens=512, **options
) -> Engine:
    """An engine on a tiny model, with a cache that grows by slabs of an eighth of num_blocks, 8 tokens each."""
    checkpoint = Checkpoint(GOLDEN / name)
    model, weights = checkpoint.config, load_weights(checkpoint.tensors, checkpoint.config, backend)
    backend.reserve(model, max_num_tokens, max_num_seqs, max_model_len)
    decoder = Decoder(
        model, weights, backend,
        max_num_tokens=max_num_tokens, max_num_logits=max_num_seqs, max_model_len=max_model_len,
    )  # fmt: skip
    bytes_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * backend.dtype.itemsize
    config = EngineConfig(
        block_size=8, max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_tokens,
        kv_cache_memory_bytes=num_blocks * 8 * bytes_per_token, seed=1, **options,
    )  # fmt: skip
    return Engine(config, model, decoder, backend)


def mixed_steps(driver: Driver, name: str) -> np.ndarray:
    """The 33-token prompt of the model in a whole, then in chunks that share their steps with a decode and
    with whole prompts, its end as decodes. Logits [66, vocab_size] of both ways."""
    prompts = golden(name)["prompts"]
    prompt, other, third = prompts[-1], prompts[1], prompts[2]
    [whole] = driver.step((driver.new_sequence(), prompt), all_logits=True)
    mixed, rows = driver.new_sequence(), []
    neighbour = driver.new_sequence()
    rows.append(driver.step((mixed, prompt[:17]), (neighbour, other), all_logits=True)[0])
    rows.append(driver.step((neighbour, [5]), (mixed, prompt[17:18]), all_logits=True)[1])
    rows.append(
        driver.step((neighbour, [7]), (mixed, prompt[18:29]), (driver.new_sequence(), third), all_logits=True)[1]
    )
    for i in range(29, 33):
        rows.append(driver.step((mixed, prompt[i : i + 1]), (neighbour, [i]), all_logits=True)[0])
    return np.concatenate([whole, *rows])


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
