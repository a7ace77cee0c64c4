// paged_prefill_sm90.cu: what paged_prefill.cu computes, on Hopper's warpgroup products.
//
// Work:     as many thread blocks as SMs, which take tiles of 128 query rows (rows: prefill_rows.cuh) of a sequence and
//           a kv head, the longest first (TileWalk). Of the first warpgroup, one warp has tiles of kKeys keys brought
//           by the copy engine, as they lie in the cache, one those of values; the two others fetch queries, a tile
//           ahead. The second and third warpgroup multiply, 64 rows each.
// Overlap:  while the tensor cores weigh the values of one tile, after they have scored the keys of the next, a
//           warpgroup takes the softmax of those scores; also where the next keys are those of the next tile of rows.
//           The warpgroups take turns in giving the tensor cores work (Turns), so that one's softmax runs under the
//           other's products.
// Splits:   keys are split at the multiples of kSplitKeys. Each split has sums of its own, which are then merged in
//           order, so that it makes no difference who has taken it: one thread block all of a tile's, one after the
//           other, or where tiles of rows are few, a thread block each. Then the last to arrive merges. Till then a
//           warp's sums lie in memory as its lanes have them (an image).
// Barriers: ..._full[s] completes when the bytes have come to slot s (of the queries: when those who fetch them have
//           arrived), ..._empty[s] when all multiplying warps have done with them.
// Numerics: as in paged_prefill.cu, but for sums, whose base follows the maximum only where that has grown by much. A
//           token's bits don't depend on how its prompt was cut into chunks, nor on the batch or the grid.
// Bound:    flops, 4 * head_dim a row and key: 2,048 clocks of the tensor cores for a tile of 128 keys at head_dim 128,
//           beside 1,024 of the units that take powers of 2. Measured: docs/performance.md.
#include "common.cuh"
#include "paged_kv.cuh"
#include "prefill_rows.cuh"
#include "ptx_sm90.cuh"
#include "softmax_state.cuh"
#include "warp_attention.cuh"

constexpr int kGroup = 128;              // threads of a warpgroup
constexpr int kConsumers = 2;            // warpgroups that multiply
constexpr int kGroupRows = 64;           // query rows of each
constexpr int kRows = kConsumers * kGroupRows;
constexpr int kSlots = 2;                // tiles of keys, and of values: in use, and on its way
constexpr int kQueryTiles = 2;           // of the queries: in use, and on its way
constexpr int kQueryThreads = kGroup - 2 * kWarpSize;  // that fetch queries

// Where the 16-byte chunks of a tile [kTileRows, kColumns] lie, as wgmma wants them: as in a block of the cache.
template <int kColumns, int kTileRows>
struct PanelLayout {
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kPanel = kTileRows * 64;  // elements
  static_assert(kColumns % 64 == 0 && kTileRows % 8 == 0, "whole panels of whole groups of rows");

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return chunk_offset<kColumns>(row, chunk, kTileRows);
  }
};

// A tile of query rows, and the keys begin .. end - 1 that it needs, in tiles that begin at multiples of kKeys; or one
// split of these keys.
template <int kKeys, int kSplitKeys>
struct RowTile {
  PrefillRows rows;
  int first_row;
  int begin, end;
  int first_key;  // of the first tile
  int num_tiles;  // one at least, if of no keys
  int num_splits;  // of all its keys; one at least

  __device__ __forceinline__ RowTile(const PrefillRows& rows, int first_row, int window)
      : rows(rows), first_row(first_row) {
    begin = max(0, rows.end_of(first_row) - window);
    end = rows.end_of(first_row + kRows - 1);
    num_splits = max(1, ceil_div(end, kSplitKeys) - begin / kSplitKeys);
    count_tiles();
  }

  // Take this one of the splits, if there are so many.
  __device__ __forceinline__ void keep(int split) {
    const int first = (begin / kSplitKeys + split) * kSplitKeys;
    begin = max(begin, first);
    end = min(end, first + kSplitKeys);
    count_tiles();
  }

 private:
  __device__ __forceinline__ void count_tiles() {
    first_key = begin / kKeys * kKeys;
    num_tiles = max(1, ceil_div(end - first_key, kKeys));
  }
};

