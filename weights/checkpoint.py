"""A model on disk: a directory in Hugging Face layout, or a GGUF file that is shown as one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupaged.backends.base import Backend
from cupaged.config import ModelConfig
from cupaged.errors import CheckpointError, ModelNotFoundError
from cupaged.hf_config import Keys
from cupaged.models.parameters import DecoderWeights
from cupaged.sampling_params import SamplingParams
from cupaged.tokenizer import Tokenizer, read_json
from cupaged.weights.gguf import GGUFModel
from cupaged.weights.packing import Tensor, load_weights
from cupaged.weights.safetensors_file import open_safetensors

# Keys of generation_config.json that would change the output and that nothing here computes -> the values at which
# they change nothing.
_NOT_COMPUTED = {
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "num_beams": (1,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}


class HFDirectory:
    """config.json, generation_config.json, the safetensors files and the tokenizer of one directory."""

    def __init__(self, path: Path):
        self._path = path
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json there; name a directory in Hugging Face layout")
        self.config = read_json(path / "config.json")
        has_defaults = (path / "generation_config.json").is_file()
        self.generation_config = read_json(path / "generation_config.json") if has_defaults else {}
        self.tensors = self._open_tensors()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dir(self._path)

    def _open_tensors(self) -> dict[str, Tensor]:
        single, index = self._path / "model.safetensors", self._path / "model.safetensors.index.json"
        if single.is_file():
            return open_safetensors(single)
        if index.is_file():
            return self._open_shards(index)
        others = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt") for file in self._path.glob(kind))
        found = f"only {others[0]}, which is not read" if others else "no weights"
        raise CheckpointError(f"{self._path}: no model.safetensors there, {found}; use a safetensors version of it")

    def _open_shards(self, index: Path) -> dict[str, Tensor]:
        weight_map = Keys(read_json(index), str(index)).mapping("weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index}: weight_map must name files beside it; got {file!r}")
        missing = sorted({file for file in weight_map.values() if not (self._path / file).is_file()})
        if missing:
            raise CheckpointError(f"{self._path}: files of the index are missing: {', '.join(missing)}; fetch it again")
        shards = {file: open_safetensors(self._path / file) for file in sorted(set(weight_map.values()))}
        absent = [name for name, file in weight_map.items() if name not in shards[file]]
        if absent:
            raise CheckpointError(f"{index}: tensor {absent[0]} is not in {weight_map[absent[0]]}; fetch it again")
        return {name: shards[file][name] for name, file in weight_map.items()}


class Checkpoint:
    """A model's files, checked and opened. Takes a directory in Hugging Face layout or a .gguf file.

    config: what config.json says; its eos_token_ids are config.json's alone.
    tensors: Hugging Face name -> tensor, mapped.
    sampling_defaults: the SamplingParams arguments that generation_config.json asks for; greedy is temperature 0.
    warnings: a line for each wish in generation_config.json that is not followed.

    Raises ModelNotFoundError when nothing is there, CheckpointError when it is damaged, incomplete or of a kind that
    cupaged does not run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise ModelNotFoundError(f"{self.path}: no such file or directory")
        self.files = HFDirectory(self.path) if self.path.is_dir() else GGUFModel(self.path)
        self.tensors: Mapping[str, Tensor] = self.files.tensors
        try:
            self.config = ModelConfig.from_hf(self.files.config)
            generation = Keys(self.files.generation_config, "generation_config.json")
            self._generation_eos = generation.token_ids("eos_token_id")
            self.sampling_defaults = _sampling_defaults(generation)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        self.warnings = [
            f"generation_config.json: {key} {generation.values[key]} is not supported and is left out"
            for key, neutral in _NOT_COMPUTED.items()
            if key in generation and generation.values[key] not in neutral
        ]

    def load(self, config: ModelConfig, backend: Backend) -> DecoderWeights:
        """Its weights on the backend, for a model of this configuration. Raises what packing.load_weights does."""
        return load_weights(self.tensors, config, backend)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is first asked for. Raises CheckpointError."""
        return self.files.tokenizer()

    @functools.cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: those of config.json, generation_config.json and the tokenizer together."""
        tokenizer_eos = self.tokenizer.eos_token_id
        ids = {*self.config.eos_token_ids, *self._generation_eos, *([] if tokenizer_eos is None else [tokenizer_eos])}
        return tuple(sorted(ids))


def _sampling_defaults(generation: Keys) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if key in generation:
            defaults[key] = generation.number(key)
    if "top_k" in generation:
        defaults["top_k"] = generation.natural("top_k")
    if "max_new_tokens" in generation:
        defaults["max_tokens"] = generation.count("max_new_tokens")
    if not generation.boolean("do_sample", True):
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise CheckpointError(f"generation_config.json: {error}") from None
    return defaults
