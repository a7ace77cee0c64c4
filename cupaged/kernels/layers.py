"""Launches of a model's layers, of which the first one's are made by the launchers, and the others' after them.

    rms_norm(x, residual, layers[0].input_norm)  --noted-->  (kernel, grid, block, args)
    the same with layers[1].input_norm, layers[2].input_norm ...  one call of the driver each

A launcher checks its arrays, chooses a kernel and packs its arguments: 20 us of Python and more. Layers differ in the
addresses of their weights and in their place in the cache only, so that for all but the first it is enough to put these
into the arguments: 2 us.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupaged.kernels.compile import Launch
from cupaged.kernels.launch import KernelLauncher, check_status
from cupaged.kernels.paged_kv import paged_kv
from cupaged.kernels.tensor_map import TensorMap, tensor_map
from cupaged.memory.arena import KVArena

Array = Any


class ByLayer(NamedTuple):
    """An argument that each layer has its own of. words: of its 8-byte words that differ, the index, and the values."""

    arguments: Sequence[Array]
    words: list[tuple[int, list[int]]]


class Layers:
    """weights: of each layer an object whose attributes are arrays or None, as models.parameters.LayerWeights. These
    stay where they are from now on. address: of an array."""

    def __init__(self, weights: Sequence[Any], address: Callable[[Array], int]):
        self.weights = weights
        self._address = address
        columns = list(zip(*(vars(layer).values() for layer in weights), strict=True))
        columns = [column for column in columns if any(array is not None for array in column)]
        self._are_alike = all(_are_alike(column, address) for column in columns)
        places = []  # (address, layer, that layer and the others' arrays)
        for column in columns if self._are_alike else ():
            places += [(address(array), layer, column) for layer, array in enumerate(column)]
        self._places = sorted(places, key=lambda place: place[:2])
        self._starts = [place[0] for place in self._places]
        self._known: dict[Hashable, ByLayer] = {}  # arguments that were asked for before

    def launch_others(self, launches: Sequence[Launch], arena: KVArena) -> bool:
        """Launch for each layer but the first what was launched for that, in the same order.

        arena: the cache whose layers the launches read and write. Returns False, with nothing launched, where an
        argument leaves open what it would be for another layer.
        """
        if not self._are_alike:
            return False
        try:
            own = [
                {i: found for i, arg in enumerate(launch.args) if (found := self._by_layer(arg, arena)) is not None}
                for launch in launches
            ]
        except _IsOpenError:
            return False
        if all(isinstance(launch.kernel, KernelLauncher) for launch in launches):
            self._launch_prepared(launches, own)
        else:
            self._launch_plainly(launches, own)
        return True

    def _by_layer(self, arg, arena: KVArena) -> ByLayer | None:
        """What takes the place of the first layer's argument; None for what they share."""
        if isinstance(arg, np.generic):
            return None
        if isinstance(arg, TensorMap):
            address, *shape, _, box_rows, l2_bytes = arg.described
            if (column := self._column_at(address)) is None:
                return None
            if column[0].shape != tuple(shape):
                raise _IsOpenError
            box = box_rows, l2_bytes
            return self._know((address, *box), lambda: _structs([tensor_map(array, *box) for array in column]))
        if isinstance(arg, np.ndarray) and arg.ndim == 0:
            if arg is not paged_kv(arena, 0):
                raise _IsOpenError
            layout = arena.layout
            caches = (paged_kv(arena, layer) for layer in range(layout.num_layers))
            return self._know((arena.slab_table_address, layout), lambda: _structs(list(caches)))
        if (column := self._column_at(self._address(arg))) is None:
            return None
        return self._know(self._address(arg), lambda: ByLayer(column, [(0, list(map(self._address, column)))]))

    def _know(self, key: Hashable, make: Callable[[], ByLayer]) -> ByLayer:
        if (known := self._known.get(key)) is None:
            known = self._known[key] = make()
        return known

    def _column_at(self, address: int) -> Sequence[Array] | None:
        """The first layer's array that is there, and the others'; None if it is no layer's."""
        i = bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        i = bisect_left(self._starts, self._starts[i])  # layers that share an array: the first
        start, layer, column = self._places[i]
        if address >= start + column[0].nbytes:
            return None
        if layer != 0 or address != start:
            raise _IsOpenError
        return column

    def _launch_prepared(self, launches: Sequence[Launch], own: Sequence[dict[int, ByLayer]]) -> None:
        prepared = []
        for (kernel, *what), by_layer in zip(launches, own, strict=True):
            launch = kernel.prepare(*what)
            changes = [(launch.starts[i] + word, values) for i, arg in by_layer.items() for word, values in arg.words]
            prepared.append((launch, launch.words, changes, launch.call))
        for layer in range(1, len(self.weights)):
            for _, words, changes, call in prepared:
                for word, values in changes:
                    words[word] = values[layer]
                if status := call():
                    check_status(status)

    def _launch_plainly(self, launches: Sequence[Launch], own: Sequence[dict[int, ByLayer]]) -> None:
        """For kernels that launch.KernelLauncher doesn't launch."""
        for layer in range(1, len(self.weights)):
            for (kernel, grid, block, args, shared_mem), by_layer in zip(launches, own, strict=True):
                args = [by_layer[i].arguments[layer] if i in by_layer else arg for i, arg in enumerate(args)]
                kernel(grid, block, tuple(args), shared_mem)


def _are_alike(arrays: Sequence[Array | None], address: Callable[[Array], int]) -> bool:
    """Whether what is launched for one of them can be launched for each: they agree in all that launchers look at."""
    if not all(hasattr(array, "shape") for array in arrays):
        return False
    return len({(array.shape, array.dtype, array.flags.c_contiguous, address(array) % 16) for array in arrays}) == 1


def _structs(structs: Sequence[np.ndarray]) -> ByLayer:
    words = np.array([np.frombuffer(struct.tobytes(), np.uint64) for struct in structs])
    return ByLayer(structs, [(i, column.tolist()) for i, column in enumerate(words.T) if (column != column[0]).any()])


class _IsOpenError(Exception):
    """What another layer's argument would be can't be told."""