// The tiles of query rows that a thread block takes. Those of all sequences and kv heads stand in one order, the last
// rows first, and are dealt out to the thread blocks forth and back, so that each gets as many long ones. Or the splits
// of the tiles are, as many of each as the longest one has.
// A warp walks as one. Each warp that needs to know walks for itself.
class TileWalk {
 public:
  int seq, kv_head, first_row;  // of the tile, once next() has been called
  int item;                     // its number among all tiles, times the most splits, plus that of its split

  __device__ __forceinline__ TileWalk(const int* query_start_loc,  // of the first sequence on
                                      const Divisor& num_seqs, int num_row_tiles, const Divisor& num_kv_heads,
                                      int group, const Divisor& num_splits)
      : query_start_loc_(query_start_loc), num_seqs_(num_seqs), num_kv_heads_(num_kv_heads), num_splits_(num_splits),
        group_(group), num_row_tiles_(num_row_tiles) {}

  // Whether there is another tile.
  __device__ __forceinline__ bool next() {
    item = round_ * gridDim.x + (round_ % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    ++round_;
    const int tile = item / num_splits_;
    const int wanted = tile / num_kv_heads_;
    while (wanted >= passed_ + __popc(present_)) {
      passed_ += __popc(present_);
      place_ += kWarpSize;
      if (place_ >= num_row_tiles_ * num_seqs_.value) return false;
      present_ = __ballot_sync(kFullMask, is_present(place_ + threadIdx.x % kWarpSize));
    }
    unsigned rest = present_;
    for (int i = passed_; i < wanted; ++i) rest &= rest - 1;
    const int place = place_ + __ffs(rest) - 1;
    seq = place % num_seqs_;
    first_row = first_row_of(place);
    kv_head = tile % num_kv_heads_;
    return true;
  }

 private:
  __device__ __forceinline__ int first_row_of(int place) const {
    return (num_row_tiles_ - 1 - place / num_seqs_) * kRows;
  }
  __device__ __forceinline__ bool is_present(int place) const {
    if (place >= num_row_tiles_ * num_seqs_.value) return false;
    const int* start = query_start_loc_ + place % num_seqs_;
    return first_row_of(place) < (start[1] - start[0]) * group_;
  }

  const int* query_start_loc_;
  const Divisor &num_seqs_, &num_kv_heads_, &num_splits_;
  int group_, num_row_tiles_;
  // A place for a tile is a (row tile, sequence), whether the sequence has so many rows or not.
  int place_ = -kWarpSize;  // the first of the 32 that are looked at
  unsigned present_ = 0;    // which of them are tiles
  int passed_ = 0;          // tiles before them
  int round_ = 0;
};

// The warpgroups' turns. Each takes one and passes it on equally often.
class Turns {
 public:
  __device__ __forceinline__ explicit Turns(int group) : group_(group) {
    if (group == kConsumers - 1) pass();
  }
  __device__ __forceinline__ void take() const { bar_sync(1 + group_, 2 * kGroup); }
  __device__ __forceinline__ void pass() const { bar_arrive(1 + (group_ + 1) % kConsumers, 2 * kGroup); }
  __device__ __forceinline__ void end() const {
    if (group_ == 0) take();
  }

