"""The host build itself: that it computes what a GPU computes, and finds what it is there to find."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from cupaged.kernels.checks import BFLOAT16, C_TYPE, FLOAT16
from cupaged.kernels.compile import NULL
from cupaged.kernels.divisor import divisor
from host.build import HOST_DIR, HostKernelError, HostLoader, encode_tensor_map, find_compiler, known_flags
from kernel_tools import IMPOSSIBLE_BLOCK_ID, HostRunner, PagedCache, assert_close, is_poison, poisoned

CASES = HOST_DIR / "cases.cu"
LANES = np.arange(32)


@pytest.fixture
def load(compiler):
    """The kernel of cases.cu with this name."""
    loader = HostLoader(HOST_DIR)
    return lambda name: loader("cases.cu", name)


# -- what must work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 8, 2])
@pytest.mark.parametrize("operand", [0, 1, 3, 5, 17])
def test_shuffles(load, width, operand):
    out = np.zeros((4, 32), np.int32)
    load(f"shuffles<{width}>")((1,), (32,), (out, np.int32(operand)))

    first = LANES // width * width
    index = first + operand % width
    xor = np.where((LANES ^ operand) < first + width, LANES ^ operand, LANES)
    up = np.where(LANES - operand >= first, LANES - operand, LANES)
    down = np.where(LANES + operand < first + width, LANES + operand, LANES)
    np.testing.assert_array_equal(out, 100 + np.stack([index, xor, up, down]))


def test_shuffles_of_half_a_warp_and_of_other_widths(load):
    halves, wide = np.zeros(16, np.float16), np.zeros(16, np.int64)
    load("shuffle_halves")((1,), (32,), (halves, wide))
    np.testing.assert_array_equal(halves, 15 - np.arange(16))
    np.testing.assert_array_equal(wide, 16 * 10000000000)


@pytest.mark.parametrize("yes", [[], [3], [*range(8)], [*range(32)], [0, 9, 31]])
def test_votes(load, yes):
    predicate = np.isin(LANES, yes).astype(np.int32)
    out = np.zeros((32, 4), np.uint32)
    load("votes")((1,), (32,), (out, predicate))
    for lane in LANES:
        group = predicate[:8] if lane < 8 else predicate[8:]
        total = sum(range(8)) if lane < 8 else sum(range(8, 32))
        assert list(out[lane]) == [sum(1 << i for i in yes), group.any(), group.all(), total]


@pytest.mark.parametrize("count", [0, 1, 95, 96])
def test_barrier_reductions(load, count):
    predicate = (np.arange(96) < count).astype(np.int32) * 5
    out = np.zeros((96, 3), np.int32)
    load("barrier_reductions")((1,), (96,), (out, predicate))
    np.testing.assert_array_equal(out, np.broadcast_to([count > 0, count == 96, count], (96, 3)))


@pytest.mark.parametrize("num_warps", [1, 4, 32])
def test_sums_over_a_thread_block(load, num_warps, rng):
    x = rng.integers(-100, 100, num_warps * 32).astype(np.float32)
    out = poisoned(x.shape, np.float32)
    load(f"block_sums<{num_warps}>")((1,), x.shape, (out, x), shared_mem=x.nbytes)
    np.testing.assert_array_equal(out, x.sum())


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_mma(load, dtype, rng):
    a, b = rng.standard_normal((16, 16)).astype(dtype), rng.standard_normal((16, 8)).astype(dtype)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    expected = d + a.astype(np.float64) @ b.astype(np.float64)
    load(f"mma<{C_TYPE[dtype]}>")((1,), (32,), (d, a, b))
    assert_close(d, expected, rtol=2.0**-24)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_the_fragments_of_mma(load, dtype, transposed, rng):
    a, b = rng.standard_normal((16, 16)).astype(dtype), rng.standard_normal((16, 8)).astype(dtype)
    d = poisoned((16, 8), np.float32)
    stored = b if transposed else np.ascontiguousarray(b.T)
    load(f"ldmatrix_mma<{C_TYPE[dtype]}, {str(transposed).lower()}>")((1,), (32,), (d, a, stored))
    assert_close(d, a.astype(np.float64) @ b.astype(np.float64), rtol=2.0**-24)


def test_movmatrix_transposes(load):
    x = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = np.zeros_like(x)
    load("transpose")((1,), (32,), (out, x))
    assert np.array_equal(out, x.T)


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 7])
def test_asynchronous_copies(load, num_tiles, rng):
    x = rng.standard_normal((num_tiles, 128)).astype(np.float32)
    x = x.reshape(-1)[:-4].copy()  # the last copy must be off
    out = poisoned((num_tiles, 128), np.float32)
    load("pipeline<3, 2, true>")((1,), (32,), (out, x, np.int32(num_tiles), np.int32(x.size)))
    np.testing.assert_array_equal(out.reshape(-1), np.append(x, np.zeros(4, np.float32)) + 1)


def test_an_asynchronous_copy_reads_its_source_at_the_wait(load):
    out, x = np.zeros(1, np.float32), np.ones(4, np.float32)
    load("late_copy")((1,), (1,), (out, x))
    assert out == 7


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize(("rows", "k"), [(128, 64), (100, 40)])  # (100, 40): boxes reach over both edges
def test_tensor_copies_bring_what_wgmma_wants(load, dtype, rows, k, rng):
    a, b = rng.standard_normal((64, k)).astype(dtype), rng.standard_normal((rows, k)).astype(dtype)
    d = poisoned((64, 128), np.float32)
    maps = (encode_tensor_map(x.ctypes.data, *x.shape, dtype, box, 256) for x, box in ((a, 64), (b, 128)))
    load(f"tensor_product<{C_TYPE[dtype]}>")((1,), (128,), (d, *maps), shared_mem=1024 + 192 * 128 + 8)
    expected = np.zeros((64, 128))
    expected[:, :rows] = a.astype(np.float64) @ b.astype(np.float64).T
    assert_close(d, expected, rtol=4 * 2.0**-24, atol=1e-5)


def run_engine_ring(compiler, fault, seed):
    x, out = np.arange(5 * 64, dtype=np.float32), poisoned(5 * 64, np.float32)
    kernel = HostLoader(HOST_DIR, seed)("cases.cu", f"engine_ring<EngineFault::{fault}>")
    kernel((1,), (64,), (out, x, np.int32(5)), shared_mem=2 * 256 + 32)
    return out


@pytest.mark.parametrize("seed", range(8))
def test_a_ring_filled_by_the_copy_engine(compiler, seed):
    np.testing.assert_array_equal(run_engine_ring(compiler, "kNone", seed), np.arange(5 * 64) + 1)


@pytest.mark.watcher
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kNoWait", "is the destination of a copy by thread number 0 that has not landed|copy overwrites"),
        ("kNoWaitForEmpty", "all arrivals of this phase have come|the copy overwrites byte .* another has not landed"),
        ("kArrivesEarly", "which warp 1 has read and not arrived anywhere since|a copy by .* that has not landed"),
        ("kNeverReads", "nobody is left to complete the phase"),
        ("kBytesMissing", "nobody is left to complete the phase"),
    ],
)
def test_a_wrong_ring_filled_by_the_copy_engine_is_found(compiler, fault, message, seed):
    with pytest.raises(HostKernelError, match=message):
        run_engine_ring(compiler, fault, seed)


def run_warp_turns(compiler, fault, seed):
    out, count = np.full(8, -1, np.int32), np.zeros(1, np.int32)
    kernel = HostLoader(HOST_DIR, seed)("cases.cu", f"warp_turns<TurnFault::{fault}>")
    kernel((1,), (64,), (out, count, np.int32(4)))
    return out.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_warps_take_turns_at_numbered_barriers(compiler, seed):
    assert run_warp_turns(compiler, "kNone", seed) == [0, 1] * 4


@pytest.mark.watcher
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kNoPass", "bar_sync: nobody is left to complete the phase"),
        ("kNoEnd", "one of its numbered barriers still waits for threads"),
        ("kOtherCount", "barrier 2: is for (64|96) threads this time; got (96|64)"),
    ],
)
def test_wrong_turns_are_found(compiler, fault, message):
    with pytest.raises(HostKernelError, match=message):
        run_warp_turns(compiler, fault, 1)


def run_shift_rows(compiler, fault, seed):
    x = np.arange(256, dtype=np.int32).reshape(4, 64)
    out = np.full_like(x, -1)
    kernel = HostLoader(HOST_DIR, seed)("cases.cu", f"shift_rows<MeetingFault::{fault}>")
    kernel((1,), (96,), (out, x, np.int32(4)))
    np.testing.assert_array_equal(out, np.roll(x, -1, axis=1))


@pytest.mark.parametrize("seed", range(4))
def test_what_was_written_before_a_numbered_barrier_is_read_after_it(compiler, seed):
    run_shift_rows(compiler, "kNone", seed)


@pytest.mark.watcher
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", ["kNotBeforeReads", "kNotBeforeWrites"])
def test_a_numbered_barrier_that_is_missing_is_found(compiler, fault, seed):
    with pytest.raises(HostKernelError, match=r"race: (reads|writes) byte .* with no barrier between"):
        run_shift_rows(compiler, fault, seed)


@pytest.mark.parametrize("value", [1, 2, 3, 4, 7, 131, 132, 4095, 4096, 65537, 2**30, 2**31 - 1])
def test_divisors(load, rng, value):
    multiples = np.arange(0, 2**31, value * max(1, 2**31 // value // 1000), np.int64)
    x = np.concatenate([multiples - 1, multiples, multiples + 1, rng.integers(0, 2**31, 1000), [2**31 - 1]])
    x = x[(x >= 0) & (x < 2**31)].astype(np.int32)
    out = np.full((2, x.size), -1, np.int32)
    load("divide")((-(-x.size // 128),), (128,), (out, x, divisor(value), np.int32(x.size)))
    np.testing.assert_array_equal(out, np.divmod(x.astype(np.int64), value))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_all_sixteen_bit_values_become_the_right_floats(load, dtype):
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    out = poisoned(x.shape, np.float32)
    load(f"to_floats<{C_TYPE[dtype]}>")((64,), (1024,), (out, x))
    expected = x.astype(np.float32)
    assert np.isnan(expected).sum() > 100
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_floats_are_rounded_to_nearest_even(load, dtype, rng):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    with np.errstate(over="ignore", invalid="ignore"):
        above = np.nextafter(every.astype(dtype), dtype.type(np.inf)).astype(np.float32)
        middle = (every.astype(np.float64) + above) / 2  # ties, and their neighbours on both sides
        middle = middle[np.isfinite(middle)].astype(np.float32)
    near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    anything = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65519.99, 65520, -65520, 3.4e38, 1e-45], np.float32)
    x = np.concatenate([every, middle, *near, anything, special])
    x = np.append(x, np.zeros(-x.size % 1024, np.float32))
    out = np.zeros(x.shape, dtype)
    load(f"from_floats<{C_TYPE[dtype]}>")((x.size // 1024,), (1024,), (out, x))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(out), nan)
    np.testing.assert_array_equal(out.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_arithmetic_rounds_once(load, dtype, rng):
    x, y = (rng.standard_normal(256).astype(dtype) for _ in range(2))
    out = np.zeros((256, 4), dtype)
    load(f"arithmetic<{C_TYPE[dtype]}>")((2,), (128,), (out, x, y))
    x, y = x.astype(np.float32), y.astype(np.float32)
    np.testing.assert_array_equal(out, np.stack([x + y, x - y, x * y, x / y], axis=1).astype(dtype))


def test_integer_intrinsics(load):
    a, b, c, d = 0xDEADBEE0, 0xCAFEF00D, 0xFEDCBA9876543210, 0x123456789ABCDEF1
    out = np.zeros(10, np.uint64)
    load("integer_intrinsics")((1,), (1,), (out, np.uint32(a), np.uint32(b), np.uint64(c), np.uint64(d)))
    reversed_bits = int(f"{a:032b}"[::-1], 2)
    expected = [a * b >> 32, c * d >> 64, a.bit_count(), 0, 6, reversed_bits, 2**32 - 1, 2**32 - 2, 2, 1]
    assert [int(x) for x in out] == expected


def test_seeds_shuffle_thread_blocks_and_warps(compiler):
    def tickets(seed):
        blocks, warps = np.full(50, -1, np.int32), np.full(8, -1, np.int32)
        HostLoader(HOST_DIR, seed)("cases.cu", "order")((50,), (256,), (blocks, warps, np.zeros(2, np.int32)))
        assert sorted(blocks) == list(range(50))
        assert sorted(warps) == list(range(8))
        return [*blocks, *warps]

    assert tickets(0) == [*range(50), *range(8)]
    assert tickets(1) != tickets(0)
    assert tickets(1) == tickets(1)
    assert tickets(2) != tickets(1)


# -- what must be found ---------------------------------------------------------------------------------------

FAULTS = {
    "kNoBarrier": r"race: writes byte \d+ of static shared memory, which thread number 31 read with no",
    "kNoSyncwarp": r"race: writes byte \d+ of static shared memory, which thread number 0 read with no",
    "kShuffleOrders": r"race: reads .* which thread number \d+ wrote with no barrier between",
    "kOverwrite": r"race: reads byte \d+ of static shared memory, which thread number 31 wrote with no",
    "kBothWrite": r"race: writes byte \d+ of static shared memory, which thread number 0 wrote with no",
    "kBarrierInBranch": r"__syncthreads is not reached by all threads of the block: thread \(32, 0, 0\) has exited",
    "kBarrierAfterExit": r"__syncthreads is not reached by all threads of the block: thread \(32, 0, 0\) has exited",
    "kTwoBarriers": r"__syncthreads is not reached by all .*: thread \(32, 0, 0\) waits in __syncthreads at .*cases.cu",
    "kShuffleInBranch": r"__shfl_xor_sync with mask 0xffffffff, but lane 1 of the warp does not take part: .*exited",
    "kShuffleAfterExit": r"__shfl_xor_sync with mask 0xffffffff, but lane 5 of the warp does not take part: .*exited",
    "kNotInMask": r"lane 31 calls __shfl_sync with mask 0x7fffffff, in which it is not",
    "kSourceNotInMask": r"lane 0 reads lane 20 by __shfl_sync, which is not in mask 0x0000ffff",
    "kSyncwarpInBranch": r"__syncwarp with mask 0xffffffff, but lane 16 of the warp does not take part",
    "kMmaInBranch": r"mma_m16n8k16 with mask 0xffffffff, but lane 31 of the warp does not take part",
    "kReadPastEnd": r"reads 4 bytes at offset 256 of argument 1, float32\(64,\), which has 256 bytes",
    "kReadBeforeStart": r"reads 4 bytes, 4 bytes before the start of argument 1",
    "kWritePastEnd": r"writes 4 bytes at offset 256 of argument 0",
    "kWriteConst": r"writes 4 bytes to argument 1, float32\(64,\), which is read-only",
    "kDynamicPastEnd": r"writes 4 bytes at offset 256 of dynamic shared memory, which has 256 bytes",
    "kStaticPastEnd": r"undefined behaviour: index outside of an array",
    "kLocalPastEnd": r"undefined behaviour: index outside of an array",
    "kCopyPastEnd": r"reads 16 bytes at offset 256 of argument 1",
    "kCopyMisaligned": r"cp.async: the source is not 16-byte aligned",
    "kMisaligned": r"undefined behaviour: null or misaligned pointer",
    "kNullPointer": r"undefined behaviour: null or misaligned pointer",
    "kOverflow": r"undefined behaviour: signed multiplication overflows",
    "kShift": r"undefined behaviour: shift by",
    "kAtomicPastEnd": r"writes 4 bytes at offset 256 of argument 0",
    "kWild": r"reads 4 bytes at 0x10000, far from every array of the launch",
}


def run_faulty(load, fault):
    args = poisoned(64, np.float32), np.arange(64, dtype=np.float32), np.int32(64), np.uint64(1 << 16)
    load(f"faulty<Fault::{fault}>")((2,), (64,), args, shared_mem=256)
    return args[0]


@pytest.mark.watcher
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(load, fault):
    with pytest.raises(HostKernelError, match=FAULTS[fault]) as caught:
        run_faulty(load, fault)
    assert re.search(r"\[block \(0, 0, 0\), thread \(\d+, 0, 0\)\]", str(caught.value))
    first_line = CASES.read_text().splitlines().index("enum class Fault {")
    lines = [int(number) for number in re.findall(r"cases\.cu:(\d+)", str(caught.value))]
    assert lines
    assert min(lines) > first_line
    np.testing.assert_array_equal(run_faulty(load, "kNone"), np.arange(64)[::-1])  # and the next launch is fine


def test_every_fault_in_the_cases_is_expected_here():
    names = re.search(r"enum class Fault \{(.*?)\};", CASES.read_text(), re.DOTALL)[1]
    assert set(re.findall(r"\bk[A-Z]\w+(?=,)", names)) == {*FAULTS, "kNone"}


@pytest.mark.watcher
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            "3, 3, true",
            r"is the destination of a cp.async by thread number 1 that no cp_async_wait_group has waited for",
        ),
        ("3, 2, false", r"race: writes byte \d+ of static shared memory, which thread number \d+ read"),
    ],
)
def test_a_pipeline_with_a_wrong_wait_or_no_barrier_is_found(load, variant, message):
    x, out = np.zeros(5 * 128, np.float32), np.zeros(5 * 128, np.float32)
    with pytest.raises(HostKernelError, match=message):
        load(f"pipeline<{variant}>")((1,), (32,), (out, x, np.int32(5), np.int32(x.size)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kReadPastEnd", "heap-buffer-overflow"),
        ("kWritePastEnd", "heap-buffer-overflow"),
        ("kDynamicPastEnd", "use-after-poison"),
    ],
)
def test_under_libasan_it_is_libasan_that_finds_what_is_out_of_bounds(compiler, fault, message):
    command = [compiler, "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(library) or "clang" in compiler:
        pytest.skip("needs g++ with its AddressSanitizer library")
    code = f"""
