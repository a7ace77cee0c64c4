"""Which tile for which shape on which GPU: pure functions, to be printed and tested. Launchers obey.

No choice of a tile changes a result: the kernels sum each element in an order that their tiles have no part in. The
number of splits of k does; it is a function of n, k and the GPU alone for all steps of up to SPLIT_ROWS tokens, and on
Hopper for those of each of SPLIT_CLASSES_SM90.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from cupaged.kernels.checks import ceil_div
from cupaged.kernels.device import DeviceInfo

# What an SM of an H100 does in a clock (1.7 GHz) by its data sheet, with L2 and DRAM shared evenly; not yet measured.
PRODUCTS_PER_CLOCK = 1024  # of bf16, by mma.sync
L2_BYTES_PER_CLOCK = 24
DRAM_BYTES_PER_CLOCK = 14
LATENCY_CLOCKS = 1200  # of a read from DRAM, some 0.7 us; an arrival at a counter takes about as long

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


SPLIT_ROWS = 64  # of x, at most, where k may be split: more tokens make tiles enough, and partial sums too large
MAX_PARTIALS_PER_SM = 2  # thread blocks that leave partial sums: more would have to wait for a place


class LinearPlan(NamedTuple):
    tile: LinearTile
    num_splits: int  # thread blocks that share k for a tile


@functools.lru_cache(maxsize=4096)
def linear_plan(m: int, n: int, k: int, device: DeviceInfo) -> LinearPlan:
    """The tile and the splits of k for x [m, k] and weight [n, k]."""
    if m < SPLIT_ROWS:
        return linear_plan(SPLIT_ROWS, n, k, device)  # a row's sums are not to depend on how many others there are
    tiles = [tile for tile in LINEAR_TILES if tile.shared_bytes <= device.max_shared_bytes]
    if m > SPLIT_ROWS:
        return LinearPlan(_tile_of_many_rows(m, n, tiles, device), 1)
    return _plan_of_few_rows(n, k, [tile for tile in tiles if tile.tile_m == SPLIT_ROWS], device)


def _tile_of_many_rows(m: int, n: int, tiles: list[LinearTile], device: DeviceInfo) -> LinearTile:
    """The tile with which the busiest SM is done soonest; on a tie the one with the least padding, then the larger."""

    def cost(tile: LinearTile) -> tuple[float, int]:  # for one element of k: clocks of the busiest SM, products of all
        num_tiles = ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n)
        products = tile.tile_m * tile.tile_n
        rows = min(m, tile.tile_m) + min(n, tile.tile_n)  # rows past the edge are multiplied, but not read
        clocks = max(products / PRODUCTS_PER_CLOCK, rows * 2 / L2_BYTES_PER_CLOCK)
        return ceil_div(num_tiles, device.num_sms) * clocks, num_tiles * products

    return min(tiles, key=cost)


def _plan_of_few_rows(n: int, k: int, tiles: list[LinearTile], device: DeviceInfo) -> LinearPlan:
    """The plan that is done soonest with SPLIT_ROWS tokens, where reading weight is the work: small n gives too few
    tiles for all SMs, small tiles draw x from L2 too often, and splits have to be merged."""
    steps = ceil_div(k, LINEAR_TILE_K)

    def clocks(plan: LinearPlan) -> float:
        tile, num_splits = plan
        num_tiles = ceil_div(n, tile.tile_n)
        blocks_per_sm = ceil_div(num_tiles * num_splits, device.num_sms)  # of the busiest
        at_once = min(blocks_per_sm, (device.max_shared_bytes + 1024) // (tile.shared_bytes + 1024))
        steps_per_sm = ceil_div(steps, num_splits) * blocks_per_sm
        step_bytes = (tile.tile_m + min(n, tile.tile_n)) * LINEAR_TILE_K * 2
        reading = max(
            steps_per_sm * step_bytes / L2_BYTES_PER_CLOCK,
            n * k * 2 / device.num_sms / DRAM_BYTES_PER_CLOCK,
            (1 + steps_per_sm / at_once / (tile.stages - 1)) * LATENCY_CLOCKS,  # a stage's copies take one latency
        )
        if num_splits == 1:
            return reading
        partial_bytes = tile.tile_m * tile.tile_n * 4  # each is written, and the last thread block of a tile reads all
        return reading + 2 * LATENCY_CLOCKS + (blocks_per_sm + num_splits) * partial_bytes / L2_BYTES_PER_CLOCK

    plans = (LinearPlan(tile, num_splits) for tile in tiles for num_splits in _useful_splits(n, steps, tile, device))
    return min(plans, key=clocks)


def _useful_splits(n: int, steps: int, tile: LinearTile, device: DeviceInfo) -> list[int]:
    """1, and each number that leaves less for the longest split than the one before and not too many partial sums."""
    most = min(steps, MAX_PARTIALS_PER_SM * device.num_sms // ceil_div(n, tile.tile_n))
    return [1, *(i for i in range(2, most + 1) if ceil_div(steps, i) < ceil_div(steps, i - 1))]


def max_partial_floats(device: DeviceInfo) -> int:
    """The most elements that all partial sums of a plan have."""
    largest = max(tile.tile_m * tile.tile_n for tile in LINEAR_TILES if tile.tile_m == SPLIT_ROWS)
    return MAX_PARTIALS_PER_SM * device.num_sms * largest


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

    @property
    def normed_shared_bytes(self) -> int:
        """Where x is normed: of the rows alone; the norm's weight; the warps' sums of squares for each token."""
        ring = 8 * self.stages * 16 * self.row_tiles * 128
        return ring + 2 * LINEAR_SMALL_NORMED_COLUMNS + 8 * 8 * 4


LINEAR_SMALL_ROWS = 16  # of x, at most
# Of x, at most, where it is normed: registers hold no more. Twins in linear_small.cu.
LINEAR_SMALL_NORMED_ROWS = 8
LINEAR_SMALL_NORMED_COLUMNS = 2048

# At most 96 KB each, so that an H100 has two thread blocks an SM and every GPU from sm_80 on has one.
LINEAR_SMALL_TILES = (
    LinearSmallTile(row_tiles=1, token_tiles=1, stages=4),
    LinearSmallTile(row_tiles=1, token_tiles=2, stages=3),
    LinearSmallTile(row_tiles=2, token_tiles=1, stages=2),
    LinearSmallTile(row_tiles=2, token_tiles=2, stages=2),
)
LINEAR_SMALL_NORMED_TILES = tuple(tile for tile in LINEAR_SMALL_TILES if tile.token_tiles == 1)


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
        """The ring at a multiple of 1,024 bytes, 16 rows of 16 vectors a multiplying warp, two barriers a stage."""
        ring = self.stages * (self.tile_m + self.tile_n) * LINEAR_TILE_K * 2
        return 1024 + ring + 8 * 16 * 16 * 16 + self.stages * 2 * 8


class LinearSm90Plan(NamedTuple):
    tile: LinearSm90Tile
    num_splits: int  # of k: thread blocks that share a tile


_WIDE, _MIDDLE, _NARROW = LinearSm90Tile(256, 4), LinearSm90Tile(192, 4), LinearSm90Tile(128, 6)
LINEAR_SM90_PLANS = (
    LinearSm90Plan(_WIDE, 1),
    LinearSm90Plan(_MIDDLE, 1),
    LinearSm90Plan(_NARROW, 1),
    LinearSm90Plan(_NARROW, 2),
)
# Where k may be split, which is decided for all m up to one of these, and down to the one before.
SPLIT_CLASSES_SM90 = (128, 256, 512)
# As measured on an H200:
STEP_OUTPUTS = 8  # a step of k takes as long as the products for that many outputs more
STORING_STEPS = 9  # to start a tile, and to store its sums, takes as long as so many steps
MERGING_STEPS = 7  # and to exchange them with another split


@functools.lru_cache(maxsize=4096)
def linear_sm90_plan(m: int, n: int, k: int, device: DeviceInfo) -> LinearSm90Plan:
    """The plan with which the busiest SM is done soonest; on a tie the one with the largest tile."""
    steps = ceil_div(k, LINEAR_TILE_K)

    def cost(plan: LinearSm90Plan, rows: int) -> float:
        tile, num_splits = plan
        num_blocks = ceil_div(rows, tile.tile_m) * ceil_div(n, tile.tile_n) * num_splits
        if num_splits > 1 and (num_blocks > device.num_sms or num_splits > steps):
            return math.inf  # all thread blocks are to find a place at once
        tile_steps = ceil_div(steps, num_splits) + STORING_STEPS + MERGING_STEPS * (num_splits - 1)
        return ceil_div(num_blocks, device.num_sms) * tile_steps * (tile.tile_n + STEP_OUTPUTS)

    most_rows = next((rows for rows in SPLIT_CLASSES_SM90 if m <= rows), None)
    num_splits = 1
    if most_rows is not None:
        num_splits = min(LINEAR_SM90_PLANS, key=lambda plan: cost(plan, most_rows)).num_splits
    plans = (plan for plan in LINEAR_SM90_PLANS if plan.num_splits == num_splits)
    return min(plans, key=lambda plan: cost(plan, m))


LINEAR_FEW_ROWS = 64  # of weight in a tile of linear_few_sm90.cu
LINEAR_FEW_SPLITS = (1, 2, 4)  # of k, that there are kernels for
LINEAR_FEW_STAGED = 32  # kMaxStaged in linear_few_sm90.cu
MIN_SPLIT_STEPS = 6  # of 64 columns, that a split has at least: with fewer, merging takes longer than it saves
# Elements of weight; with fewer linear_small is quicker: for up to 8 rows, which it norms as well, and for up to 16.
MIN_LARGE_WEIGHT, MIN_LARGE_WEIGHT_16_ROWS = 1 << 24, 1 << 22


@dataclass(frozen=True)
class LinearFewTile:
    """Template arguments of linear_few_sm90.cu."""

    tokens: int  # rows of x
    stages: int  # of 64 columns of weight and x
    splits: int  # thread blocks, a cluster, that share k

    @property
    def shared_bytes(self) -> int:
        """The ring at a multiple of 1,024 bytes (it begins at one of 128), what other splits send or, without any, the
        results that are staged at once, the barriers."""
        ring = self.stages * (LINEAR_FEW_ROWS + self.tokens) * LINEAR_TILE_K * 2
        sent, staged = LINEAR_FEW_ROWS * self.tokens, (LINEAR_FEW_ROWS + 4) * min(self.tokens, LINEAR_FEW_STAGED)
        after = sent if self.splits > 1 else staged  # floats
        return 896 + ring + 4 * after + (2 * self.stages + 1) * 8

    def blocks_at_once(self, device: DeviceInfo) -> int:
        """Thread blocks that have room on the GPU at the same time."""
        return (device.max_shared_bytes + 1024) // (self.shared_bytes + 1024) * device.num_sms


# At most 113 KB each: a thread block of the next kernel has room beside one and fetches its first weights.
LINEAR_FEW_TILES = (
    *(
        LinearFewTile(tokens, stages, splits)
        for tokens, stages in ((8, 12), (16, 10), (32, 8), (64, 6))
        for splits in LINEAR_FEW_SPLITS
    ),
    # For small weights, which linear_sm90 has too few tiles for.
    LinearFewTile(tokens=128, stages=3, splits=4),
)


def linear_few_splits(n: int, k: int, device: DeviceInfo) -> int:
    """As few as give nine tenths of the SMs a thread block, if steps are enough. A function of the weight alone, as a
    row's sums are not to depend on how many others there are."""
    tiles, steps = ceil_div(n, LINEAR_FEW_ROWS), ceil_div(k, LINEAR_TILE_K)
    usable = [splits for splits in LINEAR_FEW_SPLITS if splits == 1 or steps >= splits * MIN_SPLIT_STEPS]
    return next((splits for splits in usable if 10 * tiles * splits >= 9 * device.num_sms), usable[-1])


