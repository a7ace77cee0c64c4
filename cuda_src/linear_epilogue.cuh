// linear_epilogue.cuh: what the matrix products do with a sum, before the one rounding at the store; and the store.
#ifndef CUPAGED_LINEAR_EPILOGUE_CUH
#define CUPAGED_LINEAR_EPILOGUE_CUH

#include "common.cuh"

enum Epilogue {  // twin in kernels/linear.py
  kStore,
  kAccumulate,  // out, which is float, is added to
  kSiluAndMul,  // out, of 2 bytes an element, has half as many columns: rows 2j and 2j + 1 of weight are gate and up
};

// Whether a kernel that writes out_t does `epilogue` when it is asked for `asked`. What it never does is left out by
// the compiler.
template <typename out_t>
__device__ __forceinline__ bool accumulates(int asked) { return sizeof(out_t) == 4 && asked == kAccumulate; }
template <typename out_t>
__device__ __forceinline__ bool gates(int asked) { return sizeof(out_t) == 2 && asked == kSiluAndMul; }

// By the quick forms of exp and division: with the exact ones linear_sm90 took a third longer for gate and up than for as
// many plain outputs (an H200, 2,048 rows).
__device__ __forceinline__ float silu_and_mul(float gate, float up) {
  return __fdividef(gate, 1.f + __expf(-gate)) * up;
}

struct alignas(8) Pair {  // neighbours in a row, as an mma leaves them: one 8-byte store
  float first, second;
};

struct LoadAndStore {  // how a vector is added to what out holds
  __device__ __forceinline__ void operator()(float* place, const float (&values)[4]) const {
    Vec<float> sums = load_vec(place);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums.data[e] += values[e];
    store_vec(place, sums);
  }
};

// Adds bias to the tile's results [kTileM, kColumns], which lie kStride floats apart in shared memory, and stores them or,
// if asked to, adds them to what out holds. The first is that of row first_row and column first_column of out.
template <int kTileM, int kColumns, int kStride, int kThreads, typename Add = LoadAndStore, typename out_t,
          typename scalar_t>
__device__ __forceinline__ void store_tile(out_t* out,             // [num_rows, num_columns]
                                           const float* staged,
                                           const scalar_t* bias,  // [num_columns], or null
                                           int thread,            // of the kThreads that store the tile
                                           int first_row, int num_rows, int first_column, int num_columns,
                                           bool accumulate) {
  constexpr int kVec = Vec<out_t>::kSize;
  const bool whole_vectors = num_columns % kVec == 0;  // else rows of out don't start at multiples of 16 bytes
  for (int i = thread; i < kTileM * kColumns / kVec; i += kThreads) {
    const int row = i / (kColumns / kVec);
    const int column = i % (kColumns / kVec) * kVec;
    const int count = first_row + row < num_rows ? min(kVec, num_columns - first_column - column) : 0;
    out_t* place = out + (long long)(first_row + row) * num_columns + first_column + column;
    float values[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      values[e] = staged[row * kStride + column + e];
      if (bias != nullptr && e < count) values[e] += to_float(bias[first_column + column + e]);
    }
    if (whole_vectors && count == kVec) {
      if constexpr (sizeof(out_t) == sizeof(float)) {
        if (accumulate) {
          Add{}(place, values);
          continue;
        }
      }
      Vec<out_t> result;
#pragma unroll
      for (int e = 0; e < kVec; ++e) result.data[e] = from_float<out_t>(values[e]);
      store_vec(place, result);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        if (e < count) place[e] = from_float<out_t>(accumulate ? to_float(place[e]) + values[e] : values[e]);
    }
  }
}

#endif  // CUPAGED_LINEAR_EPILOGUE_CUH
