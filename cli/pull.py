"""`cupaged pull`: fetch a model into the cache."""

from __future__ import annotations

import click


@click.command()
@click.argument("name", required=False)
@click.option("--offline", is_flag=True, help="Don't touch the network: only say whether the model is there.")
def pull(name: str | None, offline: bool) -> None:
    """Fetch the model NAME (a Hugging Face hub id such as org/name, or a short name) and print where it is.

    Without NAME: the default model, SmolLM2-135M-Instruct.
    """
    from cupaged.weights.hub import resolve

    click.echo(resolve(name, offline=offline, progress=lambda line: click.echo(line, err=True)))
