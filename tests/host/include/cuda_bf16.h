// cuda_bf16.h for the host: __nv_bfloat16 and __nv_bfloat162, every operation rounded to nearest, ties to even.
#ifndef CUPAGED_HOST_CUDA_BF16_H
#define CUPAGED_HOST_CUDA_BF16_H

namespace host {

inline unsigned short bfloat16_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
  return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float bfloat16_value(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

}  // namespace host

CUPAGED_HALF_TYPE(__nv_bfloat16)
using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = __nv_bfloat16_pair;
using nv_bfloat162 = __nv_bfloat162;

inline __nv_bfloat16::__nv_bfloat16(float x) : bits(host::bfloat16_bits(x)) {}
inline __nv_bfloat16::operator float() const { return host::bfloat16_value(bits); }
CUPAGED_HALF_ARITHMETIC(__nv_bfloat16, __nv_bfloat162)

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { __nv_bfloat16 x; x.bits = bits; return x; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__nv_bfloat16(x), __nv_bfloat16(x)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {__nv_bfloat16(x.x), __nv_bfloat16(x.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {float(x.x), float(x.y)}; }

#endif  // CUPAGED_HOST_CUDA_BF16_H
