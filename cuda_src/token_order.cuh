// token_order.cuh: one total order of tokens, for whatever looks for the most likely ones: the larger logit first, the
// lower id first on a tie. NaN counts as -inf, and -0 equals +0.
#ifndef CUPAGED_TOKEN_ORDER_CUH
#define CUPAGED_TOKEN_ORDER_CUH

#include "common.cuh"

constexpr unsigned kNegInfKey = 0x007fffffu;  // logit_key(-inf), the smallest key

// An unsigned integer in the order of the logits. Bit operations only: flushing denormals can't change it.
__device__ __forceinline__ unsigned logit_key(float logit) {
  unsigned bits = __float_as_uint(logit);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;  // NaN
  if (bits == 0x80000000u) bits = 0;                           // -0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of_key(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A token as one integer, larger for a more likely token; 0 is smaller than every token.
__device__ __forceinline__ unsigned long long token_rank(float logit, int id) {
  return (unsigned long long)logit_key(logit) << 32 | ~(unsigned)id;
}

__device__ __forceinline__ int id_of_rank(unsigned long long rank) { return (int)~(unsigned)rank; }
__device__ __forceinline__ unsigned key_of_rank(unsigned long long rank) { return (unsigned)(rank >> 32); }

struct Max {
  __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const { return a > b ? a : b; }
};
struct Sum {
  __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const { return a + b; }
};

template <typename Op>
__device__ __forceinline__ unsigned long long warp_reduce(unsigned long long x, Op op) {  // every lane gets it
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

// The reduction over the thread block, given to every thread; exact, so its order doesn't matter. scratch [kNumWarps]
// of shared memory, free for reuse on return. PRECOND: blockDim.x == kNumWarps * 32, and all threads call it.
template <int kNumWarps, typename Op>
__device__ __forceinline__ unsigned long long block_reduce(unsigned long long x, unsigned long long* scratch, Op op) {
  x = warp_reduce(x, op);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int w = 1; w < kNumWarps; ++w) x = op(x, scratch[w]);
  __syncthreads();
  return x;
}

#endif  // CUPAGED_TOKEN_ORDER_CUH
