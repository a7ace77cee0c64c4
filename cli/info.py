"""`cupaged info`: versions, the device, and what a model needs."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING

import click

from cupaged import __version__
from cupaged.cli.options import model_options

if TYPE_CHECKING:
    from cupaged.config import EngineConfig

PACKAGES = ("cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "numpy", "tokenizers", "safetensors", "gguf")


@click.command()
@model_options
def info(
    model, device, dtype, max_model_len, block_size, kv_cache_memory_bytes, gpu_memory_utilization, offline
) -> None:
    """Show versions, the device, and of a model: its shape, its bytes, and how many tokens of KV cache fit.

    Nothing is fetched, and no weights are loaded.
    """
    from cupaged.config import EngineConfig

    config = EngineConfig(
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    click.echo(f"cupaged:  {__version__} (Python {platform.python_version()}, {platform.system()})")
    click.echo("packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    _show_model(model, config)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _show_model(name: str | None, config: EngineConfig) -> None:
    from cupaged.backends.select import choose_device, choose_dtype, open_backend
    from cupaged.memory.arena import KVLayout
    from cupaged.memory.budget import fit_max_model_len, format_bytes, kv_cache_bytes, num_kv_blocks
    from cupaged.weights.checkpoint import Checkpoint
    from cupaged.weights.hub import resolve
    from cupaged.weights.packing import parameter_bytes

    path = resolve(name, offline=True)
    checkpoint = Checkpoint(path)
    model = checkpoint.config
    use_cuda, why = choose_device(config.device)
    backend = open_backend(use_cuda, choose_dtype(config.dtype, model.dtype, use_cuda))
    click.echo(f"device:   {backend.description}, {why}")

    weights = parameter_bytes(model, backend.dtype)
    layout = KVLayout.choose(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=config.block_size,
        head_dim=model.head_dim,
        dtype=backend.dtype,
        max_blocks=1,
    )
    click.echo(f"model:    {path}")
    click.echo(
        f"          {model.architecture}: {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_heads} heads over {model.num_kv_heads} KV heads of {model.head_dim}, "
        f"vocabulary {model.vocab_size}, {model.max_position_embeddings} positions"
    )
    click.echo(f"weights:  {weights // backend.dtype.itemsize / 1e6:.1f} M, {format_bytes(weights)} in {backend.dtype}")
    blocks = num_kv_blocks(max(0, kv_cache_bytes(config, backend) - weights), layout.bytes_per_block)
    click.echo(
        f"KV cache: {format_bytes(layout.bytes_per_token)} a token; {blocks * config.block_size} tokens fit "
        f"in {blocks} blocks of {config.block_size}"
    )
    click.echo(f"sequence: {fit_max_model_len(config, model, layout, blocks)} tokens at most")
