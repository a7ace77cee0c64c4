"""A GGUF file written out in Hugging Face layout, dequantised."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

import ml_dtypes  # noqa: F401 (np.dtype("bfloat16") needs it)
import numpy as np

from cupaged.errors import CheckpointError, ModelNotFoundError
from cupaged.hf_config import CHECKPOINT_DTYPES
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import check_parameters
from cupaged.weights.safetensors_file import write_safetensors


def convert(gguf_path: str | Path, out_dir: str | Path, dtype: str = "bfloat16") -> None:
    """Write config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja and
    model.safetensors, which transformers reads as well. out_dir appears when it is whole, or not at all.

    Raises ValueError when out_dir exists and is not empty or dtype is none of bfloat16, float16, float32;
    ModelNotFoundError, CheckpointError for the GGUF file.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if dtype not in CHECKPOINT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(CHECKPOINT_DTYPES)}; got {dtype!r}")
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ValueError(f"OUT_DIR {out_dir} exists already; name a directory that doesn't, or an empty one")
    if gguf_path.is_dir():
        raise ModelNotFoundError(f"{gguf_path}: a directory, not a GGUF file")
    checkpoint = Checkpoint(gguf_path)
    check_parameters(checkpoint.tensors, checkpoint.config)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = out_dir.with_name(f".{out_dir.name}.{uuid.uuid4().hex[:8]}")
        temporary.mkdir()
        try:
            _write(checkpoint, temporary, dtype)
            os.replace(temporary, out_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{out_dir}: can't be written: {error.strerror}") from None


def _write(checkpoint: Checkpoint, directory: Path, dtype: str) -> None:
    tokenizer = checkpoint.tokenizer
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer.config)
    if tokenizer.chat_template:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template.sources["default"], encoding="utf-8")
    _write_json(directory / "generation_config.json", checkpoint.files.generation_config)
    _write_json(directory / "config.json", {**checkpoint.files.config, "torch_dtype": dtype})
    write_safetensors(directory / "model.safetensors", checkpoint.tensors, np.dtype(dtype))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
