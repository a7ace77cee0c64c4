// linear_few_sm90.cu: what linear.cu computes, for few rows on Hopper, where reading weight once is the work
//
//   y[i, j] = sum_c x[i, c] * weight[j, c] + bias[j]
//   out = y,   out += y   or   out[i, j] = silu(y[i, 2j]) * y[i, 2j + 1]
//
// Tiling:   weight is the wide operand of the tensor cores: a warpgroup multiplies 64 rows of it by kTokens tokens, so
//           tokens are padded to 8, 16, 32, 64 or 128 and no further. A tile is 64 outputs for all tokens. As many
//           thread blocks as have room on the GPU at once share the tiles out, and compute one after the other.
// Splits:   where there are too few tiles for all SMs, kSplits thread blocks, a cluster, share a tile's k at places
//           that depend on k and kSplits alone. Each sends its sums from registers into the shared memory of the one
//           that stores these rows, its owner, which adds them up. Merging through L2 took 3 us more. A cluster computes
//           one tile: where k is split, all have room at once.
// Streams:  a warp of its own asks the copy engine for weight and x, 64 columns a step, through a ring of kStages. A step
//           is multiplied while the one before it is: alone on an SM, a thread block has 0.2 us for one. The warp
//           goes on with the next tile while the warps that multiply stage and store the last one's results, which have
//           a place beside the ring, for some tokens at a time. With splits they are staged where the ring was.
// Barriers: full[s] completes when weight and x of stage s have come; empty[s] when all multiplying warps are done with
//           them; arrived when a tile's sums are there, of all splits. Barrier 1 is for the multiplying warps.
// Overlap:  the first steps' weight is asked for before the wait for the kernel before this one, so that DRAM is busy
//           while that one ends. Both have room on an SM: a thread block takes 113 KB at most.
// Numerics: every element is one chain of wgmma's sums a split, in float32 and in the order of k, then the sum of the
//           splits in their order, then the bias, then what is added to; silu in float32, of such sums; one rounding,
//           at the store. The value depends on its row of x, its rows of weight, its bias, what is added to and kSplits
//           alone: not on m, n, kTokens or its place in the tile.
// Bound:    n * k * 2 bytes of weight from DRAM, to some 32 tokens; then what L2 gives, 6.5 TB/s on an H200: beside its
//           weight a tile draws kTokens / 64 times as many bytes of x. Measured: docs/performance.md.
#include "common.cuh"
#include "linear_epilogue.cuh"
#include "ptx_sm90.cuh"
#include "ring.cuh"

constexpr int kRows = 64;   // of weight in a tile
constexpr int kTileK = 64;  // columns of k in a step: 128 bytes a row
constexpr int kWarps = 4;   // that multiply: 16 rows of results each
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxStaged = 32;  // tokens whose results are staged at once beside the ring

struct Reduce {  // in L2: at the end of a tile everybody would wait for what out holds
  __device__ __forceinline__ void operator()(float* place, const float (&values)[4]) const { reduce_add(place, values); }
};

// Grid: thread blocks of 5 warps: any number; with splits a cluster of kSplits for each tile.
// PRECOND: m <= kTokens, k % 8 == 0, and x, weight and out start at multiples of 16 bytes.
template <typename scalar_t,  // storage type of x, weight and bias
          typename out_t,     // of out: scalar_t or float
          int kTokens,        // rows of x that are multiplied
          int kStages,        // steps that are on their way
          int kSplits>        // thread blocks that share k: 1, 2 or 4
