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

// Adds bias and, if asked for, what out holds to the tile's results [kTileM, kColumns], which lie kStride floats apart in
// shared memory, and stores them. The first is that of row first_row and column first_column of out.
template <int kTileM, int kColumns, int kStride, int kThreads, typename out_t, typename scalar_t>
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

#endif  // CUPAGED_LINEAR_EPILOGUE_CUH
