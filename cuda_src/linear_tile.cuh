// linear_tile.cuh: what the tiled matrix products share: which tile is whose, and its way into shared memory.
#ifndef CUPAGED_LINEAR_TILE_CUH
#define CUPAGED_LINEAR_TILE_CUH

#include "common.cuh"
#include "ptx.cuh"

constexpr int kTileK = 64;                  // elements of k in a stage: 128 bytes, so that a row meets every bank once
constexpr int kChunk = 8;                   // elements in 16 bytes, the unit of copies
constexpr int kRowChunks = kTileK / kChunk;
constexpr int kGroupM = 8;                  // token tiles that are walked together before the next weight tile

// The tile with this number: kGroupM token tiles by all weight tiles make a group, and in a group the token tile runs
// fastest, so that thread blocks that run together share rows of x and of weight in L2.
template <int kTileM, int kTileN>
struct TilePlace {
  int first_token, first_output;

  __device__ __forceinline__ TilePlace(int number, int m, int n) {
    const int tiles_m = ceil_div(m, kTileM);
    const int group_size = kGroupM * ceil_div(n, kTileN);
    const int group = number / group_size, place = number % group_size;
    const int group_rows = min(kGroupM, tiles_m - group * kGroupM);
    first_token = (group * kGroupM + place % group_rows) * kTileM;
    first_output = place / group_rows * kTileN;
  }
};

// Copies a [kRows, 64] part of a row-major matrix into a stage, by the first kThreads threads of a block. Rows at or past
// num_rows and columns at or past k are filled with zeros and not read. Chunk c of row r lies at c ^ (r % 8).
template <typename scalar_t, int kRows, int kThreads>
struct TileCopier {
  static constexpr int kRowsAtOnce = kThreads / kRowChunks;
  static_assert(kRows % kRowsAtOnce == 0, "every thread copies the same number of chunks");
  static_assert(kRowsAtOnce % 8 == 0, "a thread's chunks have the same place in their rows");

  const scalar_t* source;  // this thread's chunk in row `row`
  long long stride;        // elements from one of its rows to the next
  int row, num_rows, column, k;
  int destination;  // elements from the stage's start

  __device__ __forceinline__ TileCopier(const scalar_t* matrix, int first_row, int num_rows, int k, int first_column = 0)
      : row(first_row + threadIdx.x / kRowChunks), num_rows(num_rows), k(k) {
    const int local_row = threadIdx.x / kRowChunks;
    const int chunk = threadIdx.x % kRowChunks;
    column = first_column + chunk * kChunk;
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

#endif  // CUPAGED_LINEAR_TILE_CUH
