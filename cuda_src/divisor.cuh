// divisor.cuh: division of many numbers by one that is known at run time only.
#ifndef CUPAGED_DIVISOR_CUH
#define CUPAGED_DIVISOR_CUH

// x / divisor = x * m >> 31 + s for all 0 <= x < 2^31, with 2^s >= divisor and m = ceil(2^(31 + s) / divisor) < 2^32: m
// is too large by less than 1, which times x is less than 2^31, and so moves no quotient past the next whole number.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(int divisor)  // > 0
      : divisor_(divisor), shift_(divisor == 1 ? 0 : 32 - __clz(divisor - 1)),
        multiplier_(unsigned(((1ull << (31 + shift_)) + divisor - 1) / divisor)) {}

  __device__ __forceinline__ operator int() const { return divisor_; }
  __device__ __forceinline__ friend int operator/(int x, const Divisor& d) {
    return int(__umulhi(2u * x, d.multiplier_) >> d.shift_);
  }
  __device__ __forceinline__ friend int operator%(int x, const Divisor& d) { return x - x / d * d.divisor_; }

 private:
  int divisor_, shift_;
  unsigned multiplier_;
};

#endif  // CUPAGED_DIVISOR_CUH
