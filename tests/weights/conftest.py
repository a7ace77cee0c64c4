import json

import pytest
from checkpoint_files import CONFIG, HostBackend, random_tensors
from safetensors.numpy import save_file


@pytest.fixture
def backend():
    return HostBackend()


@pytest.fixture
def tensors():
    return random_tensors(CONFIG)


@pytest.fixture
def model_dir(tmp_path, tensors):
    """Without a tokenizer."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, path / "model.safetensors")
    return path
