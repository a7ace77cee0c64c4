// philox.cuh: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a counter-based
// generator: the same key and counter give the same number wherever and in whatever company they are asked for.
#ifndef CUPAGED_PHILOX_CUH
#define CUPAGED_PHILOX_CUH

// The first 64 of the 128 bits that Philox4x32-10 gives for this key and counter (the counter's upper half is zero).
__device__ __forceinline__ unsigned long long philox_u64(unsigned long long key, unsigned long long counter) {
  constexpr int kNumRounds = 10;
  unsigned x0 = (unsigned)counter, x1 = (unsigned)(counter >> 32), x2 = 0, x3 = 0;
  unsigned k0 = (unsigned)key, k1 = (unsigned)(key >> 32);
#pragma unroll
  for (int round = 0; round < kNumRounds; ++round) {
    const unsigned long long product0 = (unsigned long long)x0 * 0xD2511F53u;
    const unsigned long long product1 = (unsigned long long)x2 * 0xCD9E8D57u;
    x0 = (unsigned)(product1 >> 32) ^ x1 ^ k0;
    x1 = (unsigned)product1;
    x2 = (unsigned)(product0 >> 32) ^ x3 ^ k1;
    x3 = (unsigned)product0;
    k0 += 0x9E3779B9u;  // the golden ratio and sqrt(3) - 1, as fractions of 2^32
    k1 += 0xBB67AE85u;
  }
  return (unsigned long long)x1 << 32 | x0;
}

#endif  // CUPAGED_PHILOX_CUH