def linear_few_max_rows(n: int, k: int, device: DeviceInfo) -> int:
    """Of x, that linear_few_sm90 has tiles for."""
    splits = linear_few_splits(n, k, device)
    return max(tile.tokens for tile in LINEAR_FEW_TILES if tile.splits == splits)


@functools.lru_cache(maxsize=4096)
def linear_few_tile(m: int, n: int, k: int, device: DeviceInfo) -> LinearFewTile:
    """The tile with as few tokens as hold m."""
    splits = linear_few_splits(n, k, device)
    usable = (tile for tile in LINEAR_FEW_TILES if tile.splits == splits and tile.tokens >= m)
    return min(usable, key=lambda tile: tile.tokens)


@functools.lru_cache(maxsize=4096)
def linear_few_is_quickest(m: int, n: int, k: int, device: DeviceInfo) -> bool:
    """Whether linear_few_sm90 is quicker than linear_small and linear_sm90 (an H200). Up to 16 rows that is so with
    large weights only."""
    if m <= LINEAR_SMALL_ROWS:
        return n * k >= (MIN_LARGE_WEIGHT if m <= LINEAR_SMALL_NORMED_ROWS else MIN_LARGE_WEIGHT_16_ROWS)
    return m <= linear_few_max_rows(n, k, device)
