// partial_sums.cu: out[b] = the sum of what thread block b reads of x; together they read every element once
//
// Work:     the thread blocks share x out in turns of kUnroll * kNumThreads 16-byte vectors each.
// Numerics: float32, each thread in the order of addresses, then across the thread block.
// Bound:    bytes, and nothing else to do: its speed is the read ceiling of `cupaged bench kernels`. Measured: docs/performance.md.
#include "common.cuh"

template <typename scalar_t,  // storage type of x
          int kNumThreads,    // threads per block
          int kUnroll>        // vectors that a thread has under way at once
__global__ void __launch_bounds__(kNumThreads)
partial_sums(float* __restrict__ out,         // [gridDim.x]
             const scalar_t* __restrict__ x,  // [num_vectors * Vec::kSize]
             long long num_vectors) {
  using V = Vec<scalar_t>;
  __shared__ float scratch[kNumThreads / kWarpSize];
  float sum = 0.f;
  const long long turn = (long long)gridDim.x * kUnroll * kNumThreads;
  for (long long first = (long long)blockIdx.x * kUnroll * kNumThreads + threadIdx.x; first < num_vectors;
       first += turn) {
    V vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // all loads stand before the first addition
      const long long i = first + u * kNumThreads;
      vectors[u] = i < num_vectors ? load_vec(x + i * V::kSize) : V{};
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < V::kSize; ++j) sum += to_float(vectors[u].data[j]);
  }
  sum = block_sum<kNumThreads / kWarpSize>(sum, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
