// cuda_fp16.h for the host: __half and __half2, every operation rounded to nearest, ties to even.
#ifndef CUPAGED_HOST_CUDA_FP16_H
#define CUPAGED_HOST_CUDA_FP16_H

namespace host {

inline unsigned short half_bits(float x) {
  unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fff;                                // NaN
  if (bits >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);    // 65520 and up round to infinity
  if (bits < 0x38800000u)                                               // below 2^-14: 0.5 has the subnormals' unit
    return (unsigned short)(sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u));
  bits -= 0x38000000u;  // the exponent's bias from 127 to 15
  return (unsigned short)(sign | (bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

inline float half_value(unsigned short half) {
  const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(float(mantissa) * 0x1p-24f));
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

}  // namespace host

#define CUPAGED_HALF_TYPE(name)                                                            \
  struct name {                                                                            \
    unsigned short bits;                                                                   \
    name() = default;                                                                      \
    name(float x);                                                                         \
    name(int x) : name(float(x)) {}                                                        \
    name(unsigned x) : name(float(x)) {}                                                   \
    operator float() const;                                                                \
    name& operator+=(name other);                                                          \
    name& operator-=(name other);                                                          \
    name& operator*=(name other);                                                          \
    name& operator/=(name other);                                                          \
  };                                                                                       \
  struct alignas(4) name##_pair {                                                          \
    name x, y;                                                                             \
  };

CUPAGED_HALF_TYPE(__half)
using half = __half;
using __half2 = __half_pair;
using half2 = __half2;

inline __half::__half(float x) : bits(host::half_bits(x)) {}
inline __half::operator float() const { return host::half_value(bits); }

// Operators, and the intrinsics of both 16-bit types that differ in spelling only.
#define CUPAGED_HALF_ARITHMETIC(type, pair)                                                                     \
  inline type operator+(type a, type b) { return type(float(a) + float(b)); }                                   \
  inline type operator-(type a, type b) { return type(float(a) - float(b)); }                                   \
  inline type operator*(type a, type b) { return type(float(a) * float(b)); }                                   \
  inline type operator/(type a, type b) { return type(float(a) / float(b)); }                                   \
  inline type operator-(type a) { a.bits ^= 0x8000; return a; }                                                 \
  inline bool operator==(type a, type b) { return float(a) == float(b); }                                       \
  inline bool operator!=(type a, type b) { return float(a) != float(b); }                                       \
  inline bool operator<(type a, type b) { return float(a) < float(b); }                                         \
  inline bool operator<=(type a, type b) { return float(a) <= float(b); }                                       \
  inline bool operator>(type a, type b) { return float(a) > float(b); }                                         \
  inline bool operator>=(type a, type b) { return float(a) >= float(b); }                                       \
  inline type& type::operator+=(type other) { return *this = *this + other; }                                   \
  inline type& type::operator-=(type other) { return *this = *this - other; }                                   \
  inline type& type::operator*=(type other) { return *this = *this * other; }                                   \
  inline type& type::operator/=(type other) { return *this = *this / other; }                                   \
  inline type __hadd(type a, type b) { return a + b; }                                                          \
  inline type __hsub(type a, type b) { return a - b; }                                                          \
  inline type __hmul(type a, type b) { return a * b; }                                                          \
  inline type __hneg(type a) { return -a; }                                                                     \
  inline type __habs(type a) { a.bits &= 0x7fff; return a; }                                                    \
  inline type __hmax(type a, type b) { return type(fmaxf(float(a), float(b))); }                                \
  inline type __hmin(type a, type b) { return type(fminf(float(a), float(b))); }                                \
  inline bool __hisnan(type a) { return float(a) != float(a); }                                                 \
  inline pair __hadd2(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }                                        \
  inline pair __hsub2(pair a, pair b) { return {a.x - b.x, a.y - b.y}; }                                        \
  inline pair __hmul2(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }                                        \
  inline float __low2float(pair a) { return float(a.x); }                                                       \
  inline float __high2float(pair a) { return float(a.y); }
CUPAGED_HALF_ARITHMETIC(__half, __half2)

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { __half x; x.bits = bits; return x; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }

#endif  // CUPAGED_HOST_CUDA_FP16_H