import sys
sys.path.insert(0, {str(HOST_DIR.parent)!r})
import numpy as np
from host.build import HOST_DIR, HostLoader
args = np.zeros(64, np.float32), np.zeros(64, np.float32), np.int32(64), np.uint64(0)
for fault in ("kNone", {fault!r}):
    print(fault, flush=True)
    HostLoader(HOST_DIR)("cases.cu", f"faulty<Fault::{{fault}}>")((1,), (64,), args, shared_mem=256)
"""
    environment = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0
    assert result.stdout.split() == ["kNone", fault]
    assert f"AddressSanitizer: {message}" in result.stderr


def test_what_nobody_wrote_is_visible(load):
    out = np.zeros(3, np.float32)
    load("uninitialised")((1,), (1,), (out, np.int32(3)), shared_mem=16)
    assert np.isnan(out[:2]).all()
    if "-ftrivial-auto-var-init=pattern" in known_flags(find_compiler()):  # g++ 12, clang 8
        assert not abs(out[2]) < 1e30  # or NaN


# -- arguments and launches -----------------------------------------------------------------------------------

PAIR = np.dtype([("first", np.float32), ("second", np.float32)])


def everything(**changes):
    args = dict(out=np.zeros(1, np.float32), x=np.ones(1, np.float16), i=np.int32(1), l=np.int64(1), f=np.float32(1))
    args |= dict(pair=np.array((1, 1), PAIR), any=np.zeros(3, np.int8))
    return tuple((args | changes).values())


def test_arguments_of_every_kind(load):
    args = everything()
    load("takes_everything")((1,), (1,), args)
    assert args[0] == 7
    args = everything(any=NULL)
    load("takes_everything")((1,), (1,), args)
    assert args[0] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(i=1), "argument 2: int has no fixed size"),
        (dict(i=np.int64(1)), "argument 2: expected an integer of 4 bytes, got int64"),
        (dict(i=np.float32(1)), "argument 2: expected an integer of 4 bytes, got float32"),
        (dict(f=np.float64(1)), "argument 4: expected a float of 4 bytes, got float64"),
        (dict(x=np.ones(1, np.float32)), "argument 1 points to elements of 2 bytes, got an array float32"),
        (dict(x=np.ones((2, 2), np.float16).T), "argument 1: array float16.* is not C-contiguous"),
        (dict(i=np.zeros(1, np.int32)), "argument 2 is not a pointer"),
        (dict(pair=np.float32(1)), "argument 5: expected a struct of 8 bytes, got float32"),
        (dict(any=np.uint64(1 << 40)), "argument 6: an address as a number"),
        (dict(more=np.int32(0)), "takes 7 arguments, got 8"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(load, changes, message):
    with pytest.raises(HostKernelError, match=message):
        load("takes_everything")((1,), (1,), everything(**changes))


@pytest.mark.parametrize(
    ("grid", "block", "shared_mem", "message"),
    [
        ((1,), (1025,), 0, "a thread block of"),
        ((1,), (0,), 0, "a thread block of"),
        ((0,), (1,), 0, "a grid of"),
        ((1, 65536), (1,), 0, "a grid of"),
        ((1,), (1,), 228 << 10, "bytes of shared memory"),
    ],
)
def test_launches_that_a_gpu_refuses_are_refused(load, grid, block, shared_mem, message):
    with pytest.raises(HostKernelError, match=message):
        load("takes_everything")(grid, block, everything(), shared_mem)


def test_a_source_that_does_not_compile_is_reported(compiler, tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void broken(float* out) { out[0] = nothing; }")
    with pytest.raises(RuntimeError, match=r"(?s)broken doesn't compile.*nothing"):
        HostLoader(tmp_path)("broken.cu", "broken")


# -- kernel_tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ([1, 2.1, 3], r"worst at \(1,\): 2.1"),
        ([1, np.nan, 3], r"NaN in 1 places, expected in 0"),
        ([1, np.inf, 3], r"inf in 1 places"),
        ([1, 2], r"shape \(2,\), expected \(3,\)"),
    ],
)
def test_assert_close_refuses(actual, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(np.array(actual), np.array([1.0, 2, 3]), rtol=0.01)


def test_assert_close_takes_what_is_within_the_bound():
    assert_close(np.array([1, 2.01, np.nan, -np.inf]), np.array([1, 2, np.nan, -np.inf]), rtol=0.01)
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_close(np.zeros(0), np.zeros(0))


def test_paged_cache_shuffles_and_poisons(rng):
    runner = HostRunner(HostLoader())
    seq_lens = [0, 1, 15, 16, 17, 100]
    cache = PagedCache(runner, rng, seq_lens, num_kv_heads=2, head_dim=8, dtype=ml_dtypes.bfloat16)
    tables = runner.host(cache.block_tables)
    used = tables[tables != IMPOSSIBLE_BLOCK_ID]
    assert len(set(used)) == len(used) == sum(-(-n // 16) for n in seq_lens)
    assert used.max() < cache.arena.num_blocks
    assert not np.array_equal(used, np.sort(used))
    assert len({block >> cache.arena.layout.slab_shift for block in used}) >= 2
    assert (tables[:, -1] == IMPOSSIBLE_BLOCK_ID).all()
    for seq in range(len(seq_lens)):
        keys, values = cache.read(cache.slots(seq))
        np.testing.assert_array_equal(keys, cache.keys[seq])
        np.testing.assert_array_equal(values, cache.values[seq])
    all_slots = np.concatenate([cache.slots(seq) for seq in range(len(seq_lens))])
    assert cache.unused_is_poison(all_slots)
    assert not cache.unused_is_poison(all_slots[:-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_poison_is_nan(dtype):
    array = poisoned((3, 4), dtype)
    assert np.isnan(array).all()
    array[1, 2] = 0
    assert is_poison(array).sum() == 11
