// shim.h: CUDA C++ as plain C++. Included before every kernel source; one CUDA thread is one fiber of runtime.cpp.
#ifndef CUPAGED_HOST_SHIM_H
#define CUPAGED_HOST_SHIM_H

#include <math.h>
#include <string.h>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // see cluster_size
#define __shared__ static  // all of a kernel's static data, so .bss is its static shared memory
#define __constant__ static const
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define DYNAMIC_SHARED(name) unsigned char* const name = ::host::dynamic_shared()
#define __CUDA_ARCH__ 800

// -- vector types -------------------------------------------------------------------------------------------

#define CUPAGED_VECTOR_TYPES(type, name)                                                                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                           \
  struct name##3 { type x, y, z; };                                                                                  \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };                        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                   \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                        \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 cupaged_uint3  // runtime.h has it
CUPAGED_VECTOR_TYPES(int, int)
CUPAGED_VECTOR_TYPES(unsigned, uint)
CUPAGED_VECTOR_TYPES(float, float)
CUPAGED_VECTOR_TYPES(long long, longlong)
CUPAGED_VECTOR_TYPES(unsigned long long, ulonglong)
#undef uint3
#undef CUPAGED_VECTOR_TYPES

// -- barriers, shuffles, votes ------------------------------------------------------------------------------