__global__ void __cluster_dims__(kSplits, 1, 1) __launch_bounds__((kWarps + 1) * kWarpSize)
linear_few_sm90(out_t* __restrict__ out,                       // [m, n], with kSiluAndMul [m, n / 2]
                const __grid_constant__ TensorMap x_map,       // of [m, k], boxes of kTokens rows
                const __grid_constant__ TensorMap weight_map,  // of [n, k], boxes of kRows rows
                const scalar_t* __restrict__ bias,             // [n], or null; null with kSiluAndMul
                int m, int n, int k,
                int epilogue) {  // an Epilogue
  constexpr int kWeightElements = kRows * kTileK;
  constexpr int kStageElements = kWeightElements + kTokens * kTileK;
  constexpr int kVecs = kTokens / 8;            // a thread's sums in vectors of 4: of its warp's 16 rows by 8 tokens
  constexpr int kOwnRows = kRows / kSplits;     // that this thread block stores
  constexpr int kUnits = kWarps / kSplits;      // of 16 rows, that these are
  constexpr int kStagedTokens = kSplits > 1 || kTokens <= kMaxStaged ? kTokens : kMaxStaged;  // at once
  constexpr int kSharers = kSplits < kVecs ? kSplits : kVecs;  // warps that share a unit's tokens when it is added up
  constexpr int kOwnVecs = kStagedTokens / 8 / kSharers;
  constexpr int kStagedRow = kOwnRows + 4;  // floats; the 4 extra ones keep the lanes' writes free of bank conflicts
  static_assert(kWarps % kSplits == 0 && kVecs % kSharers == 0, "warps share rows and tokens evenly");
  static_assert(kSplits == 1 || kTokens * kStagedRow * sizeof(float) <= kStages * kStageElements * sizeof(scalar_t),
                "the results fit where the ring was");

  DYNAMIC_SHARED(shared);
  scalar_t* ring = reinterpret_cast<scalar_t*>(shared + (1024 - shared_address(shared) % 1024) % 1024);
  float* after = reinterpret_cast<float*>(ring + kStages * kStageElements);
  float* parts = after;                                                  // [kSplits][kUnits][kVecs][32 lanes][4]
  float* staged = kSplits > 1 ? reinterpret_cast<float*>(ring) : after;  // [kStagedTokens][kStagedRow]
  auto* full = reinterpret_cast<unsigned long long*>(
      after + (kSplits > 1 ? kRows * kTokens : kStagedTokens * kStagedRow));  // [kStages]
  auto* empty = full + kStages;                                               // [kStages]
  auto* arrived = empty + kStages;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int owner = blockIdx.x % kSplits;                      // of the tile's shares of rows, the one stored here
  const int num_splits = kSplits > 1 ? cluster_size() : 1;     // where there are no clusters each multiplies all of k
  const int split = kSplits > 1 ? cluster_rank() : 0;
  const int all_steps = ceil_div(k, kTileK);
  const int first_step = all_steps * split / num_splits;
  const int num_steps = all_steps * (split + 1) / num_splits - first_step;

  const int num_tiles = ceil_div(n, kRows);
  const int first_tile = blockIdx.x / kSplits, tile_stride = gridDim.x / kSplits;
  const int end_tile = num_steps > 0 ? num_tiles : 0;  // of those to fetch: a split of a short k may have nothing
  // A walk over the steps of this thread block's tiles.
  struct Walk {
    RingPlace<kStages> place;
    int tile, step = 0;
  };
  auto advance = [&](Walk& walk) {
    walk.place.advance();
    if (++walk.step == num_steps) walk.step = 0, walk.tile += tile_stride;
  };
  auto copy_weight = [&](const Walk& walk) {  // the first of a stage's two copies
    unsigned long long* barrier = full + walk.place.stage;
    mbarrier_arrive_expect_tx(barrier, kStageElements * sizeof(scalar_t));
    tensor_copy_once(ring + walk.place.stage * kStageElements, weight_map, (first_step + walk.step) * kTileK,
                     walk.tile * kRows, barrier);
  };
  auto copy_x = [&](const Walk& walk) {
    tensor_copy(ring + walk.place.stage * kStageElements + kWeightElements, x_map, (first_step + walk.step) * kTileK, 0,
                full + walk.place.stage);
  };
  Walk fetch = {{}, first_tile};  // of the warp that fetches
  if (warp == kWarps && lane == 0) {
    tensor_prefetch(x_map);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, kWarps);
    }
    if (kSplits > 1) mbarrier_init(arrived, 1);
    mbarrier_init_fence();
    for (int i = 0; i < kStages && fetch.tile < end_tile; ++i, advance(fetch)) copy_weight(fetch);
    if (kSplits > 1) mbarrier_arrive_expect_tx(arrived, num_splits * kUnits * ceil_div(m, 8) * kWarpSize * 16);
  }
  __syncthreads();
  if (kSplits > 1) cluster_arrive();
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();

  if (warp == kWarps) {
    if (lane == 0) {
      Walk first = {{}, first_tile};
      for (int i = 0; i < kStages && first.tile < end_tile; ++i, advance(first)) copy_x(first);
      for (; fetch.tile < end_tile; advance(fetch)) {
        mbarrier_wait(empty + fetch.place.stage, fetch.place.parity ^ 1);
        copy_weight(fetch);
        copy_x(fetch);
      }
    }
    __syncwarp();
    if (kSplits > 1) cluster_wait();
    return;
  }

  const bool gated = gates<out_t>(epilogue);
  RingPlace<kStages> place;
  for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
    float sum[4 * kVecs] = {};
    int multiplied = place.stage;  // the stage before
    auto release = [&]() {
      if (lane == 0) mbarrier_arrive(empty + multiplied);
    };
    for (int i = 0; i < num_steps; ++i, place.advance()) {
      mbarrier_wait(full + place.stage, place.parity);
      const scalar_t* weights = ring + place.stage * kStageElements;
      const unsigned long long rows = wgmma_descriptor(weights);
      const unsigned long long tokens = wgmma_descriptor(weights + kWeightElements);
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < kTileK / 16; ++part) wgmma_ss<scalar_t>(sum, rows + 2 * part, tokens + 2 * part);
      wgmma_commit_group();
      wgmma_wait_group<1>();
      if (i > 0) release();
      multiplied = place.stage;
    }
    wgmma_wait_group<0>();
    wgmma_hold(sum);
    if (num_steps > 0) release();

    auto part_place = [&](int from, int unit, int vec) {
      return parts + (((from * kUnits + unit) * kVecs + vec) * kWarpSize + lane) * 4;
    };
    if constexpr (kSplits > 1) {
      cluster_wait();  // the others' barriers are ready
      if (num_splits > 1 || warp / kUnits == owner)
#pragma unroll
        for (int i = 0; i < kVecs; ++i)
          if (8 * i < m)
            store_async(part_place(split, warp % kUnits, i),
                        {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]}, arrived, warp / kUnits);
    }

    const int first_output = tile * kRows + owner * kOwnRows;
    const int unit = warp / kSplits, sharer = warp % kSplits;  // of the rows and the tokens that this warp adds up
