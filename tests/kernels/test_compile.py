"""The compiler, the cache and the registry. NVRTC runs without a GPU; nothing here is launched on one."""

import importlib
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cupaged.cache_dir import cache_dir
from cupaged.errors import CupagedError, DeviceError
from cupaged.kernels import compile as compiler
from cupaged.kernels import device, prebuilt
from cupaged.kernels.device import DeviceInfo, device_info, find_arch, set_device_info
from cupaged.kernels.kernel_cache import KernelCache
from cupaged.kernels.nvrtc import load_nvrtc
from cupaged.kernels.registry import instantiations
from cupaged.kernels.tier import runs_on

ARCHS = ("sm_80", "sm_90a", "sm_120")
SOURCES = sorted(path.name for path in compiler.SOURCE_DIR.glob("*.cu"))

KERNEL = """
#include "outer.cuh"
template <int kFactor>
__global__ void scale(float* x) { x[threadIdx.x] *= kFactor * kOuter; }
"""


@pytest.fixture(autouse=True)
def nothing_prebuilt(tmp_path, monkeypatch):
    """Neither the package nor the environment has kernels that were built ahead."""
    monkeypatch.setattr(prebuilt, "PACKAGE_FOLDER", tmp_path / "cubins")
    monkeypatch.delenv("CUPAGED_KERNELS", raising=False)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A source folder of its own: scale.cu -> outer.cuh -> inner.cuh; and a cache of its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "scale.cu").write_text(KERNEL)
    (folder / "outer.cuh").write_text('#if 1\n#  include "inner.cuh"\n#endif\nconstexpr float kOuter = kInner;\n')
    (folder / "inner.cuh").write_text("#include <cuda_fp16.h>\nconstexpr float kInner = 2.f;\n")
    include_dirs = (folder, compiler._include_dirs()[1])
    monkeypatch.setattr(compiler, "SOURCE_DIR", folder)
    monkeypatch.setattr(compiler, "_include_dirs", lambda: include_dirs)
    cache = KernelCache(tmp_path / "cache")
    monkeypatch.setattr(compiler, "_kernel_cache", lambda: cache)
    forget_sources()
    yield folder
    forget_sources()


def forget_sources():
    """Read the sources anew, as a new process does."""
    compiler.source_digest.cache_clear()
    compiler._scan.cache_clear()


@pytest.fixture
def no_nvrtc(monkeypatch):
    """Call it, and from then on there are neither NVRTC nor CUDA's headers."""

    def missing():
        raise DeviceError("NVRTC can't be loaded; pip install it")

    def take_away():
        for module, name in ((compiler, "load_nvrtc"), (compiler, "_include_dirs"), (device, "load_nvrtc")):
            monkeypatch.setattr(module, name, missing)

    return take_away


