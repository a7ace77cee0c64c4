"""`cupaged compile`: kernels made ahead, on a machine that needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("compile")
@click.option("--arch", "archs", multiple=True, required=True, help="For example sm_90a; may be given several times.")
@click.option("-m", "--model", help="Only what this model needs: a directory, a .gguf file, a hub id or a short name.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    help="Only what models in this type need.  [default: the model's, else both]",
)
@click.option(
    "--head-dim", type=int, help="Only what models with heads of this size need.  [default: the model's, else all]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    envvar="CUPAGED_KERNELS",
    show_envvar=True,
    help="Folder to put them in.  [default: one in the installed package]",
)
def compile_kernels(archs, model, dtype, head_dim, out) -> None:
    """Compile the kernels ahead, so that nothing is left to compile where they run.

    They are taken from the folder that the environment variable CUPAGED_KERNELS names, or else from the package, for
    GPUs of these architectures and newer ones of their generation. Kernels that are there need neither NVRTC nor CUDA's
    headers any more; others are compiled when they are first used.
    """
    from cupaged.arguments import require
    from cupaged.backends.cuda import needed_kernels
    from cupaged.backends.select import choose_dtype
    from cupaged.kernels.checks import HALF_TYPES, HEAD_DIMS
    from cupaged.kernels.compile import prebuild_kernels
    from cupaged.kernels.prebuilt import PACKAGE_FOLDER
    from cupaged.weights.dummy import read_config
    from cupaged.weights.hub import resolve

    if model is not None:
        config = read_config(resolve(model, progress=_say))
        dtype = dtype or choose_dtype("auto", config.dtype, use_cuda=True)
        head_dim = head_dim or config.head_dim
    if head_dim is not None:
        require(head_dim in HEAD_DIMS, "head_dim", head_dim, f"one of {', '.join(map(str, HEAD_DIMS))}")
    dtypes = [half_type for half_type in HALF_TYPES if dtype in (None, str(half_type))]
    head_dims = HEAD_DIMS if head_dim is None else [head_dim]
    kernels = dict.fromkeys(
        pair for half in dtypes for size in head_dims for pair in needed_kernels(half, size, sm90=True)
    )

    folder = out or PACKAGE_FOLDER
    count = prebuild_kernels(list(kernels), archs, folder, _show_progress if sys.stderr.isatty() else None)
    hint = "" if folder == PACKAGE_FOLDER else f"; set CUPAGED_KERNELS={folder.resolve()} where they are to be used"
    click.echo(f"{count} kernels for {', '.join(archs)} in {folder}{hint}")


def _show_progress(count: int, total: int) -> None:
    click.echo(f"\rcompiling: {count} of {total}", nl=count == total, err=True)


def _say(line: str) -> None:
    click.echo(line, err=True)
