// linear.cu: y[i, j] = sum_c x[i, c] * weight[j, c] + bias[j], on tensor cores, for any number of rows
//
//   out = y,   out += y   or   out[i, j] = silu(y[i, 2j]) * y[i, 2j + 1]
//
// Tiling:   a thread block computes kTileM tokens x kTileN outputs, its warps a grid of kWarpsM x kWarpsN equal parts.
//           k is walked in steps of 64 elements (128 bytes a row) through a ring of kStages stages in shared memory,
//           filled by cp.async while the tensor cores work on an earlier stage; fragments are double-buffered in
//           registers. Tiles are numbered so that thread blocks that run together share rows of x and of weight in L2.
// Splits:   of few tokens there are too few tiles for all SMs. Then num_splits thread blocks share a tile's k, at places
//           that depend on k and num_splits alone; the last one to arrive adds up the partial sums.
// Layout:   a stage holds rows of 8 chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), which makes the copies
//           and ldmatrix free of bank conflicts.
// Numerics: every element is one chain of m16n8k16 products a split, in float32 and in the order of k, then the sum of
//           the splits in their order, then the bias, then what is added to; silu in float32, of such sums; one
//           rounding, at the store. The value depends on its row of x, its rows of weight, its bias, what is added to
//           and num_splits alone: not on m, n, the tile, or its place in it.
// Bound:    flops from some hundred rows on, at 2*m*n*k; bytes of weight below. Between the two a tile is bound by what
//           it draws from L2, (kTileM + kTileN) * 2 bytes for kTileM * kTileN products, which is why large tiles win.
//           A thread block has kStages - 1 stages on their way: 48, 24 and 12 KB of weight with 128, 64 and 32 outputs
//           in 4 stages. At 3.1 TB/s and some 0.7 us of latency each of an H100's 132 SMs wants 16 KB or more;
//           linear_plan in tuning.py counts that in, and that splits cost 8 * kTileM * kTileN bytes each through L2.
//           Measured: docs/performance.md.
#include "common.cuh"
#include "linear_epilogue.cuh"
#include "linear_tile.cuh"
#include "ptx.cuh"

constexpr int kStepK = 16;  // elements of k in one mma

// The number of floats in a row of the epilogue's tile. The 8 extra ones keep the warps' pairs free of conflicts.
template <int kTileN>
constexpr int kStagedRow = kTileN + 8;

// Grid: num_splits thread blocks a tile, num_splits * ceil(m / kTileM) * ceil(n / kTileN) in one dimension.
// PRECOND: k % 8 == 0, x, weight, out and partials start at multiples of 16 bytes, num_splits <= ceil(k / 64).
template <typename scalar_t,  // storage type of x, weight and bias
          typename out_t,     // of out: scalar_t or float
          int kTileM,         // tokens in a thread block's tile
          int kTileN,         // outputs in it
          int kWarpsM,        // warps that share the tokens
          int kWarpsN,        // warps that share the outputs
          int kStages>        // stages in the ring; kStages - 1 are on their way at any time
__global__ void __launch_bounds__(kWarpsM * kWarpsN * kWarpSize)
linear(out_t* __restrict__ out,              // [m, n], with kSiluAndMul [m, n / 2]
       const scalar_t* __restrict__ x,       // [m, k]
       const scalar_t* __restrict__ weight,  // [n, k]
       const scalar_t* __restrict__ bias,    // [n], or null; null with kSiluAndMul
       float* partials,                      // [tiles, num_splits, kTileM * kTileN] scratch; null with one split
       int* counters,                        // [tiles] zeros before and after; null with one split
       int m, int n, int k, int num_splits,
       int epilogue) {  // an Epilogue
  constexpr int kThreads = kWarpsM * kWarpsN * kWarpSize;
  constexpr int kWarpM = kTileM / kWarpsM;  // tokens of a warp
  constexpr int kWarpN = kTileN / kWarpsN;  // outputs of a warp
  constexpr int kBlocksM = kWarpM / 16;     // mma blocks along m
  constexpr int kBlocksN = kWarpN / 8;      // and along n
  constexpr int kSteps = kTileK / kStepK;
  constexpr int kStageElements = (kTileM + kTileN) * kTileK;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp takes whole mma blocks, two of them at a time along n");
  static_assert(kStages >= 2, "one stage is read while another is filled");
  static_assert(kTileM * kStagedRow<kTileN> * sizeof(float) <= kStages * kStageElements * sizeof(scalar_t),
                "the epilogue's tile fits where the stages were");

  DYNAMIC_SHARED(shared);
  scalar_t* ring = reinterpret_cast<scalar_t*>(shared);  // [kStages][kTileM rows of x, then kTileN rows of weight][64]

  const int out_tile = blockIdx.x / num_splits;
  const int split = blockIdx.x % num_splits;
  const TilePlace<kTileM, kTileN> place(out_tile, m, n);
  const int lane = threadIdx.x % kWarpSize;
  const int warp_m = threadIdx.x / kWarpSize / kWarpsN * kWarpM;  // the warp's first token within the tile
  const int warp_n = threadIdx.x / kWarpSize % kWarpsN * kWarpN;  // and its first output

  // The split's part of k, in steps of a stage; parts differ by one step at most.
  const int all_tiles_k = ceil_div(k, kTileK);
  const int first_tile_k = (long long)all_tiles_k * split / num_splits;
  const int num_tiles_k = (long long)all_tiles_k * (split + 1) / num_splits - first_tile_k;

  TileCopier<scalar_t, kTileM, kThreads> x_copier(x, place.first_token, m, k, first_tile_k * kTileK);
  TileCopier<scalar_t, kTileN, kThreads> weight_copier(weight, place.first_output, n, k, first_tile_k * kTileK);
  auto copy_stage = [&](int tile) {
    if (tile < num_tiles_k) {
      scalar_t* stage = ring + tile % kStages * kStageElements;
      x_copier.copy(stage);
      weight_copier.copy(stage + kTileM * kTileK);
    }
    cp_async_commit_group();  // an empty group, too, so that the wait below counts the same at the end
  };

  // Fragments of one step of k. The rows that a lane points ldmatrix at have the same row % 8 in every mma block, so
  // one exclusive or gives the place of a chunk in all of them.
  unsigned x_fragment[2][kBlocksM][4];
  unsigned weight_fragment[2][kBlocksN / 2][4];  // two mma blocks each: registers 0, 1 and 2, 3
  const int x_row = warp_m + lane % 16, x_chunk = lane / 16;
  const int weight_row = warp_n + lane / 16 * 8 + lane % 8, weight_chunk = lane / 8 % 2;
  auto load_fragments = [&](int buffer, int tile, int step) {
    const scalar_t* x_stage = ring + tile % kStages * kStageElements;
    const scalar_t* weight_stage = x_stage + kTileM * kTileK;
    const scalar_t* x_place = x_stage + (x_row * kRowChunks + ((2 * step + x_chunk) ^ lane % 8)) * kChunk;
    const scalar_t* weight_place =
        weight_stage + (weight_row * kRowChunks + ((2 * step + weight_chunk) ^ lane % 8)) * kChunk;
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) ldmatrix_x4(x_fragment[buffer][i], x_place + i * 16 * kTileK);
#pragma unroll
    for (int j = 0; j < kBlocksN / 2; ++j) ldmatrix_x4(weight_fragment[buffer][j], weight_place + j * 16 * kTileK);
  };

  float sum[kBlocksM][kBlocksN][4] = {};

