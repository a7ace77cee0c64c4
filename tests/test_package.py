"""What is installed, and what importing it costs."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_kernel_source(wheel_names):
    sources = {f"cupaged/cuda_src/{p.name}" for p in (ROOT / "cuda_src").glob("*.cu*")}
    assert len(sources) >= 10
    assert sources <= wheel_names


def test_wheel_holds_every_module(wheel_names):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "cupaged").rglob("*.py")}
    for name in ("cli", "weights", "cuda_src"):
        modules |= {f"cupaged/{name}/{p.name}" for p in (ROOT / name).glob("*.py")}
    assert modules <= wheel_names


def test_wheel_installs_nothing_but_cupaged(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {re.sub(r"-[\d.]+\.dist-info", ".dist-info", top) for top in tops} == {"cupaged", "cupaged.dist-info"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


# Seconds of CPU, not of the wall, so that a busy machine changes nothing.
def test_import_is_light():
    code = """
import sys, time
start = time.process_time()
import cupaged
print(time.process_time() - start)
print([m for m in ("cupy", "tokenizers", "numpy", "click", "gguf", "jinja2", "huggingface_hub") if m in sys.modules])
"""
    times, heavy = zip(*(run_python(code).splitlines() for _ in range(3)), strict=True)
    assert min(map(float, times)) < 0.1
    assert set(heavy) == {"[]"}


def test_help_is_quick():
    code = """
import contextlib, io, time
start = time.process_time()
from cupaged.cli.main import cli
with contextlib.redirect_stdout(io.StringIO()) as out:
    cli.main(["--help"], standalone_mode=False)
print(time.process_time() - start)
assert "generate" in out.getvalue()
"""
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_every_public_name_is_there():
    import cupaged

    for name in cupaged.__all__:
        assert getattr(cupaged, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cupaged.nonsense
