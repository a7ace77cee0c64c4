"""Plant bugs in copies of the kernels, one at a time, and see whether the kernels' tests on the host find them.

    python tests/host/mutate.py                          # all of them; writes docs/mutation.md
    python tests/host/mutate.py --only barrier           # those whose kind, file or description has the word; no report

Each mutation replaces text that occurs exactly once in a file of cuda_src. A mutant that doesn't compile, and text that
is no longer there, are errors of this script. The unchanged kernels must pass first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "cuda_src"
TESTS = ROOT / "tests" / "kernels"
REPORT = ROOT / "docs" / "mutation.md"
TIMEOUT = 1800  # seconds; a bug can keep a kernel from ending


@dataclass(frozen=True)
class Mutation:
    kind: str
    file: str
    bug: str  # what it is, in words
    old: str
    new: str
    tests: tuple[str, ...]  # stems in tests/kernels, without test_
    why_not: str = ""  # why the host can't see it, where it can't


BARRIER, COPY, HOPPER, WARP, INDEX, EDGE, STATE, BLOCKS = (
    "barrier",
    "asynchronous copy",
    "hopper",
    "warp collective",
    "index",
    "edge",
    "state and rounding",
    "between thread blocks",
)
DECODE, PREFILL = ("paged_decode",), ("paged_prefill",)
ATTENTION = ("paged_decode", "paged_prefill")

MUTATIONS = (
    # -- barriers -----------------------------------------------------------------------------------------------
    Mutation(
        BARRIER, "common.cuh", "block_sum reads the warps' sums before they are there",
        "scratch[threadIdx.x / kWarpSize] = x;\n    __syncthreads();",
        "scratch[threadIdx.x / kWarpSize] = x;",
        ("rms_norm",),
    ),
    Mutation(
        BARRIER, "token_order.cuh", "block_reduce gives its scratch back while others read it",
        "x = op(x, scratch[w]);\n  __syncthreads();",
        "x = op(x, scratch[w]);",
        ("logprobs",),
    ),
    Mutation(
        BARRIER, "row_slices.cuh", "the histogram is filled while it is still being cleared",
        "shared.histogram.clear(kNumDigits);\n      __syncthreads();",
        "shared.histogram.clear(kNumDigits);",
        ("sampler",),
    ),
    Mutation(
        BARRIER, "row_slices.cuh", "the digit is read before it is found",
        "shared.remaining = target - above;\n      }\n      __syncthreads();",
        "shared.remaining = target - above;\n      }",
        ("sampler",),
    ),
    Mutation(
        BARRIER, "row_slices.cuh", "a warp's sum is overwritten while others still add the sums up",
        "    total += scratch[w];\n  }\n  __syncthreads();",
        "    total += scratch[w];\n  }",
        ("sampler",),
    ),
    Mutation(
        BARRIER, "paged_tile.cuh", "no barrier between a tile's copies and its use",
        "__syncthreads();  // all threads' copies are there",
        "// all threads' copies are there",
        DECODE,
    ),
    Mutation(
        BARRIER, "paged_decode.cu", "the warps' results overwrite the ring while others read it",
        "cp_async_wait_group<0>();\n  __syncthreads();",
        "cp_async_wait_group<0>();",
        DECODE,
    ),
    Mutation(
        BARRIER, "paged_decode.cu", "the warps' results are merged before they are all there",
        "  __syncthreads();\n\n  const long long first_out",
        "\n  const long long first_out",
        DECODE,
    ),
    Mutation(
        BARRIER, "paged_prefill.cu", "rows are stored before the warp's other lanes have put them there",
        "  __syncwarp();\n",
        "",
        PREFILL,
    ),
    Mutation(
        BARRIER, "linear.cu", "the next stage is read before the others' copies are there",
        "__syncthreads();  // the next stage is there",
        "// the next stage is there",
        ("linear",),
    ),
    Mutation(
        BARRIER, "linear.cu", "sums overwrite fragments that other warps have yet to read",
        "__syncthreads();  // every warp has read",
        "// every warp has read",
        ("linear",),
    ),
    Mutation(
        BARRIER, "linear_small.cu", "a lane's sums overwrite the ring of a lane that still reads",
        "__syncwarp();              // and",
        "// and",
        ("linear",),
    ),
    Mutation(
        BARRIER, "linear_small.cu", "the squares of normed rows are added before they are all there",
        "no group yet\n    __syncthreads();",
        "no group yet",
        ("linear",),
    ),
    Mutation(
        BARRIER, "linear_small.cu", "the warps' sums are added before they are all there",
        "= sum[r][t][e];\n  __syncthreads();",
        "= sum[r][t][e];",
        ("linear",),
    ),
    Mutation(
        BARRIER, "token_order.cuh", "a barrier that only one lane of each warp reaches",
        "scratch[threadIdx.x / kWarpSize] = x;\n  __syncthreads();",
        "scratch[threadIdx.x / kWarpSize] = x, __syncthreads();",
        ("logprobs",),
    ),
    # -- asynchronous copies ------------------------------------------------------------------------------------
    Mutation(
        COPY, "linear.cu", "the loop's wait leaves one group too many under way",
        "cp_async_wait_group<kStages - 2>();\n        __syncthreads();",
        "cp_async_wait_group<kStages - 1>();\n        __syncthreads();",
        ("linear",),
    ),
    Mutation(
        COPY, "linear.cu", "the first wait leaves one group too many under way",
        "cp_async_wait_group<kStages - 2>();\n  __syncthreads();",
        "cp_async_wait_group<kStages - 1>();\n  __syncthreads();",
        ("linear",),
    ),
    Mutation(
        COPY, "linear.cu", "no group at the end, where nothing is left to copy",
        "weight_copier.copy(stage + kTileM * kTileK);\n    }\n    cp_async_commit_group();",
        "weight_copier.copy(stage + kTileM * kTileK);\n      cp_async_commit_group();\n    }",
        ("linear",),
    ),
    Mutation(
        COPY, "linear.cu", "a stage is filled while it is still being read",
        "if (step == 0) copy_stage(tile + kStages - 1);",
        "if (step == 0) copy_stage(tile + kStages);",
        ("linear",),
    ),
    Mutation(
        COPY, "linear_small.cu", "the wait leaves one group too many under way",
        "cp_async_wait_group<kStages - 1>();",
        "cp_async_wait_group<kStages>();",
        ("linear",),
    ),
    Mutation(
        COPY, "linear_small.cu", "the norm's weight is read while its copies are under way",
        "cp_async_wait_group<0>();  // the norm's",
        "// the norm's",
        ("linear",),
    ),
    Mutation(
        COPY, "linear_small.cu", "sums are put where copies are still under way",
        "cp_async_wait_group<0>();  // the groups past k",
        "// the groups past k",
        ("linear",),
        "the groups that it waits for are empty",
    ),
    Mutation(
        COPY, "paged_tile.cuh", "the wait leaves one group too many under way",
        "cp_async_wait_group<kStages - 2>();",
        "cp_async_wait_group<kStages - 1>();",
        DECODE,
    ),
    Mutation(
        COPY, "paged_tile.cuh", "a tile is overwritten before all threads have left it",
        "__syncthreads();  // all threads' copies are there, and all threads have left the tile that load() "
        "overwrites\n    load();",
        "load();\n    __syncthreads();",
        DECODE,
    ),
    Mutation(
        COPY, "paged_tile.cuh", "no group at the end, where nothing is left to load",
        "cp_async_commit_group();  // also",
        "if (loaded_ < 2 * num_tiles_) cp_async_commit_group();  // also",
        ATTENTION,
    ),
    Mutation(
        COPY, "paged_tile.cuh", "rows outside of the range are loaded, NaN and all",
        "min(max(key, begin), end - 1);",
        "key;",
        ATTENTION,
    ),
    # -- Hopper: barriers in shared memory, warpgroup products ----------------------------------------------------
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "a slot is filled again before its products are done",
        "        if (fill >= kSlots) mbarrier_wait(empty + slot, (fill / kSlots - 1) % 2);\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "keys are scored before they have arrived",
        "        if (!keys_are_there) mbarrier_wait(keys_full + other, parity);\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "values are weighed before they have arrived",
        " mbarrier_wait(values_full + other, parity);",
        " {}",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "queries are handed over while their copies are under way",
        "      cp_async_wait_group<0>();\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "queries are not made visible to wgmma",
        "      fence_proxy_async();\n      mbarrier_arrive(queries_full + slot);",
        "      mbarrier_arrive(queries_full + slot);",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the next tile is scored by the queries of this one",
        "          ++query_fill;\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "values past the range are taken as they lie there, NaN and all",
        "          clear(tile_end, kKeys);\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "values before the range are taken as they lie there, NaN and all",
        "          clear(0, tile_begin);\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "a block of which the range has a part is copied from its start",
        "(panel * block_size + begin - first_in_tile) * 64;",
        "panel * block_size * 64;",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "values are given back before they have been multiplied",
        "        wgmma_wait_group<0>();\n        wgmma_hold(sums);\n        release(values_empty + slot);",
        "        release(values_empty + slot);\n        wgmma_wait_group<0>();\n        wgmma_hold(sums);",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the scores are read before they are there",
        "        wgmma_wait_group<1>();  // the scores\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "weights are rounded into registers that a product still reads",
        "values_full + other, parity);\n        wgmma_wait_group<0>();",
        "values_full + other, parity);\n        round_weights();\n        wgmma_wait_group<0>();",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the barrier waits for the warps of one warpgroup only",
        "mbarrier_init(keys_empty + slot, kConsumers * 4);",
        "mbarrier_init(keys_empty + slot, 4);",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "a warpgroup keeps its turn",
        "        start_values(slot);\n        turns.pass();\n        wgmma_wait_group<1>();",
        "        start_values(slot);\n        wgmma_wait_group<1>();",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the tiles begin at a multiple of 128 bytes, not of 1,024",
        "shared + (1024 - shared_address(shared) % 1024) % 1024",
        "shared",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the next 16 columns of keys are taken 8 columns on",
        "b + panel * TileLayout::kPanel / 8 + 2 * part",
        "b + panel * TileLayout::kPanel / 8 + part",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the next tile begins with the maximum of this one",
        "        if (ends_split) state[0] = state[1] = SoftmaxState{};\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "sums are not moved when the maximum has grown",
        "          scale_sums(factors);\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "a split ends where the next one has begun",
        "key % kSplitKeys == 0;",
        "key % kSplitKeys == kKeys;",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the sums of the split before are forgotten",
        "if (!is_first) merge_image",
        "if (false) merge_image",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "splits are merged when the last but one has arrived",
        "if (arrived < tile.num_splits - 1) return;",
        "if (arrived < tile.num_splits - 2) return;",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "the counter of splits is left as it is",
        "        if (lane == 0) *counter = 0;\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "a split takes the keys of the one before it",
        "(begin / kSplitKeys + split) * kSplitKeys",
        "(begin / kSplitKeys + max(0, split - 1)) * kSplitKeys",
        PREFILL,
    ),
    Mutation(
        HOPPER, "paged_prefill_sm90.cu", "tiles of row tiles beyond the first 32 are counted from 0",
        "      passed_ += __popc(present_);\n",
        "",
        PREFILL,
    ),
    Mutation(
        HOPPER, "linear_few_sm90.cu", "a stage is filled again before its products are done",
        "        mbarrier_wait(empty + fetch.place.stage, fetch.place.parity ^ 1);\n",
        "",
        ("linear_few_sm90",),
    ),
    Mutation(
        HOPPER, "linear_few_sm90.cu", "products begin before their stage has arrived",
        "      mbarrier_wait(full + place.stage, place.parity);\n",
        "",
        ("linear_few_sm90",),
    ),
    Mutation(
        HOPPER, "linear_few_sm90.cu", "a stage is given back while its products are under way",
        "      if (i > 0) release();\n      multiplied = place.stage;\n    }\n"
        "    wgmma_wait_group<0>();\n    wgmma_hold(sum);\n    if (num_steps > 0) release();\n",
        "      multiplied = place.stage;\n      release();\n    }\n    wgmma_wait_group<0>();\n    wgmma_hold(sum);\n",
        ("linear_few_sm90",),
    ),
    Mutation(
        HOPPER, "linear_few_sm90.cu", "results are staged while another warp's products are under way",
        "      bar_sync(1, kThreads);  // the last results have been read, and with splits all products are done\n",
        "",
        ("linear_few_sm90",),
    ),
    Mutation(
        HOPPER, "linear_few_sm90.cu", "results are staged while the last tile's are read",
        "      bar_sync(1, kThreads);  // the last results",
        "      if (kSplits > 1) bar_sync(1, kThreads);  // the last results",
        ("linear_few_sm90",),
    ),
    Mutation(
        HOPPER, "linear_few_sm90.cu", "results are stored before all warps have staged them",
        "      bar_sync(1, kThreads);\n",
        "",
        ("linear_few_sm90",),
    ),
    Mutation(
        INDEX, "linear_few_sm90.cu", "a thread block fetches its first tile's weight again for the next",
        "                     walk.tile * kRows, barrier);",
        "                     first_tile * kRows, barrier);",
        ("linear_few_sm90",),
    ),
    Mutation(
        STATE, "linear_few_sm90.cu", "the walk through the ring begins anew with each tile",
        "  RingPlace<kStages> place;\n  for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {\n",
        "  for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {\n    RingPlace<kStages> place;\n",
        ("linear_few_sm90",),
    ),
    Mutation(
        INDEX, "linear_few_sm90.cu", "the first tokens are staged in every round",
        "vec = first_token / 8 + staged_vec;",
        "vec = staged_vec;",
        ("linear_few_sm90",),
    ),
    Mutation(
        INDEX, "linear_few_sm90.cu", "each thread block of a cluster stores the first one's rows",
        "tile * kRows + owner * kOwnRows",
        "tile * kRows",
        ("linear_few_sm90",),
    ),
    Mutation(
        INDEX, "linear_few_sm90.cu", "warps that share a unit's tokens all add up the first ones",
        "const int staged_vec = sharer * kOwnVecs + i,",
        "const int staged_vec = i,",
        ("linear_few_sm90",),
    ),
    Mutation(
        EDGE, "linear_few_sm90.cu", "the last tokens' sums are not sent",
        "          if (8 * i < m)\n            store_async",
        "          if (8 * i + 8 <= m)\n            store_async",
        ("linear_few_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "a stage is filled again before its products are done",
        "          mbarrier_wait(empty + place.stage, place.parity ^ 1);\n"
        "          mbarrier_arrive_expect_tx(full + place.stage, num_boxes",
        "          mbarrier_arrive_expect_tx(full + place.stage, num_boxes",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "products begin before their stage has arrived",
        "          mbarrier_wait(full + place.stage, place.parity);\n          const int offset",
        "          const int offset",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "ring.cuh", "the parity of a stage's barrier stays that of its first use",
        "stage = 0, parity ^= 1;",
        "stage = 0;",
        ("linear_sm90", "linear_few_sm90"),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "a stage counts as full before all of its weight has come",
        "kTileN * kTileK * sizeof(scalar_t));",
        "(kTileN - 1) * kTileK * sizeof(scalar_t));",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "of a tile that m cuts off the last rows are not fetched",
        "ceil_div(m - row, kLastRows)",
        "max(1, (m - row) / kLastRows)",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "a stage is given back while its products are under way",
        "          if (i > 0) release(multiplied);\n          multiplied = place.stage;\n        }\n"
        "        wgmma_wait_group<0>();\n        wgmma_hold(sum);\n        release(multiplied);\n",
        "          release(place.stage);\n        }\n        wgmma_wait_group<0>();\n",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "a tile's last stage is not given back",
        "        wgmma_hold(sum);\n        release(multiplied);\n",
        "        wgmma_hold(sum);\n",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "warps without tokens don't give stages back",
        "          mbarrier_wait(full + place.stage, place.parity);\n          release(place.stage);\n",
        "          mbarrier_wait(full + place.stage, place.parity);\n",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "the sums are stored before they are there",
        "        wgmma_wait_group<0>();\n        wgmma_hold(sum);\n        release(multiplied);\n",
        "        release(multiplied);\n",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "linear_sm90.cu", "a warp's columns are overwritten while its lanes still store them",
        "        __syncwarp();  // the last columns have been read\n",
        "",
        ("linear_sm90",),
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "keys and values are read before they have arrived",
        "    mbarrier_wait(full_ + slot_, parity_);\n",
        "",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "the parity of a slot's barrier stays that of its first use",
        "    parity_ ^= slot_ == 0;\n",
        "",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "keys are fetched in place of values",
        "copy(source_.kv.v_offset - source_.kv.k_offset);",
        "copy(0);",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "the second panel of a part of a block is the first once more",
        "from_ = (panel * block_size + ",
        "from_ = (",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "values in slots without a key are not cleared",
        "        clear(max(0, end - first_key), Stream::kKeys);\n",
        "",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "the warps' results are overwritten while others read them",
        "      __syncthreads();  // the last heads have been read\n",
        "",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "the warps' results are merged before they are all there",
        "      __syncthreads();\n      const int head = first + warp;",
        "      const int head = first + warp;",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "queries are read before they are rotated",
        "    }\n    __syncthreads();\n  }\n};",
        "    }\n  }\n};",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "cosines are read before they have all come",
        "        __syncthreads();  // everybody's part",
        "        // everybody's part",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "a newest key that begins its step is overlooked",
        "newest_key >= first_key && newest_key < first_key + Stream::kKeys",
        "newest_key > first_key && newest_key < first_key + Stream::kKeys",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "the newest value stays what the ring has brought",
        "      if (has_newest) put_newest(values,",
        "      if (false) put_newest(values,",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "values are rotated as keys are",
        "      if (!is_value) {\n        share.load_rotation",
        "      if (true) {\n        share.load_rotation",
        DECODE,
    ),
    Mutation(
        HOPPER, "paged_decode_sm90.cu", "the items of sequences after the first 32 are counted from 0",
        "    end_ = first_item + sum;",
        "    end_ = sum;",
        DECODE,
    ),
    Mutation(
        HOPPER, "key_attention.cuh", "older sums stay on their old base",
        "out[h][d][i] *= factor[i % 2];",
        "out[h][d][i] *= 1.f;",
        DECODE,
    ),
    Mutation(
        HOPPER, "key_attention.cuh", "weights are not transposed",
        "movmatrix_trans(pack_pair<scalar_t>(first, second))",
        "pack_pair<scalar_t>(first, second)",
        DECODE,
    ),
    Mutation(
        HOPPER, "softmax_state.cuh", "parts that are merged together keep their own maxima",
        "const float factor = __shfl_sync(kFullMask, my_factor, first + p);",
        "const float factor = 1.f;",
        DECODE,
    ),
    # -- warp collectives ---------------------------------------------------------------------------------------
    Mutation(
        WARP, "common.cuh", "warp_max and warp_sum with half a mask",
        "constexpr unsigned kFullMask = 0xffffffffu;",
        "constexpr unsigned kFullMask = 0x0000ffffu;",
        ("rms_norm",),
    ),
    Mutation(
        WARP, "rope.cu", "idle lanes leave before the shuffle",
        "  if constexpr (kNorm) share.norm",
        "  if (!active) return;\n  if constexpr (kNorm) share.norm",
        ("rope",),
    ),
    Mutation(
        WARP, "rope.cuh", "the last step of the sum over a head is missing",
        "offset = kLanes / 2; offset > 0;",
        "offset = kLanes / 2; offset > 1;",
        ("rope",),
    ),
    Mutation(
        WARP, "warp_attention.cuh", "the maximum is taken over two of the row's four lanes",
        "        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));  // now",
        "        // now",
        ATTENTION,
    ),
    Mutation(
        WARP, "warp_attention.cuh", "the sum is taken over two of the row's four lanes",
        "        sum += __shfl_xor_sync(kFullMask, sum, 2);\n",
        "",
        ATTENTION,
    ),
    Mutation(
        WARP, "row_slices.cuh", "the scan leaves out one lane in each step",
        "if (lane >= offset) x += below;",
        "if (lane > offset) x += below;",
        ("sampler",),
    ),
    Mutation(
        WARP, "paged_prefill.cu", "a lane without a query row skips the warp's products",
        "    if (seen) {\n      attention.score",
        "    if (seen && first_row + warp_row + lane / 4 < rows.num_rows) {\n      attention.score",
        PREFILL,
    ),
    # -- indices ------------------------------------------------------------------------------------------------
    Mutation(
        INDEX, "paged_tile.cuh", "the block table is not used",
        "block_table[source >> block_shift]",
        "source >> block_shift",
        DECODE,
    ),
    Mutation(
        INDEX, "paged_tile.cuh", "keys are loaded in place of values",
        "loaded_ % 2 == 0 ? rows_.kv.k_offset : rows_.kv.v_offset",
        "loaded_ % 2 == 0 ? rows_.kv.k_offset : rows_.kv.k_offset",
        DECODE,
    ),
    Mutation(
        INDEX, "paged_tile.cuh", "no key is taken from the last place of a block",
        "source & (block_size - 1)",
        "min(source & (block_size - 1), block_size - 2)",
        DECODE,
    ),
    Mutation(
        INDEX, "paged_kv.cuh", "the slab's blocks are counted from the first slab's start",
        "    const int index = block_id & ((1 << slab_shift) - 1);\n    // 64-bit",
        "    const int index = block_id;\n    // 64-bit",
        ("rope",),
    ),
    Mutation(
        INDEX, "paged_kv.cuh", "every head writes to head 0",
        "((long long)index * num_kv_heads + kv_head) * (block_size * kHeadDim)",
        "((long long)index * num_kv_heads) * (block_size * kHeadDim)",
        ("rope",),
    ),
    Mutation(
        INDEX, "paged_kv.cuh", "chunks are not permuted within their rows",
        "(chunk % 8 ^ row % 8)",
        "(chunk % 8)",
        ("rope",),
    ),
    Mutation(
        INDEX, "rope.cu", "the slot's place in its block is not taken modulo the block size",
        "dst_a = block + chunk_offset<kHeadDim>(slot % kBlockSize,",
        "dst_a = block + chunk_offset<kHeadDim>(slot,",
        ("rope",),
    ),
    Mutation(
        INDEX, "rope.cu", "keys and values change places",
        "is_value ? kv.v_offset : kv.k_offset",
        "!is_value ? kv.v_offset : kv.k_offset",
        ("rope",),
    ),
    Mutation(
        INDEX, "rope.cuh", "pairs are neighbours in the cosine table, not halves",
        "load_float8(cos_sin + rotary_dim / 2 + first)",
        "load_float8(cos_sin + first)",
        ("rope",),
    ),
    Mutation(
        INDEX, "rope.cu", "values are counted with the keys' heads",
        "head - num_heads - (is_value ? kv.num_kv_heads : 0)",
        "head - num_heads",
        ("rope",),
    ),
    Mutation(
        INDEX, "paged_decode.cu", "all splits leave their result in one place",
        "(first_out + row) * num_splits + split_index;",
        "(first_out + row) * num_splits;",
        DECODE,
    ),
    Mutation(
        INDEX, "paged_decode.cu", "the second tile of a group's heads begins at the first again",
        "kv_head * group + first_row;",
        "kv_head * group;",
        DECODE,
    ),
    Mutation(
        INDEX, "linear_tile.cuh", "the last group of token tiles is taken for a whole one",
        "min(kGroupM, tiles_m - group * kGroupM)",
        "kGroupM",
        ("linear",),
    ),
    Mutation(
        INDEX, "linear_small.cu", "registers of the weights' fragment change places",
        "{low[0], high[0], low[1], high[1]}",
        "{low[0], low[1], high[0], high[1]}",
        ("linear",),
    ),
    Mutation(
        INDEX, "linear_small.cu", "the scale of a normed row is of one warp's columns",
        "square += squares[w * kTokens",
        "square += squares[warp * kTokens",
        ("linear",),
    ),
    Mutation(
        INDEX, "linear_small.cu", "gate and up change places",
        "silu_and_mul(total(out_token, gate), total(out_token, gate + 1))",
        "silu_and_mul(total(out_token, gate + 1), total(out_token, gate))",
        ("linear",),
    ),
    Mutation(
        INDEX, "linear.cu", "the activated columns are counted as those of the products",
        "place.first_output / 2, n / 2, false);",
        "place.first_output, n / 2, false);",
        ("linear",),
    ),
    Mutation(
        INDEX, "copy_blocks.cu", "the destination is found with the source's slab size",
        "run_of_block(dst_slabs, dst_slab_shift,",
        "run_of_block(dst_slabs, src_slab_shift,",
        ("copy_blocks",),
    ),
    # -- edges --------------------------------------------------------------------------------------------------
    Mutation(
        EDGE, "rms_norm.cu", "8 elements past the row are read",
        "if (i >= hidden_size) break;\n    v[n]",
        "if (i > hidden_size) break;\n    v[n]",
        ("rms_norm",),
    ),
    Mutation(
        EDGE, "linear_tile.cuh", "one chunk past the row is copied",
        "row + i * kRowsAtOnce < num_rows && column < k",
        "row + i * kRowsAtOnce < num_rows && column <= k",
        ("linear",),
    ),
    Mutation(
        EDGE, "linear_tile.cuh", "one row past the last is copied",
        "row + i * kRowsAtOnce < num_rows && column < k",
        "row + i * kRowsAtOnce <= num_rows && column < k",
        ("linear",),
    ),
    Mutation(
        EDGE, "linear_epilogue.cuh", "one token past the last is stored",
        "first_row + row < num_rows ?",
        "first_row + row <= num_rows ?",
        ("linear",),
    ),
    Mutation(
        EDGE, "linear_small.cu", "one token past the last is copied",
        "token + 8 * i < m);",
        "token + 8 * i <= m);",
        ("linear",),
    ),
    Mutation(
        EDGE, "linear_small.cu", "one normed token past the last is read",
        "first + piece * kPiece < k && token < m)\n",
        "first + piece * kPiece < k && token <= m)\n",
        ("linear",),
    ),
    Mutation(
        EDGE, "warp_attention.cuh", "a token attends to its successor",
        "key >= row_end ||",
        "key > row_end ||",
        PREFILL,
    ),
    Mutation(
        EDGE, "warp_attention.cuh", "the window is one key too small",
        "key < row_end - window",
        "key <= row_end - window",
        ATTENTION,
    ),
    Mutation(
        EDGE, "paged_prefill.cu", "splits lie where the first row's keys begin",
        "(first + index) * kSplitKeys",
        "begin + index * kSplitKeys",
        PREFILL,
    ),
    Mutation(
        EDGE, "paged_prefill.cu", "keys that end with a split have another one",
        "(end - 1) / kSplitKeys - first + 1",
        "end / kSplitKeys - first + 1",
        PREFILL,
    ),
    Mutation(
        EDGE, "paged_prefill.cu", "a tile that ends one key too late is not masked",
        "first_key + kKeys <= warp_first_end &&",
        "first_key + kKeys <= warp_first_end + 1 &&",
        PREFILL,
    ),
    Mutation(
        EDGE, "prefill_rows.cuh", "one row past the tile's last is stored",
        "if (first + row < num_rows)",
        "if (first + row <= num_rows)",
        PREFILL,
    ),
    Mutation(
        EDGE, "paged_decode.cu", "a tile that begins before the split's range is not masked",
        "if (first_key < begin || first_key + kKeys > end)",
        "if (first_key + kKeys > end)",
        DECODE,
    ),
    Mutation(
        EDGE, "decode_splits.cuh", "the last split ends with the longest sequence",
        "return min(seq_len, start() + (split + 1) * size);",
        "return start() + (split + 1) * size;",
        DECODE,
    ),
    Mutation(
        EDGE, "embedding.cu", "the id after the last row is taken for a row",
        "id < num_rows;",
        "id <= num_rows;",
        ("embedding",),
    ),
    Mutation(
        EDGE, "take_tokens.cu", "the row after the last one is read",
        "row < num_drawn",
        "row <= num_drawn",
        ("take_tokens",),
    ),
    Mutation(
        EDGE, "rope.cu", "slot -1 is written to",
        "stored = slot >= 0;",
        "stored = slot >= -1;",
        ("rope",),
    ),
    Mutation(
        EDGE, "sampler.cu", "a draw at the very start of a token goes to the token before",
        "drawn += before <= point;",
        "drawn += before < point;",
        ("sampler",),
    ),
    Mutation(
        EDGE, "sampler.cu", "a draw at the very start of one of few tokens finds none",
        "before <= point && point < before + mass)",
        "before < point && point < before + mass)",
        ("sampler",),
    ),
    Mutation(
        EDGE, "row_slices.cuh", "top_k keeps one token too many",
        "above + here >= target",
        "above + here > target",
        ("sampler",),
    ),
    Mutation(
        EDGE, "row_slices.cuh", "of few tokens, a token is not counted among those at or above it",
        "return other >= key;",
        "return other > key;",
        ("sampler",),
    ),
    Mutation(
        BLOCKS, "row_slices.cuh", "the list still counts the tokens of the launch before",
        "      row.counters->num_listed = 0;\n",
        "",
        ("sampler",),
    ),
    Mutation(
        BLOCKS, "row_slices.cuh", "the last thread block to arrive takes itself for the first of the next launch",
        "atomicInc(counter, count - 1)",
        "atomicInc(counter, count)",
        ("sampler",),
    ),
    Mutation(
        EDGE, "logits.cu", "the mask's last word is left out",
        "id < vocab_size &&",
        "id < vocab_size / 32 * 32 &&",
        ("logits",),
    ),
    Mutation(
        EDGE, "linear_epilogue.cuh", "rows that don't start at multiples of 16 bytes are stored 16 bytes at a time",
        "if (whole_vectors && count == kVec) {",
        "if (count == kVec) {",
        ("linear",),
    ),
    Mutation(
        EDGE, "linear_epilogue.cuh", "16 bytes at a time are stored to rows that don't start there",
        "if (whole_vectors && count == kVec) {",
        "if (count == kVec) {",
        ("linear",),
    ),
    Mutation(
        EDGE, "linear.cu", "the step between two splits is left out where they are not of one size",
        "(long long)all_tiles_k * (split + 1) / num_splits - first_tile_k;",
        "all_tiles_k / num_splits;",
        ("linear",),
    ),
    Mutation(
        EDGE, "row_slices.cuh", "the last slices' ids past the vocabulary are read",
        "aligned && id + 4 <= vocab_size",
        "aligned && id < vocab_size",
        ("sampler",),
    ),
    # -- state and rounding -------------------------------------------------------------------------------------
    Mutation(
        STATE, "softmax_state.cuh", "arrivals are not counted from 0 again",
        "if (threadIdx.x == 0) *counter = 0;",
        "",
        PREFILL,
    ),
    Mutation(
        STATE, "softmax_state.cuh", "a row that has seen nothing gives NaN",
        "max == kNegInf ? 0.f : max",
        "max",
        ATTENTION,
    ),
    Mutation(
        STATE, "softmax_state.cuh", "an empty sequence gives NaN",
        "sum == 0.f ? 0.f : 1.f / sum",
        "1.f / sum",
        ATTENTION,
    ),
    Mutation(
        STATE, "softmax_state.cuh", "the older sum is not moved to the new maximum",
        "    sum *= factor;\n",
        "",
        ATTENTION,
    ),
    Mutation(
        STATE, "softmax_state.cuh", "sums are merged without their factor",
        "sum += other * state.sum;",
        "sum += state.sum;",
        DECODE,
    ),
    Mutation(
        STATE, "warp_attention.cuh", "half of the older results are not moved to the new maximum",
        "          out[r][j][2 * half + 1] *= factor;\n",
        "",
        ATTENTION,
    ),
    Mutation(
        STATE, "paged_decode.cu", "the counter of splits is not set back for the next launch",
        "if (threadIdx.x == 0) *counter = 0;",
        "",
        DECODE,
    ),
    Mutation(
        STATE, "common.cuh", "bfloat16 is cut off instead of rounded",
        "from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }",
        "from_float<__nv_bfloat16>(float x) { return __ushort_as_bfloat16(__float_as_uint(x) >> 16); }",
        ("rms_norm",),
    ),
    Mutation(
        STATE, "rms_norm.cu", "epsilon is added to the sum, not to the mean",
        "/ hidden_size + eps)",
        "/ (hidden_size + eps))",
        ("rms_norm",),
    ),
    Mutation(
        STATE, "linear.cu", "sums start with what was in the registers",
        "float sum[kBlocksM][kBlocksN][4] = {};",
        "float sum[kBlocksM][kBlocksN][4];",
        ("linear",),
    ),
    Mutation(
        STATE, "linear_epilogue.cuh", "what out holds is not added",
        "sums.data[e] += values[e];",
        "sums.data[e] = values[e];",
        ("linear",),
    ),
    Mutation(
        STATE, "linear.cu", "the counter of splits is not set back for the next launch",
        "    if (threadIdx.x == 0) counters[out_tile] = 0;",
        "    ",
        ("linear",),
    ),
    Mutation(
        STATE, "linear.cu", "the last split's sums are left out",
        "for (int s = 0; s < num_splits; ++s)",
        "for (int s = 0; s < num_splits - 1; ++s)",
        ("linear",),
    ),
    Mutation(
        STATE, "linear.cu", "the split that arrives last counts its own sums twice",
        "(s == 0 ? 0.f : sum[i][j][e])",
        "sum[i][j][e]",
        ("linear",),
    ),
    Mutation(
        STATE, "linear_small.cu", "what out holds is not added",
        "    if (accumulates<out_t>(epilogue)) value += held[i];\n",
        "",
        ("linear",),
    ),
    # -- between thread blocks ----------------------------------------------------------------------------------
    Mutation(
        BLOCKS, "embedding.cu", "rows are written before the kernel before this one has ended",
        "  griddepcontrol_wait();\n",
        "  if (threadIdx.x == 0) griddepcontrol_wait();\n",
        ("embedding",),
    ),
    Mutation(
        BLOCKS, "paged_decode.cu", "thread blocks without a split exit before the kernel before this one has ended",
        "  griddepcontrol_wait();\n  griddepcontrol_launch_dependents();\n  const int seq_len = seq_lens[seq];\n"
        "  const Splits splits(seq_len, window, max_splits, false);\n"
        "  const int begin = splits.begin(split_index), end = splits.end(split_index);\n"
        "  if (split_index >= max(1, splits.count)) return;",
        "  const int seq_len = seq_lens[seq];\n  const Splits splits(seq_len, window, max_splits, false);\n"
        "  const int begin = splits.begin(split_index), end = splits.end(split_index);\n"
        "  if (split_index >= max(1, splits.count)) return;\n  griddepcontrol_wait();\n",
        DECODE,
    ),
    Mutation(
        BLOCKS, "paged_decode.cu", "the last split but one merges, before the last is there",
        "== splits.count - 1;",
        "== splits.count - 2;",
        DECODE,
    ),
    Mutation(
        BLOCKS, "paged_decode.cu", "no fence before a split announces its results",
        "  __threadfence();  // this thread's partial results before its arrival\n",
        "",
        DECODE,
        why_not="thread blocks run one after another here, so global memory is always in order",
    ),
    Mutation(
        BLOCKS, "paged_decode.cu", "a split is announced before all of its threads have written",
        "before its arrival\n  __syncthreads();",
        "before its arrival",
        DECODE,
        why_not="thread blocks run one after another here: the whole block has written before the next one starts",
    ),
    Mutation(
        BLOCKS, "linear.cu", "the last split but one adds up, before the last is there",
        "== num_splits - 1;",
        "== num_splits - 2;",
        ("linear",),
    ),
    Mutation(
        BLOCKS, "linear.cu", "no fence before a split announces its sums",
        "    __threadfence();  // this thread's sums before its arrival\n",
        "",
        ("linear",),
        why_not="thread blocks run one after another here, so global memory is always in order",
    ),
    Mutation(
        BLOCKS, "linear.cu", "a split is announced before all of its threads have written",
        "before its arrival\n    __syncthreads();",
        "before its arrival",
        ("linear",),
        why_not="thread blocks run one after another here: the whole block has written before the next one starts",
    ),
    Mutation(
        BLOCKS, "rms_norm.cu", "a row's offset is computed in 32 bits",
        "(long long)blockIdx.x * hidden_size;",
        "(int)(blockIdx.x * hidden_size);",
        ("rms_norm",),
        why_not="it takes an array of more than 2^31 elements, too large for these tests",
    ),
)  # fmt: skip


# -- running them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    caught: bool
    test: str = ""  # the first that failed
    finding: str = ""  # its message
    seconds: float = 0

    @property
    def how(self) -> str:
        """What kind of check found it."""
        if not self.caught:
            return ""
        for how, pattern in FINDINGS.items():
            if re.search(pattern, self.finding):
                return how
        return "wrong result"


FINDINGS = {
    "race": r"race: ",
    "out of bounds": r"out of bounds: ",
    "undefined behaviour": r"undefined behaviour: ",
    "collective": r"does not take part|not reached by all|in which it is not|which is not in mask",
}


def apply(mutation: Mutation, folder: Path) -> None:
    """Write a copy of the sources with the bug in it to the folder."""
    shutil.copytree(SOURCES, folder)
    path = folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        sys.exit(f"{mutation.file}: {mutation.bug}: the text occurs {text.count(mutation.old)} times, not once")
    path.write_text(text.replace(mutation.old, mutation.new))


def run_tests(stems: Sequence[str], sources: Path, scratch: Path) -> tuple[int, str]:
    """(pytest's exit status, its output) of the tests over other sources, up to the first failure."""
    files = [str(TESTS / f"test_{stem}.py") for stem in stems]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "not gpu"]
    environment = os.environ | {"CUPAGED_HOST_SOURCES": str(sources), "TMPDIR": str(scratch)}
    try:
        result = subprocess.run(
            [*command, *files], capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return 1, f"FAILED {files[0]}::one_of_its_tests\nTimeoutError: no end within {TIMEOUT} seconds"
    if "doesn't compile for the host" in result.stdout:
        sys.exit(f"{sources}: a mutant must compile:\n{result.stdout}")
    return result.returncode, result.stdout


def try_mutation(mutation: Mutation, scratch: Path) -> Outcome:
    sources = scratch / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    apply(mutation, sources)
    start = time.monotonic()
    status, output = run_tests(mutation.tests, sources, scratch)
    seconds = time.monotonic() - start
    if status == 0:
        return Outcome(mutation, False, seconds=seconds)
    test = re.search(r"^FAILED \S*?(test_\w+\.py::\S+)", output, re.MULTILINE)
    finding = re.search(r"^E +(?:[\w.]+: )?(.*)|(?:Error|Exception): (.*)", output, re.MULTILINE)
    if not test or not finding:
        sys.exit(f"{mutation.file}: {mutation.bug}: pytest ended with {status}:\n{output}")
    return Outcome(mutation, True, test[1], finding[1] or finding[2], seconds)


def report(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "# Mutation check of the kernels",
        "",
        "Written by `python tests/host/mutate.py`: each bug was planted alone in a copy of the kernels, then the "
        "kernel's tests ran on the host build. Caught means that a test failed.",
        "",
        "| kind | caught | planted |",
        "|---|---|---|",
    ]
    kinds = dict.fromkeys(outcome.mutation.kind for outcome in outcomes)
    for kind in [*kinds, None]:
        of_kind = [outcome for outcome in outcomes if kind in (None, outcome.mutation.kind)]
        lines.append(f"| {kind or '**all**'} | {sum(outcome.caught for outcome in of_kind)} | {len(of_kind)} |")
    lines += ["", "Found as:", "", "| finding | mutants |", "|---|---|"]
    for how in [*FINDINGS, "wrong result"]:
        lines.append(f"| {how} | {sum(outcome.how == how for outcome in outcomes)} |")
    missed = [outcome.mutation for outcome in outcomes if not outcome.caught]
    if missed:
        lines += ["", "## Not caught", ""]
        lines += [f"- `{m.file}`: {m.bug}: {m.why_not or '**no reason known: a test is missing**'}" for m in missed]
    lines += ["", "## Caught", "", "| kind | file | bug | found as | by |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        if outcome.caught:
            m = outcome.mutation
            test = outcome.test.split("[")[0].split("::")[1]  # without its parameters and file
            lines.append(f"| {m.kind} | `{m.file}` | {m.bug} | {outcome.how} | `{test}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="mutations whose kind, file or bug has the word")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only in f"{m.kind} {m.file} {m.bug}"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for mutation in chosen:  # all texts must be there before hours are spent
            apply(mutation, scratch / "sources")
            shutil.rmtree(scratch / "sources")
        stems = sorted({stem for mutation in chosen for stem in mutation.tests})
        status, output = run_tests(stems, SOURCES, scratch)
        if status:
            sys.exit(f"the tests must pass before bugs are planted:\n{output}")
        outcomes = []
        for mutation in chosen:
            outcome = try_mutation(mutation, scratch)
            outcomes.append(outcome)
            verdict = f"caught: {outcome.finding}" if outcome.caught else "NOT CAUGHT"
            print(f"{outcome.seconds:5.0f} s  {mutation.file}: {mutation.bug}: {verdict}", flush=True)
    print(f"{sum(outcome.caught for outcome in outcomes)} of {len(outcomes)} caught")
    if not options.only:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report(outcomes))


if __name__ == "__main__":
    main()
