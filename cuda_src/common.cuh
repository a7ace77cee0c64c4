// common.cuh: what every kernel uses: element types and conversions, 16-byte vectors, warp and block reductions.
#ifndef CUPAGED_COMMON_CUH
#define CUPAGED_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kNegInf = __builtin_bit_cast(float, 0xff800000u);  // no INFINITY under NVRTC

// The dynamic shared memory of a launch, aligned for 16-byte copies and ldmatrix. The host build brings its own.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// -- element types ------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);  // rounds to nearest, ties to even
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes of elements: one vector load or store.
template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T data[kSize];
};

template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* p) {  // p 16-byte aligned
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <typename T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T>& v) {  // p 16-byte aligned
  *reinterpret_cast<Vec<T>*>(p) = v;
}

// 8 elements in float32: a vector of a 2-byte type, two vectors of float.
struct Float8 {
  float data[8];
};

template <typename scalar_t>
__device__ __forceinline__ Float8 load_float8(const scalar_t* p) {  // p 16-byte aligned
  const Vec<scalar_t> v = load_vec(p);
  Float8 f;
#pragma unroll
  for (int j = 0; j < 8; ++j) f.data[j] = to_float(v.data[j]);
  return f;
}

__device__ __forceinline__ Float8 load_float8(const float* p) {
  const Vec<float> low = load_vec(p), high = load_vec(p + 4);
  return {{low.data[0], low.data[1], low.data[2], low.data[3], high.data[0], high.data[1], high.data[2], high.data[3]}};
}

template <typename scalar_t>
__device__ __forceinline__ void store_float8(scalar_t* p, const Float8& f) {  // p 16-byte aligned
  Vec<scalar_t> v;
#pragma unroll
  for (int j = 0; j < 8; ++j) v.data[j] = from_float<scalar_t>(f.data[j]);
  store_vec(p, v);
}

__device__ __forceinline__ void store_float8(float* p, const Float8& f) {
  store_vec(p, Vec<float>{f.data[0], f.data[1], f.data[2], f.data[3]});
  store_vec(p + 4, Vec<float>{f.data[4], f.data[5], f.data[6], f.data[7]});
}

// -- reductions ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {  // every lane gets the sum
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

// Sum over the thread block, given to every thread. scratch [kNumWarps] floats of shared memory, free for reuse
// after the next barrier. PRECOND: blockDim.x == kNumWarps * 32, and all threads call it.
template <int kNumWarps>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if constexpr (kNumWarps > 1) {
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) x += scratch[w];  // the same order in every thread
  }
  return x;
}

#endif  // CUPAGED_COMMON_CUH
