// linear.cu: y[i, j] = sum_c x[i, c] * weight[j, c] + bias[j], on tensor cores, for any number of rows
//
//   out = y,   out += y   or   out[i, j] = silu(y[i, 2j]) * y[i, 2j + 1]
//
// Tiling:   a thread block computes kTileM tokens x kTileN outputs, its warps a grid of kWarpsM x kWarpsN equal parts.
//           k is walked in steps of 64 elements (128 bytes a row) through a ring of kStages stages in shared memory,
//           filled by cp.async while the tensor cores work on an earlier stage; fragments are double-buffered in
//           registers. Tiles are numbered so that thread blocks that run together share rows of x and of weight in L2.
// Layout:   a stage holds rows of 8 chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), which makes the copies
//           and ldmatrix free of bank conflicts.
// Numerics: every element is one chain of m16n8k16 products in float32, in the order of k, then the bias, then
//           what is added to; silu in float32, of such sums; one rounding, at the store. The value depends on its row
//           of x, its rows of weight, its bias and what is added to alone: not on m, n, the tile, or its place in it.
// Bound:    flops from some hundred rows on, at 2*m*n*k; bytes of weight below. Between the two a tile is bound by what
//           it draws from L2, (kTileM + kTileN) * 2 bytes for kTileM * kTileN products, which is why large tiles win.
//           Not yet measured.
#include "common.cuh"
#include "linear_epilogue.cuh"
#include "ptx.cuh"

constexpr int kTileK = 64;                  // elements of k in a stage: 128 bytes, so that a row meets every bank once
constexpr int kChunk = 8;                   // elements in 16 bytes, the unit of copies and of ldmatrix
constexpr int kRowChunks = kTileK / kChunk;
constexpr int kStepK = 16;                  // elements of k in one mma
constexpr int kGroupM = 8;                  // token tiles that are walked together before the next weight tile

struct alignas(8) Pair {  // neighbours in a row, as an mma leaves them: one 8-byte store
  float first, second;
};

// The number of floats in a row of the epilogue's tile. The 8 extra ones keep the warps' pairs free of conflicts.
template <int kTileN>
constexpr int kStagedRow = kTileN + 8;

// Copies a [kRows, 64] part of a row-major matrix into a stage. Rows at or past num_rows and columns at or past k
// are filled with zeros and not read.
template <typename scalar_t, int kRows, int kThreads>
struct TileCopier {
  static constexpr int kRowsAtOnce = kThreads / kRowChunks;
  static_assert(kRows % kRowsAtOnce == 0, "every thread copies the same number of chunks");
  static_assert(kRowsAtOnce % 8 == 0, "a thread's chunks have the same place in their rows");

  const scalar_t* source;  // this thread's chunk in row `row`
  long long stride;        // elements from one of its rows to the next
  int row, num_rows, column, k;
  int destination;  // elements from the stage's start

  __device__ __forceinline__ TileCopier(const scalar_t* matrix, int first_row, int num_rows, int k)
      : row(first_row + threadIdx.x / kRowChunks), num_rows(num_rows), k(k) {
    const int local_row = threadIdx.x / kRowChunks;
    const int chunk = threadIdx.x % kRowChunks;
    column = chunk * kChunk;
    source = matrix + (long long)row * k + column;
    stride = (long long)kRowsAtOnce * k;
    destination = (local_row * kRowChunks + (chunk ^ local_row % 8)) * kChunk;
  }

  // Starts copying the next 64 columns to `stage`.
  __device__ __forceinline__ void copy(scalar_t* stage) {
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i)
      cp_async_16(stage + destination + i * kRowsAtOnce * kTileK, source + i * stride,
                  row + i * kRowsAtOnce < num_rows && column < k);
    source += kTileK;
    column += kTileK;
  }
};

// Adds bias and, if asked for, what out holds to the tile's results [kTileM, kColumns], which lie kStride floats apart in
// shared memory, and stores them. The first is that of row first_row and column first_column of out.
template <int kTileM, int kColumns, int kStride, int kThreads, typename out_t, typename scalar_t>
__device__ __forceinline__ void store_tile(out_t* out,             // [num_rows, num_columns]
                                           const float* staged,
                                           const scalar_t* bias,  // [num_columns], or null
                                           int first_row, int num_rows, int first_column, int num_columns,
                                           bool accumulate) {
  constexpr int kVec = Vec<out_t>::kSize;
  const bool whole_vectors = num_columns % kVec == 0;  // else rows of out don't start at multiples of 16 bytes
  for (int i = threadIdx.x; i < kTileM * kColumns / kVec; i += kThreads) {
    const int row = i / (kColumns / kVec);
    const int column = i % (kColumns / kVec) * kVec;
    const int count = first_row + row < num_rows ? min(kVec, num_columns - first_column - column) : 0;
    const float* results = staged + row * kStride + column;
    out_t* place = out + (long long)(first_row + row) * num_columns + first_column + column;
    Vec<out_t> result = {};  // first what is added to
    if (accumulate && whole_vectors && count == kVec) {
      result = load_vec(place);
    } else if (accumulate) {
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        if (e < count) result.data[e] = place[e];
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      float value = results[e];
      if (bias != nullptr && e < count) value += to_float(bias[first_column + column + e]);
      if (accumulate) value += to_float(result.data[e]);
      result.data[e] = from_float<out_t>(value);
    }
    if (whole_vectors && count == kVec) {
      store_vec(place, result);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        if (e < count) place[e] = result.data[e];
    }
  }
}

// Grid: one thread block a tile, ceil(m / kTileM) * ceil(n / kTileN) in one dimension.
// PRECOND: k % 8 == 0, and x, weight and out start at multiples of 16 bytes.
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
       int m, int n, int k,
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

  // Which tile: kGroupM token tiles by all weight tiles make a group, and in a group the token tile runs fastest.
  const int tiles_m = ceil_div(m, kTileM);
  const int tiles_n = ceil_div(n, kTileN);
  const int group = blockIdx.x / (kGroupM * tiles_n);
  const int place = blockIdx.x % (kGroupM * tiles_n);
  const int group_rows = min(kGroupM, tiles_m - group * kGroupM);
  const int first_token = (group * kGroupM + place % group_rows) * kTileM;
  const int first_output = place / group_rows * kTileN;

  const int lane = threadIdx.x % kWarpSize;
  const int warp_m = threadIdx.x / kWarpSize / kWarpsN * kWarpM;  // the warp's first token within the tile
  const int warp_n = threadIdx.x / kWarpSize % kWarpsN * kWarpN;  // and its first output

  TileCopier<scalar_t, kTileM, kThreads> x_copier(x, first_token, m, k);
  TileCopier<scalar_t, kTileN, kThreads> weight_copier(weight, first_output, n, k);
  const int num_tiles_k = ceil_div(k, kTileK);
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
    store_tile<kTileM, kTileN / 2, kStagedRow<kTileN>, kThreads>(out, staged, bias, first_token, m, first_output / 2,
                                                                 n / 2, false);
  else
    store_tile<kTileM, kTileN, kStagedRow<kTileN>, kThreads>(out, staged, bias, first_token, m, first_output, n,
                                                             accumulates<out_t>(epilogue));
}
