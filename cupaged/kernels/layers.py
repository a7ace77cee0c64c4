"""Launches of a model's layers, of which the first one's are made by the launchers, and the others' after them.

    rms_norm(x, residual, layers[0].input_norm)  --noted-->  (kernel, grid, block, args)
    the same with layers[1].input_norm, layers[2].input_norm ...  one call of the driver each

A launcher checks its arrays, chooses a kernel and packs its arguments: 20 us of Python and more. Layers differ in the
addresses of their weights and in their place in the cache only, so that for all but the first it is enough to put these
into the arguments: 2 us.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupaged.kernels.compile import Launch
from cupaged.kernels.launch import check_status
from cupaged.kernels.paged_kv import paged_kv
from cupaged.memory.arena import KVArena

Array = Any


class ByLayer(NamedTuple):
    """An argument that each layer has its own of. words: of its 8-byte words that differ, the index, and the values."""

    arguments: Sequence[Array]
    words: list[tuple[int, list[int]]]


class Layers:
    """weights: of each layer an object whose attributes are arrays or None, as models.parameters.LayerWeights. These
    stay where they are from now on. address: of an array."""

    def __init__(self, weights: Sequence[Any], address):
        self.weights = weights
        columns = list(zip(*(vars(layer).values() for layer in weights), strict=True))
        arrays = [column for column in columns if any(array is not None for array in column)]
        self.are_alike = all(_are_alike(column, address) for column in arrays)
        self._places: list[tuple[int, int, int, ByLayer]] = []  # (address, bytes, layer, the argument), by address
        if not self.are_alike:
            return
        for column in arrays:
            addresses = [address(array) for array in column]
            by_layer = ByLayer(column, [(0, addresses)])
            self._places += [(start, column[0].nbytes, i, by_layer) for i, start in enumerate(addresses)]
        self._places.sort(key=lambda place: place[:3])
        self._starts = [place[0] for place in self._places]
        self._address = address
        self._cache: tuple[KVArena, ByLayer] | None = None

    def launch_others(self, launches: Sequence[Launch], arena: KVArena) -> bool:
        """Launch for each layer but the first what was launched for that, in the same order.

        arena: the cache whose layers the launches read and write. Returns False, with nothing launched, where an
        argument leaves open what it would be for another layer.
        """
        if not self.are_alike:
            return False
        if self._cache is None or self._cache[0] is not arena:
            self._cache = arena, cache_by_layer(arena)
        cache, places = self._cache[1], []
        for launch in launches:
            by_layer = {}
            for i, arg in enumerate(launch.args):
                if isinstance(arg, np.generic):
                    continue
                if arg.ndim == 0 and isinstance(arg, np.ndarray):
                    if arg is not cache.arguments[0]:
                        return False
                    by_layer[i] = cache
                elif (place := self._place(arg)) is not None:
                    start, _, layer, own = place
                    if layer != 0 or start != self._address(arg):
                        return False
                    by_layer[i] = own
            places.append(by_layer)
        if all(hasattr(launch.kernel, "prepare") for launch in launches):
            self._launch_prepared(launches, places)
        else:
            self._launch_plainly(launches, places)
        return True

    def _place(self, array: Array) -> tuple[int, int, int, ByLayer] | None:
        """The one of the weights that begins at, or contains, the array's address."""
        address = self._address(array)
        i = bisect_right(self._starts, address) - 1
        while i > 0 and self._starts[i - 1] == self._starts[i]:
            i -= 1  # layers that share a weight: the first
        return self._places[i] if i >= 0 and address < self._starts[i] + self._places[i][1] else None

    def _launch_prepared(self, launches: Sequence[Launch], places: Sequence[dict[int, ByLayer]]) -> None:
        prepared = []
        for (kernel, *what), by_layer in zip(launches, places, strict=True):
            words, starts, call = kernel.prepare(*what)
            changes = [(starts[i] + word, values) for i, own in by_layer.items() for word, values in own.words]
            prepared.append((words, changes, call))
        for layer in range(1, len(self.weights)):
            for words, changes, call in prepared:
                for word, values in changes:
                    words[word] = values[layer]
                if status := call():
                    check_status(status)

    def _launch_plainly(self, launches: Sequence[Launch], places: Sequence[dict[int, ByLayer]]) -> None:
        """For kernels that launch.KernelLauncher doesn't launch."""
        for layer in range(1, len(self.weights)):
            for (kernel, grid, block, args, shared_mem), by_layer in zip(launches, places, strict=True):
                args = [by_layer[i].arguments[layer] if i in by_layer else arg for i, arg in enumerate(args)]
                kernel(grid, block, tuple(args), shared_mem)


def _are_alike(arrays: Sequence[Array | None], address) -> bool:
    """Whether what is launched for one of them can be launched for each: they agree in all that launchers look at."""
    if not all(hasattr(array, "shape") for array in arrays):
        return False
    return len({(array.shape, array.dtype, array.flags.c_contiguous, address(array) % 16) for array in arrays}) == 1


def cache_by_layer(arena: KVArena) -> ByLayer:
    """The cache as an argument."""
    structs = [paged_kv(arena, layer) for layer in range(arena.layout.num_layers)]
    words = np.array([np.frombuffer(struct.tobytes(), np.uint64) for struct in structs])
    return ByLayer(structs, [(i, column.tolist()) for i, column in enumerate(words.T) if (column != column[0]).any()])
