"""Which tile for which shape on which GPU: pure functions, to be printed and tested. Launchers obey.

No choice here changes a result: the kernels sum each element in an order that their tiles have no part in.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cupaged.kernels.checks import ceil_div
from cupaged.kernels.device import DeviceInfo

# What an SM of an H100 does in a clock, from its data sheet and with L2 shared evenly; not yet measured.
PRODUCTS_PER_CLOCK = 1024  # of bf16, by mma.sync
L2_BYTES_PER_CLOCK = 24

LINEAR_TILE_K = 64  # elements of k in a stage of linear.cu


@dataclass(frozen=True)
class LinearTile:
    """Template arguments of linear.cu."""

    tile_m: int  # tokens a thread block
    tile_n: int  # outputs a thread block
    warps_m: int
    warps_n: int
    stages: int

    @property
    def num_threads(self) -> int:
        return self.warps_m * self.warps_n * 32

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.tile_m + self.tile_n) * LINEAR_TILE_K * 2


# Large ones first: they draw the least from L2 for a product. 64 x 64 a warp is what registers allow.
LINEAR_TILES = (
    LinearTile(128, 256, 2, 4, stages=3),  # 144 KB of shared memory: one thread block an SM, and only where it fits
    LinearTile(128, 128, 2, 2, stages=3),  # 96 KB: two on an H100
    LinearTile(64, 128, 2, 2, stages=4),  # 96 KB
    LinearTile(64, 64, 2, 2, stages=4),  # 64 KB
    LinearTile(64, 32, 2, 2, stages=4),  # 48 KB
)


@functools.lru_cache(maxsize=4096)
def linear_tile(m: int, n: int, device: DeviceInfo) -> LinearTile:
    """The tile with which the busiest SM is done soonest; on a tie the one with the least padding, then the larger."""

    def cost(tile: LinearTile) -> tuple[float, int]:  # for one element of k: clocks of the busiest SM, products of all
        num_tiles = ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n)
        products = tile.tile_m * tile.tile_n
        rows = min(m, tile.tile_m) + min(n, tile.tile_n)  # rows past the edge are multiplied, but not read
        clocks = max(products / PRODUCTS_PER_CLOCK, rows * 2 / L2_BYTES_PER_CLOCK)
        return ceil_div(num_tiles, device.num_sms) * clocks, num_tiles * products

    return min((tile for tile in LINEAR_TILES if tile.shared_bytes <= device.max_shared_bytes), key=cost)


@dataclass(frozen=True)
class LinearSmallTile:
    """Template arguments of linear_small.cu."""

    row_tiles: int  # of 16 rows of weight a thread block
    token_tiles: int  # of 8 tokens
    stages: int

    @property
    def shared_bytes(self) -> int:
        """8 warps, each with `stages` chunks of 64 columns (128 bytes) of its rows and tokens."""
        return 8 * self.stages * (16 * self.row_tiles + 8 * self.token_tiles) * 128


# At most 96 KB each, so that an H100 has two thread blocks an SM and every GPU from sm_80 on has one.
LINEAR_SMALL_TILES = (
    LinearSmallTile(row_tiles=1, token_tiles=1, stages=4),
    LinearSmallTile(row_tiles=1, token_tiles=2, stages=3),
    LinearSmallTile(row_tiles=2, token_tiles=1, stages=2),
    LinearSmallTile(row_tiles=2, token_tiles=2, stages=2),
)


@functools.lru_cache(maxsize=4096)
def linear_small_tile(m: int, n: int, device: DeviceInfo) -> LinearSmallTile:
    """As few token tiles as hold m, and two row tiles (half the traffic of x) where that leaves two blocks an SM."""
    row_tiles = 2 if ceil_div(n, 32) >= 2 * device.num_sms else 1
    token_tiles = ceil_div(m, 8)
    return next(tile for tile in LINEAR_SMALL_TILES if (tile.row_tiles, tile.token_tiles) == (row_tiles, token_tiles))


@dataclass(frozen=True)
class LinearSm90Tile:
    """Template arguments of linear_sm90.cu."""

    tile_n: int  # outputs
    stages: int
    tile_m = 128  # tokens

    @property
    def shared_bytes(self) -> int:
        """The ring at a multiple of 1,024 bytes, 16 rows of 36 floats a multiplying warp, two barriers a stage."""
        ring = self.stages * (self.tile_m + self.tile_n) * LINEAR_TILE_K * 2
        return 1024 + ring + 8 * 16 * 36 * 4 + self.stages * 2 * 8


LINEAR_SM90_TILES = (LinearSm90Tile(tile_n=256, stages=4), LinearSm90Tile(tile_n=128, stages=6))


@functools.lru_cache(maxsize=4096)
def linear_sm90_tile(m: int, n: int, device: DeviceInfo) -> LinearSm90Tile:
    """The tile with which the busiest SM draws the fewest rows from L2, on the guess that these bound it."""

    def rows(tile: LinearSm90Tile) -> int:
        num_tiles = ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n)
        return ceil_div(num_tiles, device.num_sms) * (tile.tile_m + tile.tile_n)

    return min(LINEAR_SM90_TILES, key=rows)
