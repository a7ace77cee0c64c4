"""What kernel tests share: where kernels run, data that shows mistakes, and the comparison with a reference.

def test_rms_norm(runner, rng):                       # runs on the CPU, and on a GPU where there is one
    x = rng.standard_normal((3, 64)).astype(dtype)
    out = runner.array(poisoned((3, 64), dtype))      # NaN everywhere: an unwritten element cannot pass
    rms_norm(out, runner.array(x), ...)
    assert_close(runner.host(out), expected, rtol=..., atol=...)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32
from cupaged.kernels.paged_kv import CHUNK_SIZE, chunk_places
from cupaged.memory.arena import KVArena, KVLayout
from host.build import HostLoader

FLOAT_DTYPES = (BFLOAT16, FLOAT16, FLOAT32)

# The largest relative error of one rounding to nearest, and the spacing of what is near 0.
UNIT_ROUNDOFF = {BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11, FLOAT32: 2.0**-24}
SMALLEST_SUBNORMAL = {BFLOAT16: 2.0**-133, FLOAT16: 2.0**-24, FLOAT32: 2.0**-149}

# In a block table where no block belongs: a kernel that follows it reads out of bounds.
IMPOSSIBLE_BLOCK_ID = 0x7FFFFFFF


# -- where kernels run ----------------------------------------------------------------------------------------


class HostRunner:
    """Kernels on the CPU, over NumPy arrays. A kernel may touch the arrays of its launch and those made here.

    A runner is also the backend that KVArena needs: empty, copy_in, address.
    """

    def __init__(self, loader: HostLoader):
        self.loader = loader

    def array(self, values: np.ndarray) -> np.ndarray:
        """A copy of the values, as an array that launchers take."""
        array = np.array(values, order="C")
        self.loader.allow(array)
        return array

    def zeros(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """Zeros that take up memory only where they are written to, for arrays of gigabytes."""
        array = np.zeros(shape, dtype)
        self.loader.allow(array)
        return array

    def host(self, array: np.ndarray) -> np.ndarray:
        """What the array holds now, as a NumPy array."""
        return array.copy()

    def empty(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array of NaN, or of -1 or the largest number where dtype has no NaN."""
        return self.array(poisoned(shape, dtype))

    def empty_host(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """The same, in host memory that kernels can address."""
        return self.empty(shape, dtype)

    def copy_in(self, dst: np.ndarray, src: np.ndarray) -> None:
        np.copyto(dst, src)

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data


class GpuRunner:
    """The same over CuPy arrays, on the current device."""

    def array(self, values: np.ndarray):
        import cupy

        return cupy.asarray(np.ascontiguousarray(values))

    def zeros(self, shape: tuple[int, ...], dtype):
        import cupy

        return cupy.zeros(shape, dtype)

    def host(self, array) -> np.ndarray:
        if isinstance(array, np.ndarray):  # from empty_host
            import cupy

            cupy.cuda.Device().synchronize()
            return array.copy()
        return array.get()

    def empty(self, shape: tuple[int, ...], dtype):
        return self.array(poisoned(shape, dtype))

    def empty_host(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        from cupaged.backends.cuda import CupyDevice

        array = poisoned(shape, dtype)
        pinned = CupyDevice().pinned(array.nbytes).view(dtype).reshape(shape)
        pinned[...] = array
        return pinned

    def copy_in(self, dst, src: np.ndarray) -> None:
        if isinstance(dst, np.ndarray):
            np.copyto(dst, src)
        else:
            dst.set(src)

    def address(self, array) -> int:
        return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


# -- data -----------------------------------------------------------------------------------------------------


def poisoned(shape: tuple[int, ...] | int, dtype) -> np.ndarray:
    """An array that nobody has written to: every byte is 0xFF, which is NaN in all floating-point types."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


def is_poison(array: np.ndarray) -> np.ndarray:
    """Where an array from `poisoned` has not been written to since: a bool array of its shape."""
    array = np.ascontiguousarray(array)
    return (array.reshape(-1).view(np.uint8).reshape(*array.shape, array.itemsize) == 0xFF).all(axis=-1)


def plain_rows(stored: np.ndarray) -> np.ndarray:
    """Blocks [..., block_size, head_dim] as kernels store them, with their rows in plain order."""
    chunks = stored.reshape(*stored.shape[:-2], -1, CHUNK_SIZE)
    return chunks[..., chunk_places(*stored.shape[-2:]), :].reshape(stored.shape)


def stored_rows(plain: np.ndarray) -> np.ndarray:
    """Blocks [..., block_size, head_dim] of plain rows as kernels store them."""
    places = chunk_places(*plain.shape[-2:])
    chunks = np.empty((*plain.shape[:-2], places.size, CHUNK_SIZE), plain.dtype)
    chunks[..., places, :] = plain.reshape(*plain.shape[:-2], *places.shape, CHUNK_SIZE)
    return chunks.reshape(plain.shape)


class PagedCache:
    """A small KVArena with sequences in it, laid out to show mistakes: blocks shuffled over all slabs, NaN in every
    slot and layer that is not used, IMPOSSIBLE_BLOCK_ID in the tables where a sequence has no more blocks.

    arena: the KVArena, of two layers at least; `layer` is the one in use.
    block_tables: [num_seqs, longest table + 1] int32, the runner's array.
    keys, values: one NumPy array [seq_len, num_kv_heads, head_dim] a sequence; what the cache holds.
    """

    def __init__(
        self,
        runner,
        rng: np.random.Generator,
        seq_lens: Sequence[int],
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype,
        block_size: int = 16,
        layer: int = 1,
        filled: bool = True,
    ):
        """filled: write random keys and values; otherwise all slots are NaN and keys and values are empty lists."""
        self.layer = layer
        self.seq_lens = list(seq_lens)
        self._runner = runner
        num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
        blocks_per_slab = 1 << max(0, (sum(num_blocks) + 1).bit_length() - 2)  # two or three slabs hold them all
        layout = KVLayout(layer + 1, num_kv_heads, block_size, head_dim, np.dtype(dtype), blocks_per_slab)
        self.arena = KVArena(layout, runner, 4 * blocks_per_slab)
        while self.arena.num_blocks < sum(num_blocks) + 1 or len(self.arena.slabs) < 2:  # one is free at least
            assert self.arena.grow()
        block_ids = iter(rng.permutation(self.arena.num_blocks))
        self._tables = np.full((len(seq_lens), max(num_blocks, default=0) + 1), IMPOSSIBLE_BLOCK_ID, np.int32)
        for table, count in zip(self._tables, num_blocks, strict=True):
            table[:count] = [next(block_ids) for _ in range(count)]
        self.block_tables = runner.array(self._tables)
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        if filled:
            self._fill(rng)

    def slots(self, seq: int) -> np.ndarray:
        """The slot of each token of a sequence: [seq_len] int32, what a slot_mapping holds."""
        block_size = self.arena.layout.block_size
        positions = np.arange(self.seq_lens[seq])
        return (self._tables[seq, positions // block_size] * block_size + positions % block_size).astype(np.int32)

    def read(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(keys, values) that the arena holds in these slots now, each [num_slots, num_kv_heads, head_dim]."""
        block_size = self.arena.layout.block_size
        blocks = self._blocks()[self.layer][:, slots // block_size, :, slots % block_size]  # [num_slots, 2, heads, dim]
        return blocks[:, 0], blocks[:, 1]

    def unused_is_poison(self, slots: np.ndarray) -> bool:
        """Whether every slot but these, and every other layer, is as it was: NaN."""
        poison = is_poison(self._blocks())
        block_size = self.arena.layout.block_size
        poison[self.layer][:, slots // block_size, :, slots % block_size] = True
        return bool(poison.all())

    def _blocks(self) -> np.ndarray:
        """[num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim], all slabs side by side, their rows plain."""
        return plain_rows(np.concatenate([self._runner.host(slab) for slab in self.arena.slabs], axis=2))

    def _fill(self, rng: np.random.Generator) -> None:
        layout = self.arena.layout
        blocks = self._blocks()
        for seq, seq_len in enumerate(self.seq_lens):
            parts = rng.standard_normal((2, seq_len, layout.num_kv_heads, layout.head_dim)).astype(layout.dtype)
            if seq_len:
                parts[0, seq_len // 2] *= 4  # one loud key, so that its weight in the softmax shows
                parts[1, -1] *= 4
            self.keys.append(parts[0])
            self.values.append(parts[1])
            slots = self.slots(seq)
            place = slots // layout.block_size, slice(None), slots % layout.block_size
            blocks[self.layer, 0][place] = parts[0]
            blocks[self.layer, 1][place] = parts[1]
        self._write(blocks)

    def forget(self, slots: np.ndarray) -> None:
        """Let these slots hold NaN."""
        blocks, block_size = self._blocks(), self.arena.layout.block_size
        blocks[self.layer][:, slots // block_size, :, slots % block_size] = poisoned((), blocks.dtype)
        self._write(blocks)

    def _write(self, blocks: np.ndarray) -> None:
        parts = np.split(stored_rows(blocks), len(self.arena.slabs), axis=2)
        for slab, part in zip(self.arena.slabs, parts, strict=True):
            self._runner.copy_in(slab, np.ascontiguousarray(part))


# -- comparison -----------------------------------------------------------------------------------------------


def assert_close(actual: np.ndarray, expected: np.ndarray, *, rtol=0.0, atol=0.0) -> None:
    """Assert |actual - expected| <= atol + rtol * |expected| everywhere, NaN and infinities in the same places.

    expected: the reference, in float64 as a rule. rtol, atol: numbers, or arrays that broadcast to the shape.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert actual.size, "nothing to compare"
    kind = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    for what, test in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        have, want = (test(values) for values in kind)
        if not np.array_equal(have, want):
            index = _index(have != want)
            raise AssertionError(
                f"{what} in {have.sum()} places, expected in {want.sum()}; first difference at {index}: "
                f"{actual[index]}, expected {expected[index]}"
            )
    finite = np.isfinite(kind[1])
    error = np.abs(np.where(finite, kind[0], 0) - np.where(finite, kind[1], 0))
    bound = np.broadcast_to(atol + rtol * np.abs(np.where(finite, kind[1], 0)), error.shape)
    if np.all(error <= bound):
        return
    excess = np.where(error <= bound, 0, error / np.maximum(bound, np.finfo(np.float64).tiny))
    index = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
    index = tuple(int(i) for i in index)
    raise AssertionError(
        f"{np.sum(~(error <= bound))} of {error.size} elements differ too much; worst at {index}: {actual[index]}, "
        f"expected {expected[index]}, error {error[index]:.3g}, bound {bound[index]:.3g}"
    )


def _index(mask: np.ndarray) -> tuple[int, ...]:
    """Where the first True is."""
    return tuple(int(i) for i in np.argwhere(mask)[0])