 private:
  int group_;
};

// Grid: any number of thread blocks of 1 + kConsumers warpgroups; as many as SMs is best.
template <typename scalar_t,  // __half or __nv_bfloat16: q, cache, out
          int kHeadDim,       // dimensions of a head: 64 or 128
          int kKeys,          // keys a tile
          int kSplitKeys>          // keys whose sums are put by themselves: a multiple of kKeys
__global__ void __launch_bounds__((1 + kConsumers) * kGroup, 1)
paged_prefill_sm90(scalar_t* __restrict__ out,               // [num_tokens, num_heads, kHeadDim]
                   const scalar_t* __restrict__ qkv,         // [num_tokens, num_heads + 2 * num_kv_heads, kHeadDim]; q
                   const int* __restrict__ block_tables,     // [num_seqs, max_blocks]
                   const int* __restrict__ seq_lens,         // [num_seqs]
                   const int* __restrict__ query_start_loc,  // [num_seqs + 1]
                   PagedKV kv,
                   Divisor group,  // query heads a kv head
                   int max_blocks, int block_shift, int first_seq, int window,
                   float scale,  // sm_scale * log2(e)
                   Divisor num_kv_heads,
                   Divisor num_seqs,   // from first_seq on
                   int num_row_tiles,  // that the longest query has
                   Divisor num_splits,  // 1: a thread block takes all keys of a tile; else the most splits of a tile
                   float* images,      // scratch: [gridDim.x] images of tiles, or [tiles, num_splits] if that isn't 1
                   int* counters) {    // [tiles][4 * kConsumers] zeros before and after
  static_assert(kSplitKeys % kKeys == 0, "splits begin with a tile of keys");
  using QueryLayout = PanelLayout<kHeadDim, kRows>;
  using TileLayout = PanelLayout<kHeadDim, kKeys>;
  using StagedLayout = PanelLayout<64, 16>;      // a warp's rows of results, some dimensions at a time
  constexpr int kQuerySize = kRows * kHeadDim;  // elements
  constexpr int kTileSize = kKeys * kHeadDim;

  DYNAMIC_SHARED(shared);
  scalar_t* queries = reinterpret_cast<scalar_t*>(shared + (1024 - shared_address(shared) % 1024) % 1024);
  scalar_t* keys = queries + kQueryTiles * kQuerySize;  // [kSlots][kKeys, kHeadDim]
  scalar_t* values = keys + kSlots * kTileSize;         // [kSlots][kKeys, kHeadDim]
  scalar_t* staged = values + kSlots * kTileSize;       // [4 * kConsumers warps][16, 64]
  auto* keys_full = reinterpret_cast<unsigned long long*>(staged + kRows * 64);  // [kSlots]
  auto* keys_empty = keys_full + kSlots;                                         // [kSlots]
  auto* values_full = keys_empty + kSlots;                                       // [kSlots]
  auto* values_empty = values_full + kSlots;                                     // [kSlots]
  auto* queries_full = values_empty + kSlots;                                    // [kQueryTiles]
  auto* queries_empty = queries_full + kQueryTiles;                              // [kQueryTiles]
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(keys_full + slot, 1);
      mbarrier_init(values_full + slot, 1);
      mbarrier_init(keys_empty + slot, kConsumers * 4);
      mbarrier_init(values_empty + slot, kConsumers * 4);
    }
    for (int slot = 0; slot < kQueryTiles; ++slot) {
      mbarrier_init(queries_full + slot, kQueryThreads);
      mbarrier_init(queries_empty + slot, kConsumers * 4);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const int lane = threadIdx.x % kWarpSize;
  query_start_loc += first_seq;
  seq_lens += first_seq;
  block_tables += (long long)first_seq * max_blocks;
  using Tile = RowTile<kKeys, kSplitKeys>;
  const bool splits_apart = num_splits.value > 1;
  TileWalk walk(query_start_loc, num_seqs, num_row_tiles, num_kv_heads, group.value, num_splits);
  const auto row_tile = [&] {
    const PrefillRows rows(query_start_loc, seq_lens, walk.seq, walk.kv_head, kv.num_kv_heads, group);
    Tile tile(rows, walk.first_row, window);
    if (splits_apart) tile.keep(walk.item % num_splits);
    return tile;
  };
  // Whether there is another tile, or split of one.
  const auto walk_on = [&] {
    do {
      if (!walk.next()) return false;
    } while (splits_apart && walk.item % num_splits >= row_tile().num_splits);
    return true;
  };
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();

  if (threadIdx.x < 2 * kWarpSize) {  // the first warp fetches keys, the second values
    setmaxnreg_dec<56>();
    // A lane copies one panel of one block of each tile: a part of it, where the range begins or ends within the block.
    constexpr int kPanels = kHeadDim / 64;
    static_assert(kKeys / 8 * kPanels <= kWarpSize, "blocks have 8 rows at least");
    const bool is_value = threadIdx.x >= kWarpSize;
    const long long offset = is_value ? kv.v_offset : kv.k_offset;
    scalar_t* tiles = is_value ? values : keys;
    auto* full = is_value ? values_full : keys_full;
    auto* empty = is_value ? values_empty : keys_empty;
    const int block_size = 1 << block_shift;
    const int panel = lane % kPanels, first_in_tile = lane / kPanels * block_size;
    int fill = 0;
    while (walk_on()) {
      const Tile range = row_tile();
      const int* block_table = block_tables + (long long)walk.seq * max_blocks;
      for (int tile = 0; tile < range.num_tiles; ++tile, ++fill) {
        const int first_key = range.first_key + tile * kKeys;
        const int tile_begin = max(range.begin - first_key, 0), tile_end = max(min(range.end - first_key, kKeys), 0);
        const int begin = max(tile_begin, first_in_tile), end = min(tile_end, first_in_tile + block_size);
        const scalar_t* src = nullptr;
        if (begin < end)
          src = kv.block<scalar_t, kHeadDim>(offset, block_table[(first_key + first_in_tile) >> block_shift],
                                             walk.kv_head, block_size) +
                (panel * block_size + begin - first_in_tile) * 64;
        const int slot = fill % kSlots;
        if (fill >= kSlots) mbarrier_wait(empty + slot, (fill / kSlots - 1) % 2);
        scalar_t* to = tiles + slot * kTileSize;
        if (is_value && (tile_begin > 0 || tile_end < kKeys)) {
          // Values outside of the range get a weight of 0, but what is there may be NaN.
          const auto clear = [&](int first, int last) {
            for (int i = first * TileLayout::kChunks + lane; i < last * TileLayout::kChunks; i += kWarpSize)
              store_vec(to + TileLayout::offset(i / TileLayout::kChunks, i % TileLayout::kChunks), Vec<scalar_t>{});
          };
          clear(0, tile_begin);
          clear(tile_end, kKeys);
          fence_proxy_async();
        }
        __syncwarp();
        if (lane == 0)
          mbarrier_arrive_expect_tx(full + slot, (tile_end - tile_begin) * kHeadDim * (int)sizeof(scalar_t));
        __syncwarp();
        if (begin < end)
          bulk_copy(to + panel * TileLayout::kPanel + begin * 64, src, (end - begin) * 64 * (int)sizeof(scalar_t),
                    full + slot);
      }
    }
  } else if (threadIdx.x < kGroup) {  // fetches queries
    setmaxnreg_dec<56>();
    for (int fill = 0; walk_on(); ++fill) {
      const Tile tile = row_tile();
      const int slot = fill % kQueryTiles;
      if (fill >= kQueryTiles) mbarrier_wait(queries_empty + slot, (fill / kQueryTiles - 1) % 2);
      tile.rows.template copy<QueryLayout, kRows, kQueryThreads>(queries + slot * kQuerySize, qkv, tile.first_row,
                                                                 threadIdx.x - 2 * kWarpSize);
      cp_async_commit_group();
      cp_async_wait_group<0>();
      fence_proxy_async();
      mbarrier_arrive(queries_full + slot);
    }
  } else {
    setmaxnreg_inc<224>();
    const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0) - 4;  // known to be one for all lanes
    const Turns turns(warp / 4);

    float scores[kKeys / 2];
    unsigned weights[kKeys / 16][4];
    float sums[kHeadDim / 2] = {};  // of weighted values, on the base of their row's state
    float factors[2];               // that move them to the next base
    SoftmaxState state[2];          // of rows lane / 4 and + 8; sum is this lane's share

    int seen_begin, seen_end;       // keys that all of the warp's rows see
    auto find_seen = [&](const Tile& tile) {
      const int warp_row = tile.first_row + warp * 16;
      seen_begin = tile.rows.end_of(warp_row + 15) - window;
      seen_end = tile.rows.end_of(warp_row);
    };

    auto release = [&](unsigned long long* barrier) {
      if (lane == 0) mbarrier_arrive(barrier);
    };
    auto start_scores = [&](int query_slot, int slot) {
      const unsigned long long a = wgmma_descriptor(queries + query_slot * kQuerySize + warp / 4 * kGroupRows * 64);
      const unsigned long long b = wgmma_descriptor(keys + slot * kTileSize);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const int panel = i / 4, part = i % 4;
        if (i == 0)
          wgmma_ss<scalar_t, false>(scores, a, b);
        else  // descriptors count by 16 bytes
          wgmma_ss<scalar_t>(scores, a + panel * QueryLayout::kPanel / 8 + 2 * part,
                             b + panel * TileLayout::kPanel / 8 + 2 * part);
      }
      wgmma_commit_group();
    };
    auto start_values = [&](int slot) {
      const unsigned long long b = wgmma_transposed(values + slot * kTileSize,
                                                    TileLayout::kPanel * (int)sizeof(scalar_t));
      wgmma_fence();
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) wgmma_rs<scalar_t>(sums, weights[n], b + 128 * n);
      wgmma_commit_group();
    };
    // Turns scores of keys from `key` on into weights, still in float32.
    auto softmax = [&](const Tile& tile, int key) {
      if (key < seen_begin || key + kKeys > seen_end) {  // some row doesn't see all of them
        const int warp_row = tile.first_row + warp * 16;
        const int ends[2] = {tile.rows.end_of(warp_row + lane / 4), tile.rows.end_of(warp_row + lane / 4 + 8)};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int end = ends[i / 2 % 2] - key - lane % 4 * 2;  // counted from this lane's first key
          const int place = i / 4 * 8 + i % 2;
          if (place >= end || place < end - window) scores[i] = kNegInf;
        }
      }
      float tops[4] = {kNegInf, kNegInf, kNegInf, kNegInf};  // two a row: shorter chains of instructions
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2)
        tops[i / 2 % 4] = fmaxf(tops[i / 2 % 4], fmaxf(scores[i], scores[i + 1]));
      float bases[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = fmaxf(tops[half], tops[half + 2]);
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));  // now over the row's four lanes
        factors[half] = state[half].raise_max_if_exceeded(top * scale);
        bases[half] = state[half].base();
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2) {
        const int half = i / 2 % 2;
        scores[i] = ex2_approx_ftz(fmaf(scores[i], scale, -bases[half]));
        scores[i + 1] = ex2_approx_ftz(fmaf(scores[i + 1], scale, -bases[half]));
        state[half].sum += scores[i] + scores[i + 1];
      }
    };
    auto round_weights = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2)
        weights[i / 8][i / 2 % 4] = pack_pair<scalar_t>(scores[i], scores[i + 1]);
    };
    auto scale_sums = [&](const float (&factors)[2]) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) sums[i] *= factors[i / 2 % 2];
    };
    // Stores this warp's 16 rows of sums, some dimensions at a time, through shared memory in whole vectors.
    auto store = [&](const Tile& tile) {
      scalar_t* results = staged + warp * 16 * 64;
#pragma unroll
      for (int start = 0; start < kHeadDim; start += 64) {
        __syncwarp();  // the last dimensions have been read
#pragma unroll
        for (int i = 0; i < 32; i += 2)
          *reinterpret_cast<unsigned*>(results + StagedLayout::offset(lane / 4 + i / 2 % 2 * 8, i / 4) + lane % 4 * 2) =
              pack_pair<scalar_t>(sums[start / 2 + i], sums[start / 2 + i + 1]);
        __syncwarp();
        tile.rows.template store<StagedLayout, 16, kHeadDim>(out + start, results, tile.first_row + warp * 16);
      }
    };

    // What this warp's lanes have of an image: sums, and the states of their two rows.
    auto image = [&](int index) {
      constexpr int kSize = (kHeadDim / 2 + 4) * kWarpSize;  // floats
      return images + ((long long)index * kConsumers * 4 + warp) * kSize + lane * 4;
    };
    auto write_image = [&](float* image, const SoftmaxState (&state)[2]) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 4)
        store_vec(image + i * kWarpSize, Vec<float>{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]});
      store_vec(image + kHeadDim / 2 * kWarpSize, Vec<float>{state[0].max, state[0].sum, state[1].max, state[1].sum});
    };
    // Merge an image into sums and state. The order of the two makes no difference, that of several does.
    auto merge_image = [&](const float* image, SoftmaxState (&state)[2]) {
      const Vec<float> other = load_vec(image + kHeadDim / 2 * kWarpSize);
      float mine_factors[2], other_factors[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        SoftmaxState merged{fmaxf(state[half].max, other.data[2 * half]), 0.f};
        mine_factors[half] = exp2f(state[half].max - merged.base());
        other_factors[half] = exp2f(other.data[2 * half] - merged.base());
        merged.sum = __fadd_rn(__fmul_rn(mine_factors[half], state[half].sum),
                               __fmul_rn(other_factors[half], other.data[2 * half + 1]));
        state[half] = merged;
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 4) {
        const Vec<float> values = load_vec(image + i * kWarpSize);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sums[i + j] = __fadd_rn(__fmul_rn(mine_factors[j / 2], sums[i + j]),
                                  __fmul_rn(other_factors[j / 2], values.data[j]));
      }
    };
    // The sums of a split are there: put them by, or if they are the last, store the tile's results.
    auto end_split = [&](const Tile& tile, int item, bool is_first, bool is_last, SoftmaxState (&state)[2]) {
      if (tile.num_splits > 1 && !splits_apart) {
        if (!is_first) merge_image(image(blockIdx.x), state);
        if (!is_last) return write_image(image(blockIdx.x), state);
      } else if (tile.num_splits > 1) {
        write_image(image(item), state);
        __threadfence();  // this lane's image before its warp's arrival
        __syncwarp();
        int* counter = counters + item / num_splits * kConsumers * 4 + warp;
        const int arrived = __shfl_sync(kFullMask, lane == 0 ? atomicAdd(counter, 1) : 0, 0);
        if (arrived < tile.num_splits - 1) return;
        __threadfence();  // the others' images after their arrivals
        if (lane == 0) *counter = 0;
        state[0] = state[1] = SoftmaxState{};
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) sums[i] = 0.f;
        const int first = item - item % num_splits;
        for (int i = 0; i < tile.num_splits; ++i) merge_image(image(first + i), state);
      }
      float factors[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = state[half].sum;
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
        factors[half] = state[half].inverse_sum();
      }
      scale_sums(factors);
      store(tile);
    };

    if (walk_on()) {
      Tile tile = row_tile();
      int item = walk.item;
      find_seen(tile);
      int key = tile.first_key;  // the first of those that are scored
      int query_fill = 0;        // of the queries that score them
      mbarrier_wait(queries_full, 0);
      mbarrier_wait(keys_full, 0);
      turns.take();
      start_scores(0, 0);
      turns.pass();
      wgmma_wait_group<0>();
      wgmma_hold(scores);
      release(keys_empty);
      softmax(tile, key);
      bool has_next = walk_on();
      mbarrier_wait(values_full, 0);
      round_weights();
      bool keys_are_there = mbarrier_test_wait(keys_full + 1, 0);

      // The weights are there: weigh the values in one slot, and score the keys in the other one.
      for (int step = 0;; ++step) {
        const int slot = step % 2, other = 1 - slot, parity = (step + 1) / 2 % 2;  // of the other slot's phase
        key += kKeys;
        const bool is_last = key >= tile.end;  // of the tile's keys
        const bool ends_split = is_last || key % kSplitKeys == 0;
        const bool is_first = key <= tile.first_key / kSplitKeys * kSplitKeys + kSplitKeys;
        const Tile done = tile;
        const int done_item = item;
        SoftmaxState done_state[2] = {state[0], state[1]};
        if (ends_split) state[0] = state[1] = SoftmaxState{};
        if (is_last) {
          release(queries_empty + query_fill % kQueryTiles);
          ++query_fill;
          if (!has_next) {
            turns.take();
            start_values(slot);
            turns.pass();
            wgmma_wait_group<0>();
            wgmma_hold(sums);
            end_split(done, done_item, is_first, true, done_state);
            break;
          }
          tile = row_tile();
          item = walk.item;
          key = tile.first_key;
          find_seen(tile);
          mbarrier_wait(queries_full + query_fill % kQueryTiles, query_fill / kQueryTiles % 2);
        }
        if (!keys_are_there) mbarrier_wait(keys_full + other, parity);
        turns.take();
        start_scores(query_fill % kQueryTiles, other);
        start_values(slot);
        turns.pass();
        wgmma_wait_group<1>();  // the scores
        wgmma_hold(scores);
        release(keys_empty + other);
        const bool values_are_there = mbarrier_test_wait(values_full + other, parity);
        softmax(tile, key);
        // ptxas would move the wait for the products to before the softmax, if it weren't for this branch, which
        // seems to depend on it: sums of weights are never negative.
        if (!values_are_there || state[0].sum + state[1].sum < 0.f) mbarrier_wait(values_full + other, parity);
        wgmma_wait_group<0>();
        wgmma_hold(sums);
        release(values_empty + slot);
        keys_are_there = mbarrier_test_wait(keys_full + slot, (step + 2) / 2 % 2);
        if (ends_split) {
          end_split(done, done_item, is_first, is_last, done_state);
          if (is_last) has_next = walk_on();
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) sums[i] = 0.f;
        } else if (__any_sync(kFullMask, factors[0] != 1.f || factors[1] != 1.f)) {
          scale_sums(factors);
        }
        round_weights();
      }
    }
    turns.end();
  }
}
