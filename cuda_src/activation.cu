// activation.cu: out[t, i] = silu(gate[t, i]) * up[t, i],  silu(g) = g / (1 + exp(-g))
//
// Work:     thread block (t, c): chunk c of row t, one vector of 8 elements a thread.
// Numerics: float32, one rounding, at the store.
// Bound:    bytes: gate, up and out once each. Not yet measured.
#include "common.cuh"

template <typename scalar_t,  // storage type of gate_up and out, 2 bytes
          int kNumThreads>    // threads per block
__global__ void __launch_bounds__(kNumThreads)
silu_and_mul(scalar_t* __restrict__ out,            // [gridDim.x, intermediate_size]
             const scalar_t* __restrict__ gate_up,  // [gridDim.x, 2 (gate, up), intermediate_size]
             int intermediate_size) {               // a multiple of 8
  using V = Vec<scalar_t>;
  const int i = (blockIdx.y * kNumThreads + threadIdx.x) * V::kSize;
  if (i >= intermediate_size) return;
  const long long row = (long long)blockIdx.x * intermediate_size;
  const V gate = load_vec(gate_up + 2 * row + i);
  const V up = load_vec(gate_up + 2 * row + intermediate_size + i);
  V result;
#pragma unroll
  for (int j = 0; j < V::kSize; ++j) {
    const float g = to_float(gate.data[j]);
    result.data[j] = from_float<scalar_t>(g / (1.f + expf(-g)) * to_float(up.data[j]));
  }
  store_vec(out + row + i, result);
}