# -- every shipped instantiation -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(request):
    """programs(file, arch) -> what compile_program returns. All cores compile the selected cases below, the tests wait;
    under pytest-xdist, whose workers each know all cases and run some, a case is compiled when its test asks."""
    names = {file: [name for source, name in instantiations() if source == file] for file in SOURCES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        items = [] if "PYTEST_XDIST_WORKER" in os.environ else request.session.items
        cases = [item.callspec.params for item in items if "programs" in item.fixturenames]
        keys = [(case["file"], case["arch"]) for case in cases]
        ahead = {(file, arch): pool.submit(compiler.compile_program, file, names[file], arch) for file, arch in keys}

        def program(file, arch):
            if (file, arch) in ahead:
                return ahead[file, arch].result()
            return compiler.compile_program(file, names[file], arch)

        yield program


@pytest.mark.parametrize(("file", "arch"), [(file, arch) for file in SOURCES for arch in ARCHS if runs_on(file, arch)])
def test_every_instantiation_compiles(file, arch, programs):
    names = [name for source, name in instantiations() if source == file]
    image, symbols = programs(file, arch)
    assert names
    assert image.startswith(b"\x7fELF")
    assert len(set(symbols.values())) == len(names)
    assert all(symbol.encode() in image for symbol in symbols.values())


def ptxas_log(file, arch, names):
    """What ptxas says, which it says to nobody when it compiles."""
    nvrtc = load_nvrtc()
    program = nvrtc.createProgram((compiler.SOURCE_DIR / file).read_text(), file, (), ())
    for name in names:
        nvrtc.addNameExpression(program, name)
    includes = (f"-I{folder}" for folder in compiler._include_dirs())
    nvrtc.compileProgram(program, (f"-arch={arch}", *compiler.FLAGS, "--ptxas-options=-v", *includes))
    log = nvrtc.getProgramLog(program)
    nvrtc.destroyProgram(program)
    return log


@pytest.mark.parametrize("file", [file for file in SOURCES if file.endswith("_sm90.cu")])
def test_wgmma_is_left_asynchronous_and_nothing_spills(file):
    """ptxas may serialize the products, and did over a trap."""
    names = [name for source, name in instantiations() if source == file]
    log = ptxas_log(file, "sm_90a", names)
    assert "serialized" not in log
    assert len(re.findall(r"\b0 bytes spill stores, 0 bytes spill loads", log)) == len(names)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_registers_leave_two_thread_blocks_of_normed_products_an_sm(arch):
    """All of a warp's x is in them. Of 65,536, two thread blocks of 256 threads have 128 a thread."""
    names = [name for file, name in instantiations() if file == "linear_small.cu" and name.split(", ")[2] == "float"]
    log = ptxas_log("linear_small.cu", arch, names)
    assert len(re.findall(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log)) == len(names)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == len(names)
    assert max(registers) <= 128


def test_the_registry_names_each_source_and_nothing_twice():
    pairs = list(instantiations())
    assert {file for file, _ in pairs} == set(SOURCES)
    assert len(set(pairs)) == len(pairs)


def test_launchers_import_without_cupy():
    stems = [Path(file).stem for file in SOURCES]
    code = f"import sys, importlib\nfor s in {stems}: importlib.import_module('cupaged.kernels.' + s)\n"
    code += "assert not {'cupy', 'cupy_backends'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- compiling -----------------------------------------------------------------------------------------------


def test_a_compiled_kernel_is_taken_from_the_cache(sources, monkeypatch):
    path, symbol = compiler.compile_kernel("scale.cu", "scale<3>", "sm_80")
    assert path.read_bytes().startswith(b"\x7fELF")
    assert symbol.encode() in path.read_bytes()
    monkeypatch.setattr(compiler, "compile_program", lambda *_: pytest.fail("compiled again"))
    assert compiler.compile_kernel("scale.cu", "scale<3>", "sm_80") == (path, symbol)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
@pytest.mark.parametrize("suffix", ["", ".symbol"])
def test_a_damaged_entry_is_compiled_again(sources, suffix, damage):
    path, symbol = compiler.compile_kernel("scale.cu", "scale<3>", "sm_80")
    whole = path.read_bytes()
    damaged = path.with_name(path.name + suffix)
    damaged.write_bytes(damage(damaged.read_bytes()))
    assert compiler.compile_kernel("scale.cu", "scale<3>", "sm_80") == (path, symbol)
    assert path.read_bytes() == whole


def test_an_architecture_without_cubins_gets_ptx(sources):
    image, symbols = compiler.compile_program("scale.cu", ["scale<3>"], "compute_80")
    assert b".target sm_80" in image
    assert symbols["scale<3>"].encode() in image


def test_subnormals_are_kept(sources):
    """No -ftz: PTX says .ftz on each instruction that flushes."""
    image, _ = compiler.compile_program("scale.cu", ["scale<3>"], "compute_80")
    assert b"mul.f32" in image
    assert b".ftz" not in image


@pytest.mark.parametrize(
    ("source", "name", "complaint"),
    [
        (KERNEL.replace("kFactor *", "undeclared *"), "scale<3>", r'scale.cu\(4\): error: .*"undeclared"'),
        (KERNEL, "scale<'oops", "error"),
        (KERNEL, "no_such_kernel<3>", r'error: .*"no_such_kernel"'),
        (KERNEL.replace("outer", "missing"), "scale<3>", "missing.cuh"),
    ],
)
def test_a_compile_error_names_file_kernel_and_line(sources, source, name, complaint):
    (sources / "scale.cu").write_text(source)
    with pytest.raises(CupagedError, match=complaint) as raised:
        compiler.compile_kernel("scale.cu", name, "sm_80")
    message = str(raised.value)
    assert message.startswith(f"scale.cu: {name} for sm_80: ")
    assert "\n" not in message


def test_a_machine_without_nvrtc_is_told_what_to_install():
    code = """
import cuda.pathfinder
def find_nothing(name):
    raise cuda.pathfinder.DynamicLibNotFoundError(name)
cuda.pathfinder.load_nvidia_dynamic_lib = find_nothing
from cupaged.kernels.nvrtc import load_nvrtc
load_nvrtc()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DeviceError: NVRTC" in result.stderr
    assert "pip install nvidia-cuda-nvrtc-cu12" in result.stderr


def test_kernels_compile_in_parallel_into_the_cache(sources, monkeypatch):
    kernels = [("scale.cu", f"scale<{factor}>") for factor in range(4)]
    compiler.compile_kernels(kernels, "sm_80", num_threads=2)
    monkeypatch.setattr(compiler, "compile_program", lambda *_: pytest.fail("compiled again"))
    paths = {compiler.compile_kernel(file, name, "sm_80")[0] for file, name in kernels}
    assert len(paths) == 4


def test_an_error_in_a_parallel_compile_is_raised(sources):
    with pytest.raises(CupagedError, match="no_such_kernel"):
        compiler.compile_kernels([("scale.cu", "scale<1>"), ("scale.cu", "no_such_kernel<1>")], "sm_80")


# -- the cache's key -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("edited", ["scale.cu", "outer.cuh", "inner.cuh"])
def test_an_edit_anywhere_below_the_source_changes_the_key(sources, edited):
    before = compiler.cache_key("scale.cu", "scale<3>", "sm_80")
    (sources / edited).write_text((sources / edited).read_text() + "// edited\n")
    forget_sources()
    assert compiler.cache_key("scale.cu", "scale<3>", "sm_80") != before


def test_a_file_that_is_not_included_leaves_the_key(sources):
    before = compiler.cache_key("scale.cu", "scale<3>", "sm_80")
    (sources / "unrelated.cuh").write_text("int x;\n")
    forget_sources()
    assert compiler.cache_key("scale.cu", "scale<3>", "sm_80") == before


def test_cuda_headers_options_compiler_name_and_architecture_are_in_the_key(sources, tmp_path, monkeypatch):
    keys = {compiler.cache_key("scale.cu", "scale<3>", "sm_80")}
    keys.add(compiler.cache_key("scale.cu", "scale<4>", "sm_80"))
    keys.add(compiler.cache_key("scale.cu", "scale<3>", "sm_90a"))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-ftz=true"))
        keys.add(compiler.cache_key("scale.cu", "scale<3>", "sm_80"))
    with monkeypatch.context() as patch:

        class OtherNvrtc:
            def getVersion(self):
                return 99, 9

        patch.setattr(compiler, "load_nvrtc", OtherNvrtc)
        keys.add(compiler.cache_key("scale.cu", "scale<3>", "sm_80"))
    with monkeypatch.context() as patch:
        (tmp_path / "cuda_fp16.h").write_text("// other CUDA headers\n")
        patch.setattr(compiler, "_include_dirs", lambda: (sources, tmp_path))
        keys.add(compiler.cache_key("scale.cu", "scale<3>", "sm_80"))
    assert len(keys) == 6


def test_headers_are_looked_for_once_a_source_file(sources):
    for factor in range(3):
        compiler.cache_key("scale.cu", f"scale<{factor}>", "sm_80")
    assert compiler.source_digest.cache_info().misses == 2  # our headers; ours and CUDA's


# -- kernels that were built ahead ---------------------------------------------------------------------------

SCALES = [("scale.cu", f"scale<{factor}>") for factor in range(2)]


def test_prebuilt_kernels_need_no_nvrtc_and_no_cache(sources, tmp_path, monkeypatch, no_nvrtc):
    counts = []
    compiler.prebuild_kernels(SCALES, ["sm_80", "sm_86"], tmp_path / "out", lambda *count: counts.append(count))
    assert counts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before = sorted(tmp_path.rglob("*"))
    no_nvrtc()
    monkeypatch.setenv("CUPAGED_KERNELS", str(tmp_path / "out"))
    for arch in ("sm_80", "sm_86"):
        for file, name in SCALES:
            path, symbol = compiler.compile_kernel(file, name, arch)
            assert path.parent == tmp_path / "out" / arch
            assert path.read_bytes().startswith(b"\x7fELF")
            assert symbol.encode() in path.read_bytes()
    assert sorted(tmp_path.rglob("*")) == before


def test_prebuilt_kernels_are_found_in_the_package(sources, no_nvrtc):
    compiler.prebuild_kernels(SCALES, ["sm_80"], prebuilt.PACKAGE_FOLDER)
    no_nvrtc()
    assert compiler.compile_kernel(*SCALES[0], "sm_80")[0].parent == prebuilt.PACKAGE_FOLDER / "sm_80"


def test_what_was_built_ahead_is_kept(sources, tmp_path, monkeypatch):
    compiler.prebuild_kernels(SCALES[:1], ["sm_80"], tmp_path / "out")
    compiled = []
    compile_program = compiler.compile_program
    monkeypatch.setattr(compiler, "compile_program", lambda *what: compiled.append(what) or compile_program(*what))
    compiler.prebuild_kernels(SCALES, ["sm_80"], tmp_path / "out")
    assert compiled == [("scale.cu", ("scale<1>",), "sm_80")]


def test_kernels_built_ahead_from_other_sources_are_not_taken(sources, tmp_path, monkeypatch, no_nvrtc):
    compiler.prebuild_kernels(SCALES, ["sm_80"], tmp_path / "out")
    monkeypatch.setenv("CUPAGED_KERNELS", str(tmp_path / "out"))
    (sources / "inner.cuh").write_text((sources / "inner.cuh").read_text() + "// edited\n")
    forget_sources()
    path, _ = compiler.compile_kernel(*SCALES[0], "sm_80")
    assert path.parent == tmp_path / "cache"
    no_nvrtc()
    with pytest.raises(DeviceError, match=r"^scale.cu: scale<0> was not built ahead for sm_80, and NVRTC can't be"):
        compiler.compile_kernel(*SCALES[0], "sm_80")


def test_a_shipped_kernel_is_found_in_a_process_without_nvrtc(tmp_path):
    kernel = next(pair for pair in instantiations() if pair[0] == "embedding.cu")
    compiler.prebuild_kernels([kernel], ["sm_80"], tmp_path)
    code = f"""
import cuda.pathfinder
def find_nothing(name):
    raise cuda.pathfinder.DynamicLibNotFoundError(name)
cuda.pathfinder.load_nvidia_dynamic_lib = find_nothing
cuda.pathfinder.find_nvidia_header_directory = lambda name: None
from cupaged.kernels.compile import compile_kernel
from cupaged.kernels.device import find_arch
print(compile_kernel(*{kernel}, find_arch(89))[0].parent)
"""
    environment = os.environ | {"CUPAGED_KERNELS": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == f"{tmp_path / 'sm_80'}\n"


def test_an_unknown_architecture_is_refused_before_anything_is_written(sources, tmp_path):
    with pytest.raises(ValueError, match=r"^arch must be one of sm_80, sm_86, .*sm_90a, .*; got 'sm_90'$"):
        compiler.prebuild_kernels(SCALES, ["sm_80", "sm_90"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_for_prebuilt_kernels_that_cannot_be_written_is_named(sources, tmp_path):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    with pytest.raises(CupagedError, match=r"^\S*occupied: can't be written: File exists$"):
        compiler.prebuild_kernels(SCALES, ["sm_80"], tmp_path / "occupied")


def test_a_variable_that_names_no_folder_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPAGED_KERNELS", str(tmp_path / "nothing"))
    with pytest.raises(DeviceError, match=r"^CUPAGED_KERNELS: \S*nothing is no folder"):
        find_arch(80)


# -- the cache on disk ---------------------------------------------------------------------------------------


def test_a_write_that_breaks_off_leaves_no_entry_and_no_litter(tmp_path, monkeypatch):
    cache = KernelCache(tmp_path)

    def interrupted(source, destination):
        raise KeyboardInterrupt

    monkeypatch.setattr("cupaged.kernels.kernel_cache.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.store("key", b"image", "symbol")
    assert cache.find("key") is None
    assert list(tmp_path.iterdir()) == []


def test_readers_never_see_half_an_entry(tmp_path):
    """Two writers with different images for one key: a reader finds nothing or a matching pair."""
    images = {"first": b"1" * 100_000, "second": b"2" * 200_000}
    cache = KernelCache(tmp_path)
    stop = threading.Event()

    def write(symbol):
        while not stop.is_set():
            cache.store("key", images[symbol], symbol)

    writers = [threading.Thread(target=write, args=(symbol,)) for symbol in images]
    for writer in writers:
        writer.start()
    found, deadline = [], time.monotonic() + 60
    while (len(found) < 300 or not any(found)) and time.monotonic() < deadline:
        found.append(KernelCache(tmp_path).find("key"))
    stop.set()
    for writer in writers:
        writer.join()
    assert {symbol for entry in found if entry for symbol in entry[1:]} <= set(images)
    assert any(found)
    cache.store("key", images["first"], "first")
    assert cache.find("key") == (tmp_path / "key", "first")


def test_a_folder_that_cannot_be_written_is_replaced_for_the_process(tmp_path, caplog):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    cache = KernelCache(tmp_path / "occupied" / "kernels")
    path, symbol = cache.store("key", b"image", "symbol")
    assert path.read_bytes() == b"image"
    assert cache.find("key") == (path, symbol)
    cache.store("other", b"image", "symbol")
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert "CUPAGED_HOME" in caplog.text
    del cache
    assert not path.exists()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"CUPAGED_HOME": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/cupaged"),
        ({"HOME": "/h"}, "/h/.cache/cupaged"),
    ],
)
def test_where_the_cache_lies(environment, folder, monkeypatch):
    for name in ("CUPAGED_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(folder)


# -- loading -------------------------------------------------------------------------------------------------


def test_set_loader_replaces_the_loader():
    loaded = []
    launched = []

    def load(file, name):
        loaded.append((file, name))
        return lambda grid, block, args, shared_mem=0: launched.append((grid, block, len(args)))

    previous = compiler._load
    compiler.set_loader(load)
    try:
        embedding = importlib.import_module("cupaged.kernels.embedding").embedding
        embedding(np.empty((3, 8), np.float32), np.empty((5, 8), np.float16), np.zeros(3, np.int32))
    finally:
        compiler.set_loader(previous)
    assert loaded == [("embedding.cu", "embedding<__half, 128>")]
    assert launched == [((3,), (128,), 5)]


def test_kernels_are_compiled_and_loaded_ahead_of_their_launches(sources, monkeypatch):
    set_device_info(DeviceInfo("sm_80", num_sms=108, max_shared_bytes=166912))
    opened = []
    monkeypatch.setattr(compiler, "_loaded", {})
    monkeypatch.setattr(compiler, "_open_image", lambda file, path, symbol: opened.append(symbol) or symbol)
    pairs = [("scale.cu", f"scale<{factor}>") for factor in range(3)]
    try:
        compiler.load_from_cubin(*pairs[0])
        compiler.load_kernels(pairs)
        assert len(set(opened)) == len(opened) == 3
        assert {compiler.load_from_cubin(*pair) for pair in pairs} == set(opened)
    finally:
        set_device_info(None)


# -- the device ----------------------------------------------------------------------------------------------


@pytest.fixture
def nvrtc_knows(monkeypatch):
    class Nvrtc:
        def getSupportedArchs(self):
            return 75, 80, 86, 89, 90, 100, 120

    monkeypatch.setattr(device, "load_nvrtc", Nvrtc)


@pytest.mark.parametrize(
    ("compute_capability", "arch"),
    [
        (80, "sm_80"),
        (86, "sm_86"),
        (87, "sm_86"),  # unknown to this NVRTC: the nearest older one of the generation
        (90, "sm_90a"),
        (103, "sm_100"),
        (110, "compute_100"),
        (120, "sm_120"),
        (130, "compute_120"),
    ],
)
def test_the_architecture_follows_the_device_and_nvrtc(compute_capability, arch, nvrtc_knows):
    assert find_arch(compute_capability) == arch


@pytest.mark.parametrize(
    ("compute_capability", "arch"),
    [
        (80, "sm_80"),
        (89, "sm_86"),  # though NVRTC could compile for sm_89
        (90, "sm_90a"),
        (92, "compute_90"),  # sm_90a runs on 9.0 only
        (100, "sm_100"),
    ],
)
def test_the_architecture_is_one_that_kernels_were_built_for_ahead(compute_capability, arch, nvrtc_knows):
    for built in ("sm_80", "sm_86", "sm_90a"):
        (prebuilt.PACKAGE_FOLDER / built).mkdir(parents=True)
    assert find_arch(compute_capability) == arch


def test_without_nvrtc_there_must_be_kernels_for_the_device(no_nvrtc):
    no_nvrtc()
    with pytest.raises(DeviceError, match=r"^NVRTC can't be loaded"):
        find_arch(80)
    for built in ("sm_86", "sm_90a"):
        (prebuilt.PACKAGE_FOLDER / built).mkdir(parents=True)
    assert find_arch(89) == "sm_86"
    with pytest.raises(DeviceError, match=r"^kernels were built ahead for sm_86, sm_90a only, and NVRTC can't"):
        find_arch(80)


def test_a_device_that_is_too_old_is_named():
    with pytest.raises(DeviceError, match=r"7\.5.*8\.0"):
        find_arch(75)


def test_a_device_can_be_stood_in_for():
    h100 = DeviceInfo(arch="sm_90a", num_sms=132, max_shared_bytes=232448)
    set_device_info(h100)
    try:
        assert device_info() is h100
    finally:
        set_device_info(None)
