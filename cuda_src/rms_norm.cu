// rms_norm.cu: out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, optionally after residual[t] += x[t]
//
// Work:     one thread block a row. The row stays in registers between the two passes over it: kVecsPerThread vectors
//           of 8 elements a thread. Threads and vectors depend on hidden_size alone, so a row's result doesn't depend
//           on how many others there are.
// Numerics: float32: squares summed element by element in a thread, then across the warp, then warp by warp; one
//           rounding, at the store. The residual is rounded first, and the rounded value is the one that is normed.
// Bound:    bytes: x and out once each (and residual twice) from DRAM; weight stays in L2. Not yet measured.
#include "common.cuh"

template <typename scalar_t,    // storage type of every array, 2 bytes
          bool kAddResidual,    // add_rms_norm: residual += x, and its rounded sum takes the place of x
          int kNumWarps,        // warps per thread block
          int kVecsPerThread>   // 16-byte vectors of the row that one thread holds
__global__ void __launch_bounds__(kNumWarps * kWarpSize)
rms_norm(scalar_t* __restrict__ out,           // [gridDim.x, hidden_size]
         scalar_t* __restrict__ residual,      // [gridDim.x, hidden_size]; null unless kAddResidual
         const scalar_t* __restrict__ x,       // [gridDim.x, hidden_size]
         const scalar_t* __restrict__ weight,  // [hidden_size]
         int hidden_size,                      // a multiple of 8, at most kNumWarps * 32 * kVecsPerThread * 8
         float eps) {
  using V = Vec<scalar_t>;
  constexpr int kStride = kNumWarps * kWarpSize * V::kSize;  // elements from one of a thread's vectors to the next
  __shared__ float scratch[kNumWarps];
  const long long row = (long long)blockIdx.x * hidden_size;  // 64-bit: tokens * hidden can pass 2^31
  const int first = threadIdx.x * V::kSize;

  V v[kVecsPerThread];
  float sum_sq = 0.f;
#pragma unroll
  for (int n = 0; n < kVecsPerThread; ++n) {
    const int i = first + n * kStride;
    if (i >= hidden_size) break;
    v[n] = load_vec(x + row + i);
    if constexpr (kAddResidual) {
      const V r = load_vec(residual + row + i);
#pragma unroll
      for (int j = 0; j < V::kSize; ++j)
        v[n].data[j] = from_float<scalar_t>(to_float(r.data[j]) + to_float(v[n].data[j]));
      store_vec(residual + row + i, v[n]);
    }
#pragma unroll
    for (int j = 0; j < V::kSize; ++j) {
      const float value = to_float(v[n].data[j]);
      sum_sq += value * value;
    }
  }
  const float scale = rsqrtf(block_sum<kNumWarps>(sum_sq, scratch) / hidden_size + eps);
#pragma unroll
  for (int n = 0; n < kVecsPerThread; ++n) {
    const int i = first + n * kStride;
    if (i >= hidden_size) break;
    const V w = load_vec(weight + i);
#pragma unroll
    for (int j = 0; j < V::kSize; ++j)
      v[n].data[j] = from_float<scalar_t>(to_float(v[n].data[j]) * scale * to_float(w.data[j]));
    store_vec(out + row + i, v[n]);
  }
}
