// divisor.cuh: division of many numbers by one that only the launcher knows.
#ifndef CUPAGED_DIVISOR_CUH
#define CUPAGED_DIVISOR_CUH

// Passed by value; cupaged/kernels/divisor.py computes what it holds. x / value = x * multiplier >> 31 + shift for all
// 0 <= x < 2^31, with 2^shift >= value and multiplier = ceil(2^(31 + shift) / value) < 2^32: that is too large by less
// than 1, which times x is less than 2^31, and so moves no quotient past the next whole number.
struct Divisor {
  int value;  // > 0
  int shift;
  unsigned multiplier;
};

__device__ __forceinline__ int operator/(int x, const Divisor& divisor) {
  return int(__umulhi(2u * x, divisor.multiplier) >> divisor.shift);
}
__device__ __forceinline__ int operator%(int x, const Divisor& divisor) { return x - x / divisor * divisor.value; }

#endif  // CUPAGED_DIVISOR_CUH