inline void __syncthreads(host::Site site = host::Site::here()) {
  host::block_barrier("__syncthreads", host::Reduce::kNone, 0, site);
}
inline int __syncthreads_or(int predicate, host::Site site = host::Site::here()) {
  return host::block_barrier("__syncthreads_or", host::Reduce::kOr, predicate, site);
}
inline int __syncthreads_and(int predicate, host::Site site = host::Site::here()) {
  return host::block_barrier("__syncthreads_and", host::Reduce::kAnd, predicate, site);
}
inline int __syncthreads_count(int predicate, host::Site site = host::Site::here()) {
  return host::block_barrier("__syncthreads_count", host::Reduce::kCount, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, host::Site site = host::Site::here()) {
  host::warp_barrier(mask, site);
}

namespace host {
template <typename T>
inline T shuffle(const char* name, Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) <= sizeof(unsigned long long), "a shuffle moves at most 8 bytes");
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(name, kind, mask, bits, operand, width, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace host

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, host::Site site = host::Site::here()) {
  return host::shuffle("__shfl_sync", host::Shuffle::kIndex, mask, value, lane, width, site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, host::Site site = host::Site::here()) {
  return host::shuffle("__shfl_xor_sync", host::Shuffle::kXor, mask, value, lane_mask, width, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, host::Site site = host::Site::here()) {
  return host::shuffle("__shfl_up_sync", host::Shuffle::kUp, mask, value, int(delta), width, site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          host::Site site = host::Site::here()) {
  return host::shuffle("__shfl_down_sync", host::Shuffle::kDown, mask, value, int(delta), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, host::Site site = host::Site::here()) {
  return host::vote("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, host::Site site = host::Site::here()) {
  return host::vote("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, host::Site site = host::Site::here()) {
  return host::vote("__all_sync", mask, predicate, site) == mask;
}

namespace host {
template <typename T, typename Op>
inline T reduce(const char* name, unsigned mask, T value, Op op, Site site) {
  unsigned long long values[32];
  match(name, mask, values, (unsigned long long)value, site);
  T result = 0;
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    result = first ? T(values[lane]) : op(result, T(values[lane]));
    first = false;
  }
  return result;
}
}  // namespace host

#define CUPAGED_WARP_REDUCE(name, type, expression)                                                                  \
  inline type name(unsigned mask, type value, host::Site site = host::Site::here()) {                                \
    return host::reduce(#name, mask, value, [](type a, type b) { return type(expression); }, site);                  \
  }
CUPAGED_WARP_REDUCE(__reduce_add_sync, int, unsigned(a) + unsigned(b))
CUPAGED_WARP_REDUCE(__reduce_add_sync, unsigned, a + b)
CUPAGED_WARP_REDUCE(__reduce_max_sync, int, a > b ? a : b)
CUPAGED_WARP_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
CUPAGED_WARP_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUPAGED_WARP_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUPAGED_WARP_REDUCE(__reduce_and_sync, unsigned, a & b)
CUPAGED_WARP_REDUCE(__reduce_or_sync, unsigned, a | b)
CUPAGED_WARP_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef CUPAGED_WARP_REDUCE

// -- memory -------------------------------------------------------------------------------------------------

// Fibers switch only at collectives, so that reading and then writing is atomic here.
#define CUPAGED_ATOMIC(name, type, expression)               \
  inline type name(type* address, type value) {              \
    type old;                                                \
    host::atomic_read(address, &old, sizeof(type));          \
    const type result = expression;                          \
    host::atomic_write(address, &result, sizeof(type));      \
    return old;                                              \
  }
#define CUPAGED_ATOMICS(type)                                \
  CUPAGED_ATOMIC(atomicMax, type, old > value ? old : value) \
  CUPAGED_ATOMIC(atomicMin, type, old < value ? old : value) \
  CUPAGED_ATOMIC(atomicExch, type, value)                    \
  CUPAGED_ATOMIC(atomicOr, type, old | value)                \
  CUPAGED_ATOMIC(atomicAnd, type, old & value)               \
  CUPAGED_ATOMIC(atomicXor, type, old ^ value)               \
  inline type atomicCAS(type* address, type compare, type value) { \
    type old;                                                \
    host::atomic_read(address, &old, sizeof(type));          \
    const type result = old == compare ? value : old;        \
    host::atomic_write(address, &result, sizeof(type));      \
    return old;                                              \
  }
CUPAGED_ATOMICS(int)
CUPAGED_ATOMICS(unsigned)
CUPAGED_ATOMICS(unsigned long long)
CUPAGED_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(value)))  // wraps, as on a GPU
CUPAGED_ATOMIC(atomicSub, int, int(unsigned(old) - unsigned(value)))
CUPAGED_ATOMIC(atomicAdd, unsigned, old + value)
CUPAGED_ATOMIC(atomicSub, unsigned, old - value)
CUPAGED_ATOMIC(atomicAdd, unsigned long long, old + value)
CUPAGED_ATOMIC(atomicAdd, float, old + value)
CUPAGED_ATOMIC(atomicExch, float, value)
CUPAGED_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
#undef CUPAGED_ATOMICS
#undef CUPAGED_ATOMIC

inline void __threadfence() {}
inline void __threadfence_block() {}

#define CUPAGED_LOAD(name)      \
  template <typename T>         \
  inline T name(const T* p) {   \
    return *p;                  \
  }
CUPAGED_LOAD(__ldg)
CUPAGED_LOAD(__ldcg)
CUPAGED_LOAD(__ldcs)
CUPAGED_LOAD(__ldca)
#undef CUPAGED_LOAD
#define CUPAGED_STORE(name)             \
  template <typename T>                 \
  inline void name(T* p, T value) {     \
    *p = value;                         \
  }
CUPAGED_STORE(__stcg)
CUPAGED_STORE(__stcs)
CUPAGED_STORE(__stwb)
#undef CUPAGED_STORE

// -- arithmetic ---------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { unsigned r; memcpy(&r, &x, 4); return r; }
inline int __float_as_int(float x) { int r; memcpy(&r, &x, 4); return r; }
inline float __uint_as_float(unsigned x) { float r; memcpy(&r, &x, 4); return r; }
inline float __int_as_float(int x) { float r; memcpy(&r, &x, 4); return r; }
inline long long __double_as_longlong(double x) { long long r; memcpy(&r, &x, 8); return r; }
inline double __longlong_as_double(long long x) { double r; memcpy(&r, &x, 8); return r; }

// min and max as CUDA overloads them; mixed operands go to the wider, or unsigned, type.
#define CUPAGED_MIN_MAX(a_type, b_type, type)                                                                        \
  inline type min(a_type a, b_type b) { return (type)a < (type)b ? (type)a : (type)b; }                                 \
  inline type max(a_type a, b_type b) { return (type)a > (type)b ? (type)a : (type)b; }
CUPAGED_MIN_MAX(int, int, int)
CUPAGED_MIN_MAX(unsigned, unsigned, unsigned)
CUPAGED_MIN_MAX(int, unsigned, unsigned)
CUPAGED_MIN_MAX(unsigned, int, unsigned)
CUPAGED_MIN_MAX(long long, long long, long long)
CUPAGED_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
CUPAGED_MIN_MAX(long long, unsigned long long, unsigned long long)
CUPAGED_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef CUPAGED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }  // NaN becomes 0

namespace host {
// float to integer as the GPU does it: NaN becomes 0, what doesn't fit becomes the nearest that does.
template <typename T>
inline T to_integer(double x, double low, double high) {
  return x != x ? T(0) : x <= low ? T(low) : x >= high ? T(high) : T(x);
}
}  // namespace host
inline int __float2int_rn(float x) { return host::to_integer<int>(rintf(x), -2147483648.0, 2147483647.0); }
inline int __float2int_rz(float x) { return host::to_integer<int>(truncf(x), -2147483648.0, 2147483647.0); }
inline int __float2int_rd(float x) { return host::to_integer<int>(floorf(x), -2147483648.0, 2147483647.0); }
inline int __float2int_ru(float x) { return host::to_integer<int>(ceilf(x), -2147483648.0, 2147483647.0); }
inline unsigned __float2uint_rn(float x) { return host::to_integer<unsigned>(rintf(x), 0.0, 4294967295.0); }
inline unsigned __float2uint_rz(float x) { return host::to_integer<unsigned>(truncf(x), 0.0, 4294967295.0); }
inline unsigned long long __float2ull_rn(float x) {
  return x >= 18446744073709551616.f ? ~0ull : host::to_integer<unsigned long long>(rintf(x), 0.0, 1.8446744e19);
}
inline unsigned long long __float2ull_rz(float x) {
  return x >= 18446744073709551616.f ? ~0ull : host::to_integer<unsigned long long>(truncf(x), 0.0, 1.8446744e19);
}
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)high << 32 | low;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}

#include "cuda_fp16.h"
#include "cuda_bf16.h"
#include "ptx_host.h"
#include "ptx_sm90_host.h"

#endif  // CUPAGED_HOST_SHIM_H
