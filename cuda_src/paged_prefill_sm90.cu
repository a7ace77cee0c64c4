// paged_prefill_sm90.cu: what paged_prefill.cu computes, on Hopper's warpgroup products.
//
// Work:     one thread block per (tile of 128 query rows, sequence, kv head); rows are laid out as in paged_prefill.cu.
//           Its first warpgroup fetches the queries, then tiles of kKeys keys and values in turn (K0 V0 K1 V1 ...) into
//           a ring of four; the two others own 64 rows each. While the tensor cores weigh the values of one tile, after
//           they have scored the next, the scores' softmax is taken; and where one warpgroup waits, the other goes on.
// Barriers: as in linear_sm90.cu: full[s] is arrived at by each fetching thread, empty[s] by each multiplying warp. A
//           warpgroup whose rows see nothing of a tile takes part in its barriers all the same.
// Numerics: as in paged_prefill.cu, and as there a token's bits don't depend on how its prompt was cut into chunks, nor
//           on the batch.
// Bound:    flops, 4 * head_dim a row and key: 2,048 clocks of the tensor cores for a tile of 128 keys at head_dim 128,
//           beside 1,024 of the units that take powers of 2. Measured: docs/performance.md.
#include "common.cuh"
#include "paged_kv.cuh"
#include "paged_tile.cuh"
#include "ptx_sm90.cuh"
#include "softmax_state.cuh"
#include "warp_attention.cuh"

constexpr int kGroup = 128;              // threads of a warpgroup
constexpr int kConsumers = 2;            // warpgroups that multiply
constexpr int kGroupRows = 64;           // query rows of each
constexpr int kRows = kConsumers * kGroupRows;
constexpr int kSlots = 4;                // tiles in the ring: keys in the even ones, values in the odd ones
constexpr int kLag = 2;                  // tiles between starting copies and waiting for them
constexpr int kStagedDims = 64;          // dimensions of a warp's results that are stored at a time
constexpr int kStagedRow = kStagedDims + 8;  // elements; the 8 extra ones spread the rows over the banks

// Where the 16-byte chunks of a tile [kTileRows, kHeadDim] lie, as wgmma wants them: panels of 64 columns.
template <int kHeadDim, int kTileRows>
struct PanelLayout {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kPanel = kTileRows * 64;  // elements
  static_assert(kHeadDim % 64 == 0 && kTileRows % 8 == 0, "whole panels of whole groups of rows");

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return chunk / 8 * kPanel + (row * 8 + (chunk % 8 ^ row % 8)) * 8;
  }
};

// grid (num_kv_heads, sequences from first_seq on, tiles that the longest query has), 3 warpgroups
template <typename scalar_t,  // __half or __nv_bfloat16: q, cache, out
          int kHeadDim,       // dimensions of a head: 64 or 128
          int kKeys>          // keys a tile
