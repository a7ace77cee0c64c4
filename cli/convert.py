"""`cupaged convert`: a GGUF file to the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("gguf", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="What to store the dequantised weights in.",
)
def convert(gguf: Path, out_dir: Path, dtype: str) -> None:
    """Write the model in the GGUF file as OUT_DIR: config.json, tokenizer.json, model.safetensors and so on."""
    from cupaged.weights.convert import convert as convert_gguf

    convert_gguf(gguf, out_dir, dtype=dtype)
    click.echo(out_dir)
