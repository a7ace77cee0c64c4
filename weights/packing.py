"""Checkpoint tensors to the arrays that the kernels want, streamed piece by piece."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import ml_dtypes  # noqa: F401 (np.dtype("bfloat16") needs it)
import numpy as np

from cupaged.backends.base import Array, Backend
from cupaged.backends.host_copy import HostCopier
from cupaged.config import ModelConfig
from cupaged.errors import CheckpointError
from cupaged.models.parameters import DecoderWeights, LayerWeights
from cupaged.weights.safetensors_file import row_chunks

INTERLEAVED_ELEMENTS = 1 << 23  # at a time; few enough to stay in the processor's last cache until they are copied
RANDOM_PERIOD = (1 << 22) - 3  # prime, so that rows of no matrix coincide
MAX_NAMES = 4  # of each kind of trouble that an error line spells out
# Buffers that old versions of transformers saved; they are computed from the config.
_COMPUTED_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class Tensor(Protocol):
    """What a checkpoint maps names to: a mapped or plain ndarray, or something that makes rows when asked."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> np.ndarray: ...


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model must hold, under its Hugging Face name."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.up_proj.weight": (config.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, config.intermediate_size),
    }
    if config.qkv_bias:
        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def parameter_bytes(config: ModelConfig, dtype) -> int:
    """Bytes of the weights in dtype (a NumPy dtype or its name)."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values()) * np.dtype(dtype).itemsize


def load_weights(tensors: Mapping[str, Tensor], config: ModelConfig, backend: Backend) -> DecoderWeights:
    """Allocate the weights on the backend and copy the checkpoint's tensors there, converted to its dtype.

    tensors: by Hugging Face name, for example Checkpoint.tensors. At most one piece of a tensor is on the host at a
    time beyond what is mapped. Raises CheckpointError, before anything is allocated, that names what is missing,
    misshapen or too many; OutOfMemoryError.
    """
    check_parameters(tensors, config)

    def pack(*names: str) -> Array:
        """The tensors one below the other."""
        parts = [tensors[name] for name in names]
        rows = sum(part.shape[0] for part in parts)
        packed = backend.empty((rows, *parts[0].shape[1:]), backend.dtype)
        start = 0
        for part in parts:
            for chunk in row_chunks(part.shape):
                backend.copy_in(packed[start + chunk.start : start + chunk.stop], part[chunk])
            start += part.shape[0]
        return packed

    def interleave(*names: str) -> Array:
        """The tensors' first rows, then their second ones, and so on."""
        parts = [tensors[name] for name in names]
        rows, columns = parts[0].shape
        packed = backend.empty((len(parts) * rows, columns), backend.dtype)
        chunks = list(row_chunks((rows, len(parts) * columns), INTERLEAVED_ELEMENTS))
        buffer = np.empty((chunks[0].stop, len(parts), columns), backend.dtype)
        for chunk in chunks:
            together = buffer[: chunk.stop - chunk.start]
            for i, part in enumerate(parts):
                copier.copy(together[:, i], part[chunk])
            backend.copy_in(packed[len(parts) * chunk.start : len(parts) * chunk.stop], together.reshape(-1, columns))
        return packed

    with contextlib.closing(HostCopier()) as copier:
        return _assemble(config, pack, interleave)


def _assemble(config: ModelConfig, pack: Callable[..., Array], interleave: Callable[..., Array]) -> DecoderWeights:
    """The weights of parts that are packed one below the other, and of those whose rows are interleaved."""

    def layer(i: int) -> LayerWeights:
        at = f"model.layers.{i}."
        qkv = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        return LayerWeights(
            input_norm=pack(at + "input_layernorm.weight"),
            qkv=pack(*(name + ".weight" for name in qkv)),
            o=pack(at + "self_attn.o_proj.weight"),
            post_attention_norm=pack(at + "post_attention_layernorm.weight"),
            gate_up=interleave(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
            down=pack(at + "mlp.down_proj.weight"),
            qkv_bias=pack(*(name + ".bias" for name in qkv)) if config.qkv_bias else None,
            q_norm=pack(at + "self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=pack(at + "self_attn.k_norm.weight") if config.qk_norm else None,
        )

    embed_tokens = pack("model.embed_tokens.weight")
    return DecoderWeights(
        embed_tokens=embed_tokens,
        layers=[layer(i) for i in range(config.num_layers)],
        norm=pack("model.norm.weight"),
        lm_head=embed_tokens if config.tie_word_embeddings else pack("lm_head.weight"),
    )


def random_weights(config: ModelConfig, backend: Backend, seed: int = 0) -> DecoderWeights:
    """Weights of the right shapes and sensible sizes: norms of one, elsewhere small normal values, in config.dtype.

    They are RANDOM_PERIOD values again and again, copied where they are to be: drawing billions would take minutes.
    """
    shapes, rng = parameter_shapes(config), np.random.default_rng(seed)
    drawn = (rng.standard_normal(RANDOM_PERIOD, np.float32) * np.float32(0.02)).astype(config.dtype)
    values = backend.empty(drawn.shape, backend.dtype)
    backend.copy_in(values, drawn)

    def fill(*names: str) -> Array:
        rows = sum(shapes[name][0] for name in names)
        array = backend.empty((rows, *shapes[names[0]][1:]), backend.dtype)
        if names[0].endswith("norm.weight"):
            backend.copy_in(array, np.ones(array.shape, np.float32))
            return array
        flat, end = array.reshape(-1), 0
        first = int(rng.integers(RANDOM_PERIOD))
        while end < flat.size:
            start, end = end, min(flat.size, end + RANDOM_PERIOD - first)
            backend.copy(flat[start:end], values[first : first + end - start])
            first = 0
        return array

    return _assemble(config, pack=fill, interleave=fill)


def check_parameters(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raise CheckpointError, in one line, for tensors that are missing, misshapen, of no float dtype or too many."""
    shapes = parameter_shapes(config)
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    misshapen = [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    integers = [
        f"{name} ({tensors[name].dtype})"
        for name in shapes
        if name in tensors and str(getattr(tensors[name], "dtype", "float32")) not in _FLOAT_DTYPES
    ]
    troubles = [
        _list("missing tensors", (name for name in shapes if name not in tensors)),
        _list("wrong shapes", misshapen),
        _list("tensors of an unsupported dtype", integers),
        _list(
            "unknown tensors",
            (n for n in tensors if n not in shapes and n not in optional and not n.endswith(_COMPUTED_BUFFERS)),
        ),
    ]
    if any(troubles):
        raise CheckpointError(
            "the weights don't fit config.json: " + "; ".join(filter(None, troubles)) + "; fetch the model again"
        )


_FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _list(title: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{title}: {', '.join(names[:MAX_NAMES])}{more}" if names else ""