#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) copy_stage(tile);
  cp_async_wait_group<kStages - 2>();
  __syncthreads();
  load_fragments(0, 0, 0);

  for (int tile = 0; tile < num_tiles_k; ++tile) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) {
        load_fragments((step + 1) % 2, tile, step + 1);
      } else if (tile + 1 < num_tiles_k) {
        cp_async_wait_group<kStages - 2>();
        __syncthreads();  // the next stage is there for all, and nobody reads this one any more
        load_fragments(0, tile + 1, 0);
      }
      if (step == 0) copy_stage(tile + kStages - 1);  // into the stage of tile - 1
#pragma unroll
      for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
        for (int j = 0; j < kBlocksN; ++j)
          mma_m16n8k16<scalar_t>(sum[i][j], x_fragment[step % 2][i], weight_fragment[step % 2][j / 2][j % 2 * 2],
                                 weight_fragment[step % 2][j / 2][j % 2 * 2 + 1]);
    }
  }

  if (num_splits > 1) {
    // Each thread leaves its sums for its twin in the split that arrives last, which adds them up in the splits' order.
    constexpr long long kPartial = kTileM * kTileN;
    float* partial = partials + out_tile * num_splits * kPartial + threadIdx.x * 4;  // of split 0
    auto in_m = [&](int i) { return place.first_token + warp_m + i * 16 < m; };  // else no row of the mma block is stored
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j)
        if (in_m(i))
          store_vec(partial + split * kPartial + (i * kBlocksN + j) * kThreads * 4,
                    Vec<float>{sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]});
    __threadfence();  // this thread's sums before its arrival
    __syncthreads();
    const bool last = threadIdx.x == 0 && atomicAdd(counters + out_tile, 1) == num_splits - 1;
    if (!__syncthreads_or(last)) return;
    __threadfence();  // the others' sums after their arrivals
    if (threadIdx.x == 0) counters[out_tile] = 0;  // for the next launch
    for (int s = 0; s < num_splits; ++s)
#pragma unroll
      for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
        for (int j = 0; j < kBlocksN; ++j) {
          if (!in_m(i)) continue;
          const Vec<float> part = load_vec(partial + s * kPartial + (i * kBlocksN + j) * kThreads * 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j][e] = (s == 0 ? 0.f : sum[i][j][e]) + part.data[e];
        }
  }

  // The results go through shared memory, so that rows are stored 16 bytes a thread.
  __syncthreads();  // every warp has read its last fragments; no copy is under way, all of them were waited for
  float* staged = reinterpret_cast<float*>(shared);  // [kTileM, kTileN], kStagedRow floats apart
  const bool gated = gates<out_t>(epilogue);
#pragma unroll
  for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
    for (int j = 0; j < kBlocksN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = warp_n + j * 8 + lane % 4 * 2;
        float* row = staged + (warp_m + i * 16 + half * 8 + lane / 4) * kStagedRow<kTileN>;
        const Pair pair = {sum[i][j][half * 2], sum[i][j][half * 2 + 1]};
        if (gated)
          row[column / 2] = silu_and_mul(pair.first, pair.second);
        else
          *reinterpret_cast<Pair*>(row + column) = pair;
      }
  __syncthreads();

  if (gated)
    store_tile<kTileM, kTileN / 2, kStagedRow<kTileN>, kThreads>(out, staged, bias, threadIdx.x, place.first_token, m,
                                                                 place.first_output / 2, n / 2, false);
  else
    store_tile<kTileM, kTileN, kStagedRow<kTileN>, kThreads>(out, staged, bias, threadIdx.x, place.first_token, m,
                                                             place.first_output, n, accumulates<out_t>(epilogue));
}
