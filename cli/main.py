"""The `cupaged` command: its subcommands, and how failures reach the terminal.

Exit codes: 0 success (a closed pipe too), 1 a failure that the message explains, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback

import click

from cupaged import __version__
from cupaged.cli.bench import bench
from cupaged.cli.compile import compile_kernels
from cupaged.cli.convert import convert
from cupaged.cli.generate import generate
from cupaged.cli.info import info
from cupaged.cli.plot import plot_trace
from cupaged.cli.pull import pull
from cupaged.errors import CupagedError


class Group(click.Group):
    """click turns a closed pipe into exit code 1; here the reader, `head` for one, has just seen enough."""

    def invoke(self, ctx: click.Context):
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # Point stdout at nothing, so that the interpreter's last flush doesn't fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="cupaged")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def cli(debug: bool) -> None:
    """Run large language models without PyTorch: paged attention in hand-written CUDA C, driven by CuPy."""


for command in (generate, pull, convert, compile_kernels, info, bench, plot_trace):
    cli.add_command(command)
for command in (generate, pull, convert, compile_kernels, info, plot_trace, *bench.commands.values()):
    command.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help="Show tracebacks."))


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (sys.argv's by default) and exit with its code."""
    args = sys.argv[1:] if args is None else args
    sys.exit(_run(args, debug="--debug" in args))


def _run(args: list[str], debug: bool) -> int:
    try:
        cli.main(args, prog_name="cupaged", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, ValueError | CupagedError)
        kind = "error" if expected else f"internal error: {type(error).__name__}"
        hint = "" if expected or debug else " (--debug shows where)"
        click.echo(f"cupaged: {kind}: {_one_line(error)}{hint}", err=True)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
