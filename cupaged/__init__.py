"""cupaged: large language models on NVIDIA GPUs without PyTorch.

The names below are imported when they are first used, so that `import cupaged` costs milliseconds and
touches neither CuPy nor the tokenizer.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "LLM": "cupaged.llm",
    "SamplingParams": "cupaged.sampling_params",
    "BeamSearchParams": "cupaged.sampling_params",
    "EngineConfig": "cupaged.config",
    "ModelConfig": "cupaged.config",
    "RequestOutput": "cupaged.outputs",
    "CompletionOutput": "cupaged.outputs",
    "BeamSearchOutput": "cupaged.outputs",
    "Logprob": "cupaged.outputs",
    "CupagedError": "cupaged.errors",
    "QueueFullError": "cupaged.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'cupaged' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted(__all__)
