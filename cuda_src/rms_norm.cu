// rms_norm.cu: out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight
//
// Work:     one thread block a row. The row stays in registers between the two passes over it: kGroupsPerThread groups
//           of 8 elements a thread. Threads and groups depend on hidden_size alone, so a row's result doesn't depend
//           on how many others there are.
// Numerics: float32: squares summed element by element in a thread, then across the warp, then warp by warp; one
//           rounding, at the store.
// Overlap:  the weight is asked for before the wait for the kernel before.
// Bound:    bytes: x and out once each from DRAM; weight stays in L2. Measured: docs/performance.md.
#include "common.cuh"
#include "ptx.cuh"

template <typename scalar_t,      // storage type of out and weight, 2 bytes
          int kNumWarps,          // warps per thread block
          int kGroupsPerThread>   // groups of 8 elements of the row that one thread holds
__global__ void __launch_bounds__(kNumWarps * kWarpSize)
rms_norm(scalar_t* __restrict__ out,           // [gridDim.x, hidden_size]
         const float* __restrict__ x,          // [gridDim.x, hidden_size]
         const scalar_t* __restrict__ weight,  // [hidden_size]
         int hidden_size,                      // a multiple of 8, at most kNumWarps * 32 * kGroupsPerThread * 8
         float eps) {
  constexpr int kStride = kNumWarps * kWarpSize * 8;  // elements from one of a thread's groups to the next
  __shared__ float scratch[kNumWarps];
  const long long row = (long long)blockIdx.x * hidden_size;  // 64-bit: tokens * hidden can pass 2^31
  const int first = threadIdx.x * 8;

  griddepcontrol_launch_dependents();
  Vec<scalar_t> w[kGroupsPerThread];
#pragma unroll
  for (int n = 0; n < kGroupsPerThread; ++n)
    if (first + n * kStride < hidden_size) w[n] = load_vec(weight + first + n * kStride);
  griddepcontrol_wait();
  Float8 v[kGroupsPerThread];
  float sum_sq = 0.f;
#pragma unroll
  for (int n = 0; n < kGroupsPerThread; ++n) {
    const int i = first + n * kStride;
    if (i >= hidden_size) break;
    v[n] = load_float8(x + row + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum_sq += v[n].data[j] * v[n].data[j];
  }
  const float scale = rsqrtf(block_sum<kNumWarps>(sum_sq, scratch) / hidden_size + eps);
#pragma unroll
  for (int n = 0; n < kGroupsPerThread; ++n) {
    const int i = first + n * kStride;
    if (i >= hidden_size) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[n].data[j] *= scale * to_float(w[n].data[j]);
    store_float8(out + row + i, v[n]);
  }
}
