"""A model without its weights: shapes from a configuration, random values, token ids for prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cupaged.backends.base import Backend
from cupaged.config import ModelConfig
from cupaged.errors import CheckpointError, ModelNotFoundError
from cupaged.models.parameters import DecoderWeights
from cupaged.tokenizer import read_json
from cupaged.weights.gguf import GGUFModel
from cupaged.weights.packing import random_weights


class DummyCheckpoint:
    """Stands in for a Checkpoint where only the speed counts. path: as for `read_config`, whose errors it raises."""

    tokenizer = None
    warnings: tuple[str, ...] = ()

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_config(self.path)
        self.eos_token_ids = self.config.eos_token_ids
        self.sampling_defaults: dict[str, Any] = {}

    def load(self, config: ModelConfig, backend: Backend) -> DecoderWeights:
        """As Checkpoint.load."""
        return random_weights(config, backend)


def read_config(path: str | Path) -> ModelConfig:
    """A model's shape. path: a directory with a config.json, which nothing need lie beside, such a file, or a .gguf.

    Raises ModelNotFoundError when nothing is there, CheckpointError when it is damaged or not supported.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelNotFoundError(f"{file}: no such file; name a directory with a config.json, or a .gguf file")
    values = read_json(file) if file.suffix == ".json" else GGUFModel(file).config
    try:
        return ModelConfig.from_hf(values)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
