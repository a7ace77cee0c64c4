"""`cupaged compile`: what it compiles, and where to."""

import re

import pytest

from cupaged.backends import cuda
from cupaged.backends.cuda import needed_kernels
from cupaged.kernels import compile as compiler
from cupaged.kernels import prebuilt
from cupaged.kernels.checks import BFLOAT16, FLOAT16, HALF_TYPES, HEAD_DIMS
from cupaged.kernels.registry import instantiations

EMBEDDING = next(name for file, name in instantiations() if file == "embedding.cu")
HOPPERS_OWN = next(pair for pair in instantiations() if pair[0] == "paged_prefill_sm90.cu")  # not for sm_80


@pytest.fixture(autouse=True)
def own_package_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "PACKAGE_FOLDER", tmp_path / "package")
    monkeypatch.delenv("CUPAGED_KERNELS", raising=False)


@pytest.fixture
def asked(monkeypatch):
    """(kernels, architectures, folder) that would be compiled."""
    calls = []

    def prebuild_kernels(kernels, archs, folder, progress):
        calls.append((kernels, archs, folder))
        return 17

    monkeypatch.setattr(compiler, "prebuild_kernels", prebuild_kernels)
    return calls


def all_needed(dtypes, head_dims):
    return {pair for dtype in dtypes for head_dim in head_dims for pair in needed_kernels(dtype, head_dim, sm90=True)}


@pytest.mark.parametrize(
    ("options", "dtypes", "head_dims"),
    [
        ([], HALF_TYPES, HEAD_DIMS),
        (["--dtype", "float16"], [FLOAT16], HEAD_DIMS),
        (["--head-dim", "128"], HALF_TYPES, [128]),
        (["--head-dim", "80", "--dtype", "bfloat16"], [BFLOAT16], [80]),
    ],
)
def test_options_limit_what_is_compiled(cupaged, asked, tmp_path, options, dtypes, head_dims):
    run = cupaged("compile", "--arch", "sm_80", "--arch", "sm_90a", *options)
    [(kernels, archs, folder)] = asked
    assert len(set(kernels)) == len(kernels)
    assert set(kernels) == all_needed(dtypes, head_dims) <= set(instantiations())
    assert archs == ("sm_80", "sm_90a")
    assert folder == tmp_path / "package"
    assert run.out == f"17 kernels for sm_80, sm_90a in {folder}\n"
    assert (run.code, run.err) == (0, "")


@pytest.mark.parametrize(
    ("options", "dtype", "head_dim"),
    [([], BFLOAT16, 64), (["--dtype", "float16"], FLOAT16, 64), (["--head-dim", "96"], BFLOAT16, 96)],
)
def test_a_model_says_what_it_needs_and_options_go_before_it(cupaged, asked, tiny_model, options, dtype, head_dim):
    assert cupaged("compile", "--arch", "sm_80", "-m", tiny_model / "config.json", *options).code == 0
    assert set(asked[0][0]) == all_needed([dtype], [head_dim])


@pytest.mark.parametrize("by_variable", [True, False])
def test_kernels_go_where_they_are_found(cupaged, monkeypatch, tmp_path, by_variable):
    monkeypatch.setattr(cuda, "needed_kernels", lambda *_, **__: [("embedding.cu", EMBEDDING), HOPPERS_OWN])
    folder = tmp_path / "out"
    if by_variable:
        monkeypatch.setenv("CUPAGED_KERNELS", str(folder))
    run = cupaged("compile", "--arch", "sm_80", *([] if by_variable else ["--out", folder]))
    assert run.out == f"1 kernels for sm_80 in {folder}; set CUPAGED_KERNELS={folder} where they are to be used\n"
    assert (run.code, run.err) == (0, "")
    monkeypatch.setenv("CUPAGED_KERNELS", str(folder))
    path, _ = compiler.compile_kernel("embedding.cu", EMBEDDING, "sm_80")
    assert path.parent == folder / "sm_80"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--arch", "sm_70"], 2, r"cupaged: error: arch must be one of sm_80, .*sm_90a, .*; got 'sm_70'\n"),
        (["--arch", "sm_80", "--head-dim", "48"], 2, "cupaged: error: head_dim must be one of 64, .*; got 48\n"),
        (["--arch", "sm_80", "--out", "{file}"], 1, r"cupaged: error: \S+: can't be written: File exists\n"),
        (["--arch", "sm_80", "-m", "{file}/none"], 1, r"cupaged: error: '\S+': no such directory .*\n"),
        (["--arch", "sm_80", "--dtype", "float32"], 2, r"(?s).*Invalid value for '--dtype': .*"),
        ([], 2, r"(?s).*Missing option '--arch'.*"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(cupaged, tmp_path, arguments, code, message):
    file = tmp_path / "a_file"
    file.write_text("")
    run = cupaged("compile", *(argument.format(file=file) for argument in arguments))
    assert (run.code, run.out) == (code, "")
    assert re.fullmatch(message, run.err)