#pragma unroll
    for (int first_token = 0; first_token < kTokens; first_token += kStagedTokens) {
      if (first_token >= m) break;
      bar_sync(1, kThreads);  // the last results have been read, and with splits all products are done
      if (sharer < kSharers) {
        if (kSplits > 1) mbarrier_wait(arrived, 0);
#pragma unroll
        for (int i = 0; i < kOwnVecs; ++i) {
          const int staged_vec = sharer * kOwnVecs + i, vec = first_token / 8 + staged_vec;
          if (8 * vec >= m) break;
          Vec<float> total;
          if constexpr (kSplits > 1) {
            total = load_vec(part_place(0, unit, vec));
#pragma unroll
            for (int from = 1; from < kSplits; ++from) {
              if (from >= num_splits) break;
              const Vec<float> part = load_vec(part_place(from, unit, vec));
#pragma unroll
              for (int e = 0; e < 4; ++e) total.data[e] += part.data[e];
            }
          } else {
            total = {sum[4 * vec], sum[4 * vec + 1], sum[4 * vec + 2], sum[4 * vec + 3]};
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = unit * 16 + e / 2 * 8 + lane / 4;
            float* place = staged + (8 * staged_vec + lane % 4 * 2 + e % 2) * kStagedRow;
            const float next_row = gated ? __shfl_xor_sync(kFullMask, total.data[e], 4) : 0.f;
            if (!gated)
              place[row] = total.data[e];
            else if (row % 2 == 0)
              place[row / 2] = silu_and_mul(total.data[e], next_row);
          }
        }
      }
      bar_sync(1, kThreads);
      if (gated)
        store_tile<kStagedTokens, kOwnRows / 2, kStagedRow, kThreads>(out, staged, bias, threadIdx.x, first_token, m,
                                                                      first_output / 2, n / 2, false);
      else
        store_tile<kStagedTokens, kOwnRows, kStagedRow, kThreads, Reduce>(
            out, staged, bias, threadIdx.x, first_token, m, first_output, n, accumulates<out_t>(epilogue));
    }
  }
}