__global__ void __launch_bounds__((1 + kConsumers) * kGroup, 1)
paged_prefill_sm90(scalar_t* __restrict__ out,               // [num_tokens, num_heads, kHeadDim]
                   const scalar_t* __restrict__ qkv,         // [num_tokens, num_heads + 2 * num_kv_heads, kHeadDim]; q
                   const int* __restrict__ block_tables,     // [num_seqs, max_blocks]
                   const int* __restrict__ seq_lens,         // [num_seqs]
                   const int* __restrict__ query_start_loc,  // [num_seqs + 1]
                   PagedKV kv, int num_heads, int max_blocks, int block_shift, int first_seq, int window,
                   float scale) {  // sm_scale * log2(e)
  using QueryLayout = PanelLayout<kHeadDim, kRows>;
  using TileLayout = PanelLayout<kHeadDim, kKeys>;
  constexpr int kTileSize = kKeys * kHeadDim;  // elements
  static_assert(kKeys == kGroup, "each fetching thread looks up one row of a tile");

  const int kv_head = blockIdx.x, seq = first_seq + blockIdx.y;
  const int group = num_heads / kv.num_kv_heads;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int query_start = query_start_loc[seq];
  const int query_len = query_start_loc[seq + 1] - query_start;
  const int num_rows = query_len * group;
  const int first_row = (gridDim.z - 1 - blockIdx.z) * kRows;
  if (first_row >= num_rows) return;  // the whole thread block

  // Row r attends to keys below end_of(r), its token's position + 1.
  const int context_len = seq_lens[seq] - query_len;
  const auto end_of = [&](int row) { return context_len + min(row, num_rows - 1) / group + 1; };
  const PagedRows rows{kv, block_tables + (long long)seq * max_blocks, block_shift, kv_head,
                       max(0, end_of(first_row) - window), end_of(first_row + kRows - 1)};
  const int first_key = rows.begin / kKeys * kKeys;
  const int num_tiles = rows.end > rows.begin ? ceil_div(rows.end - first_key, kKeys) : 0;

  DYNAMIC_SHARED(shared);
  scalar_t* q_tile = reinterpret_cast<scalar_t*>(shared + (1024 - shared_address(shared) % 1024) % 1024);
  scalar_t* ring = q_tile + kRows * kHeadDim;       // [kSlots][kKeys, kHeadDim]
  scalar_t* staged = ring + kSlots * kTileSize;     // [8 warps][16][kStagedRow]
  auto* full = reinterpret_cast<unsigned long long*>(staged + kConsumers * 4 * 16 * kStagedRow);  // [kSlots]
  auto* empty = full + kSlots;                                                                    // [kSlots]
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(full + slot, kGroup);
      mbarrier_init(empty + slot, kConsumers * 4);
    }
  }
  __syncthreads();

  // Fill f is that of the keys of tile f / 2 if f is even, of its values if odd.
  const int num_fills = 2 * num_tiles;
  if (threadIdx.x < kGroup) {
    setmaxnreg_dec<56>();
    auto hand_over = [&](int fill) {
      fence_proxy_async();
      mbarrier_arrive(full + fill % kSlots);
    };
    // The queries arrive with the first keys.
    for (int i = threadIdx.x; i < kRows * QueryLayout::kChunks && num_fills > 0; i += kGroup) {
      const int row = i / QueryLayout::kChunks, chunk = i % QueryLayout::kChunks;
      const int source = min(first_row + row, num_rows - 1);
      const long long token = query_start + source / group;
      const int head = kv_head * group + source % group;
      cp_async_16(q_tile + QueryLayout::offset(row, chunk),
                  qkv + (token * (num_heads + 2 * kv.num_kv_heads) + head) * kHeadDim + chunk * 8,
                  source == first_row + row);
    }
    // Each thread looks up the block of one row of a tile, once for its keys and values; then a warp copies the rows of its
    // lanes, which hand these addresses around. Rows outside of the range become zeros and are not read, as in
    // PagedRows::copy.
    const int lane = threadIdx.x % kWarpSize;
    const int warp_row = threadIdx.x - lane;
    const int block_size = 1 << block_shift;
    const scalar_t* lane_block = nullptr;
    unsigned valid_rows = 0;
    for (int fill = 0; fill < num_fills; ++fill) {
      if (fill % 2 == 0) {
        const int key = first_key + fill / 2 * kKeys + threadIdx.x;
        const int source = min(max(key, rows.begin), rows.end - 1);  // a row that exists
        lane_block = kv.block<scalar_t, kHeadDim>(kv.k_offset, rows.block_table[source >> block_shift], kv_head,
                                                  block_size);
        valid_rows = __ballot_sync(kFullMask, key == source);
      } else {
        lane_block += kv.v_offset - kv.k_offset;
      }
      if (fill >= kSlots) mbarrier_wait(empty + fill % kSlots, (fill / kSlots - 1) % 2);
      scalar_t* tile = ring + fill % kSlots * kTileSize;
#pragma unroll 4
      for (int i = lane; i < kWarpSize * TileLayout::kChunks; i += kWarpSize) {
        const int row = i / TileLayout::kChunks, chunk = i % TileLayout::kChunks;
        const auto block = reinterpret_cast<const scalar_t*>(
            __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(lane_block), row));
        // A tile begins with a block, so that its rows are also counted within theirs.
        const int offset = chunk_offset<kHeadDim>((warp_row + row) & (block_size - 1), chunk, block_size);
        cp_async_16(tile + TileLayout::offset(warp_row + row, chunk), block + offset, valid_rows >> row & 1);
      }
      cp_async_commit_group();
      if (fill >= kLag) {
        cp_async_wait_group<kLag>();
        hand_over(fill - kLag);
      }
    }
    cp_async_wait_group<0>();
    for (int fill = max(0, num_fills - kLag); fill < num_fills; ++fill) hand_over(fill);
  } else {
    setmaxnreg_inc<224>();
    const int warp = threadIdx.x / kWarpSize - 4;
    const int lane = threadIdx.x % kWarpSize;
    const int group_row = first_row + warp / 4 * kGroupRows;  // the first row of the warpgroup
    const int warp_row = first_row + warp * 16;               // and of the warp
    const int row_end[2] = {end_of(warp_row + lane / 4), end_of(warp_row + lane / 4 + 8)};
    const int warp_first_end = end_of(warp_row), warp_last_end = end_of(warp_row + 15);

    // The tiles of which the warpgroup's rows see anything.
    const int seen_begin = max(0, max(0, end_of(group_row) - window) - first_key) / kKeys;
    const int seen_end = group_row < num_rows ? min(num_tiles, ceil_div(end_of(group_row + kGroupRows - 1) - first_key,
                                                                        kKeys))
                                              : seen_begin;

    auto wait_for = [&](int fill) { mbarrier_wait(full + fill % kSlots, fill / kSlots % 2); };
    auto release = [&](int fill) {
      if (lane == 0) mbarrier_arrive(empty + fill % kSlots);
    };
    auto skip = [&](int begin, int end) {
      for (int fill = 2 * begin; fill < 2 * end; ++fill) {
        wait_for(fill);
        release(fill);
      }
    };

    float scores[kKeys / 2] = {};
    float sums[kHeadDim / 2] = {};  // of weighted values, on the base of their row's state
    unsigned weights[kKeys / 16][4];
    SoftmaxState state[2];  // of rows lane / 4 and + 8; sum is this lane's share

    auto start_scores = [&](int tile) {
      wait_for(2 * tile);
      const scalar_t* q = q_tile + warp / 4 * kGroupRows * 64;
      const scalar_t* k = ring + 2 * tile % kSlots * kTileSize;
      wgmma_fence();
#pragma unroll
      for (int panel = 0; panel < kHeadDim / 64; ++panel) {
        const unsigned long long a = wgmma_descriptor(q + panel * QueryLayout::kPanel);
        const unsigned long long b = wgmma_descriptor(k + panel * TileLayout::kPanel);
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          if (panel == 0 && part == 0)
            wgmma_ss<scalar_t, false>(scores, a, b);
          else
            wgmma_ss<scalar_t>(scores, a + 2 * part, b + 2 * part);
        }
      }
      wgmma_commit_group();
    };
    auto start_values = [&](int tile) {
      wait_for(2 * tile + 1);
      const unsigned long long b = wgmma_transposed(ring + (2 * tile + 1) % kSlots * kTileSize,
                                                    TileLayout::kPanel * (int)sizeof(scalar_t));
      wgmma_fence();
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) wgmma_rs<scalar_t>(sums, weights[n], b + 128 * n);
      wgmma_commit_group();
    };
    // Turns scores into weights, still in float32, and gives the factors that move sums to the rows' new bases.
    auto softmax = [&](int tile, float (&factors)[2]) {
      const int key = first_key + tile * kKeys;
      if (key + kKeys > warp_first_end || key < warp_last_end - window) {  // some row doesn't see all of the tile
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int position = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
          const int end = row_end[i / 2 % 2];
          if (position >= end || position < end - window) scores[i] = kNegInf;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = kNegInf;
#pragma unroll
        for (int i = 2 * half; i < kKeys / 2; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));  // now over the row's four lanes
        factors[half] = state[half].raise_max(top * scale);
        const float base = state[half].base();
#pragma unroll
        for (int i = 2 * half; i < kKeys / 2; i += 4) {
          scores[i] = exp2f(fmaf(scores[i], scale, -base));
          scores[i + 1] = exp2f(fmaf(scores[i + 1], scale, -base));
          state[half].sum += scores[i] + scores[i + 1];
        }
      }
    };
    auto round_weights = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2)
        weights[i / 8][i / 2 % 4] = pack_pair<scalar_t>(scores[i], scores[i + 1]);
    };

    skip(0, min(seen_begin, num_tiles));
    if (seen_begin < seen_end) {
      float factors[2];
      start_scores(seen_begin);
      wgmma_wait_group<0>();
      wgmma_hold(scores);
      release(2 * seen_begin);
      softmax(seen_begin, factors);  // there are no sums yet to move
      round_weights();
      for (int tile = seen_begin; tile + 1 < seen_end; ++tile) {
        start_scores(tile + 1);
        start_values(tile);
        wgmma_wait_group<1>();  // the scores
        wgmma_hold(scores);
        release(2 * tile + 2);
        softmax(tile + 1, factors);
        wgmma_wait_group<0>();  // the values
        wgmma_hold(sums);
        release(2 * tile + 1);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) sums[i] *= factors[i / 2 % 2];
        round_weights();
      }
      start_values(seen_end - 1);
      wgmma_wait_group<0>();
      wgmma_hold(sums);
      release(2 * seen_end - 1);
    }
    skip(max(seen_begin, seen_end), num_tiles);

    // This warp's 16 rows of results, some dimensions at a time, through shared memory into whole vectors.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = state[half].sum;
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      const float factor = state[half].inverse_sum();
#pragma unroll
      for (int i = 2 * half; i < kHeadDim / 2; i += 4) {
        sums[i] *= factor;
        sums[i + 1] *= factor;
      }
    }
    scalar_t* results = staged + warp * 16 * kStagedRow;
#pragma unroll
    for (int start = 0; start < kHeadDim; start += kStagedDims) {
      __syncwarp();  // the last dimensions have been read
#pragma unroll
      for (int i = 0; i < kStagedDims / 2; i += 2)
        *reinterpret_cast<unsigned*>(results + (lane / 4 + i / 2 % 2 * 8) * kStagedRow + i / 4 * 8 + lane % 4 * 2) =
            pack_pair<scalar_t>(sums[start / 2 + i], sums[start / 2 + i + 1]);
      __syncwarp();
      for (int i = lane; i < 16 * kStagedDims / 8; i += kWarpSize) {
        const int row = i / (kStagedDims / 8), column = i % (kStagedDims / 8) * 8;
        const int source = warp_row + row;
        if (source < num_rows) {
          const long long token = query_start + source / group;
          const int head = kv_head * group + source % group;
          store_vec(out + (token * num_heads + head) * kHeadDim + start + column,
                    load_vec(results + row * kStagedRow + column));
        }
      }
    }
  }
}
