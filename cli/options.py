"""Options that several subcommands take: which model, on what, in how much memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import click

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b?)", re.IGNORECASE)


class Size(click.ParamType):
    """Bytes, with k, M, G or T for powers of 1000 and Ki, Mi, Gi or Ti for powers of 1024."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        match = _SIZE.fullmatch(str(value).strip())
        if not match:
            self.fail(f"{value!r} is not a size; write bytes, or for example 800M or 2GiB", param, ctx)
        number, prefix, binary = match.groups()
        exponent = " kmgt".index(prefix.lower()) if prefix else 0
        return int(float(number) * (1024 if binary else 1000) ** exponent)


_MODEL_OPTIONS = {
    "model": click.option(
        "-m",
        "--model",
        help="A directory in Hugging Face layout, a .gguf file, a hub id or a short name.  "
        "[default: SmolLM2-135M-Instruct]",
    ),
    "device": click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True),
    "dtype": click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        show_default=True,
        help="auto: the checkpoint's on a GPU, float32 on the CPU.",
    ),
    "max_model_len": click.option(
        "--max-model-len", type=int, metavar="TOKENS", help="Longest prompt + output.  [default: what fits]"
    ),
    "block_size": click.option(
        "--block-size", type=int, default=16, show_default=True, help="Tokens a KV block: 8 to 64."
    ),
    "kv_cache_memory_bytes": click.option(
        "--kv-cache-memory",
        "kv_cache_memory_bytes",
        type=Size(),
        help="Most the KV cache may take, for example 2GiB.",
    ),
    "gpu_memory_utilization": click.option(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        show_default=True,
        help="Share of the GPU's memory that weights and KV cache together may reach.",
    ),
    "offline": click.option("--offline", is_flag=True, help="Never touch the network."),
}


# Under LLM's names, as all of the above.
_ENGINE_OPTIONS = [
    click.option(
        "--preemption-mode",
        type=click.Choice(["auto", "recompute", "swap"]),
        default="auto",
        show_default=True,
        help="What becomes of a prompt's KV cache when others need its memory.",
    ),
    click.option(
        "--swap-space",
        "swap_space_bytes",
        type=Size(),
        help="Most host memory that swapping may take.  [default: 4GiB on a GPU]",
    ),
    click.option("--enforce-eager", is_flag=True, help="Launch kernels one by one, instead of steps as CUDA graphs."),
    click.option(
        "--async-scheduling/--no-async-scheduling",
        default=None,
        help="Launch each step before the last one's tokens are known.  [default: on a GPU]",
    ),
]


def engine_options(command: Callable) -> Callable:
    """How the engine runs a model."""
    return add_options(command, _ENGINE_OPTIONS)


def model_options(command: Callable) -> Callable:
    """What decides where a model comes from and where it runs."""
    return add_options(command, _MODEL_OPTIONS.values())


def shape_options(command: Callable) -> Callable:
    """Of the model options those that count where a model's shapes are used, but no model is run."""
    return add_options(
        command, [_MODEL_OPTIONS[name] for name in ("model", "device", "dtype", "block_size", "offline")]
    )


def add_options(command: Callable, options: Iterable[Callable]) -> Callable:
    """Decorate the command with click options, which --help lists in this order."""
    for option in reversed(list(options)):
        command = option(command)
    return command
