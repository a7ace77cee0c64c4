// sampler.cu: one token a row, drawn from softmax(logits / temperature) after min_p, top_k and top_p
//
// Probabilities: a token's mass is floor(2^40 * exp((logit - max) / temperature)), made by integer arithmetic from one
//           float32 difference, product and conversion. Sums of masses are exact, so neither the order of summation
//           nor the launch shape can change a draw, and NumPy computes the very same integers.
// Filters:  each one lowers the kept set to the tokens at or above a threshold (ties stay). No sort: a radix descent
//           over the logits' order-preserving keys, 8 bits a pass from the top, finds the threshold from a histogram
//           of counts (top_k) or of masses (top_p).
// Draw:     inverse CDF in id order: the first token whose running mass exceeds random * total / 2^64. A descent too:
//           the ids are cut into one part a warp, the part that holds the draw is cut again.
// Work:     one thread block a row.
// Traffic:  bound by reading the row from L2, where its 4 * vocab_size bytes stay after the first pass: 1 pass for a
//           greedy row, 2 and a bit for a plain temperature, 4 more for top_k, 5 more for top_p. Measured: docs/performance.md.
#include "philox.cuh"
#include "token_order.cuh"

constexpr float kLog2E = 1.44269504f;
constexpr int kMassBits = 40;  // 2^23 tokens of mass 2^40 still add up within 64 bits
constexpr unsigned long long kMaxMass = 1ull << kMassBits;

struct SamplingRow {  // SAMPLING_ROW in cupaged/backends/base.py
  float temperature;  // > 0; 0 means greedy
  float top_p;        // (0, 1]
  float min_p;        // [0, 1]
  int top_k;          // 0 keeps all
  unsigned long long seed;
  unsigned long long counter;
};

// 2^40 * 2^-x rounded down, for x in [0, 64) as a fixed-point number with 26 fraction bits; relative error < 2^-27
// before the rounding down, and x = 0 gives 2^40 exactly.
//
// With f the fraction of x, 1 - 2^-f = f * q(f); q is a minimax polynomial whose coefficients alternate in sign, so that
// Horner's scheme runs in unsigned 32-bit fractions. (The degree that makes the error smaller than a step of x, which
// keeps the function monotonic.)
__device__ __forceinline__ unsigned long long exp2_mass(unsigned x) {
  const unsigned f = x << 6;
  unsigned q = 0x0007346cu;
  q = 0x0053b871u - __umulhi(f, q);
  q = 0x0273fae0u - __umulhi(f, q);
  q = 0x0e34be42u - __umulhi(f, q);
  q = 0x3d7f5ddeu - __umulhi(f, q);
  q = 0xb1721670u - __umulhi(f, q);
  return (kMaxMass - ((unsigned long long)f * q >> (64 - kMassBits))) >> (x >> 26);
}

// The tokens of one row that are still kept, with their masses.
struct Candidates {
  const float* logits;
  float max_logit;
  float scale;                  // log2(e) / temperature
  unsigned long long min_mass;  // at least 1
  unsigned threshold;           // smallest key that is kept

  // The mass of token id, 0 if it isn't kept; key gets its order-preserving key.
  __device__ __forceinline__ unsigned long long mass(int id, unsigned& key) const {
    key = logit_key(logits[id]);
    const float logit = logit_of_key(key);  // without NaN
    const float gap = logit == max_logit ? 0.f : max_logit - logit;  // inf - inf is a tie with the maximum
    const float exponent = gap > 0.f ? fminf(gap * scale, 63.f) : 0.f;
    const unsigned long long mass = exp2_mass((unsigned)(exponent * 67108864.f));  // 2^26: the product is exact
    return key >= threshold && mass >= min_mass ? mass : 0;
  }
};

struct Count {
  __device__ unsigned long long operator()(unsigned long long mass) const { return mass ? 1 : 0; }
};
struct Mass {
  __device__ unsigned long long operator()(unsigned long long mass) const { return mass; }
};

template <int kNumThreads>  // of the thread block, which serves one row
struct Sampler {
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kNumDigits = 256;
  static constexpr int kDigitsPerLane = kNumDigits / kWarpSize;

  struct Shared {
    unsigned long long parts[kNumWarps];
    unsigned low[kNumDigits], high[kNumDigits];  // a histogram of 64-bit weights in two halves
    unsigned digit;
    unsigned long long remaining;
  };

  // Sum of f(id) over the ids begin .. end - 1 that this thread visits, neighbours side by side.
  template <typename F>
  static __device__ __forceinline__ unsigned long long thread_sum(int begin, int end, int stride, F f) {
    unsigned long long sum = 0;
#pragma unroll 4
    for (int id = begin; id < end; id += stride) sum += f(id);
    return sum;
  }

  // The largest key such that the candidates at or above it weigh at least `target` (> 0) together; 0 if all of them
  // weigh less. All threads call it.
  template <typename Weight>
  static __device__ unsigned threshold_key(Shared& shared, const Candidates& candidates, int vocab_size, Weight weight,
                                           unsigned long long target) {
    unsigned prefix = 0;  // the digits of the key that are known
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int d = threadIdx.x; d < kNumDigits; d += kNumThreads) shared.low[d] = shared.high[d] = 0;
      __syncthreads();
      const unsigned known = shift == 24 ? 0 : ~0u << (shift + 8);
#pragma unroll 4
      for (int id = threadIdx.x; id < vocab_size; id += kNumThreads) {
        unsigned key;
        const unsigned long long w = weight(candidates.mass(id, key));
        if (w == 0 || (key & known) != prefix) continue;
        const unsigned digit = key >> shift & (kNumDigits - 1);
        // 64-bit shared atomics are loops; two 32-bit ones are not, and the adder that overflows carries.
        const unsigned low = (unsigned)w;
        const unsigned carry = atomicAdd(&shared.low[digit], low) > ~low;
        const unsigned high = (unsigned)(w >> 32) + carry;
        if (high) atomicAdd(&shared.high[digit], high);
      }
      __syncthreads();
      if (threadIdx.x < kWarpSize) find_digit(shared, target);
      __syncthreads();
      prefix |= shared.digit << shift;
      target = shared.remaining;
    }
    return prefix;
  }

  // The largest digit at which the histogram, summed from the top, reaches `target`, and what remains of the target
  // below the larger digits; digit 0 if it is never reached. One warp calls it.
  static __device__ __forceinline__ void find_digit(Shared& shared, unsigned long long target) {
    const int lane = threadIdx.x;
    const int top = kNumDigits - 1 - lane * kDigitsPerLane;  // lane 0 has the largest digits
    const auto bin = [&](int d) { return (unsigned long long)shared.high[d] << 32 | shared.low[d]; };
    unsigned long long mine = 0;
    for (int i = 0; i < kDigitsPerLane; ++i) mine += bin(top - i);
    unsigned long long above = inclusive_scan(mine) - mine;
    const unsigned reached = __ballot_sync(kFullMask, above + mine >= target);
    const int finder = reached ? __ffs(reached) - 1 : kWarpSize - 1;
    if (lane != finder) return;
    int digit = top;
    for (const int last = top - kDigitsPerLane + 1; digit > last && above + bin(digit) < target; --digit)
      above += bin(digit);
    shared.digit = digit;
    shared.remaining = target - above;
  }

  static __device__ __forceinline__ unsigned long long inclusive_scan(unsigned long long x) {  // over the warp's lanes
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const unsigned long long below = __shfl_up_sync(kFullMask, x, offset);
      if (lane >= offset) x += below;
    }
    return x;
  }

  static __device__ unsigned long long total_mass(Shared& shared, const Candidates& candidates, int vocab_size) {
    const auto mass = [&](int id) { unsigned key; return candidates.mass(id, key); };
    return block_reduce<kNumWarps>(thread_sum(threadIdx.x, vocab_size, kNumThreads, mass), shared.parts, Sum{});
  }

  // The first candidate in id order whose inclusive running mass exceeds random / 2^64 of the whole. Thread 0 gets
  // it, if not the others. PRECOND: some candidate has mass.
  static __device__ int draw(Shared& shared, const Candidates& candidates, int vocab_size, unsigned long long random) {
    const auto mass = [&](int id) { unsigned key; return candidates.mass(id, key); };
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int begin = 0, end = vocab_size;  // where the draw lies
    unsigned long long point = 0;     // mass between `begin` and the draw
    for (bool whole_row = true;; whole_row = false) {
      const int part = ceil_div(ceil_div(end - begin, kNumWarps), kWarpSize) * kWarpSize;  // ids a warp
      const int first = min(begin + warp * part, end);
      const unsigned long long sum =
          warp_reduce(thread_sum(first + lane, min(first + part, end), kWarpSize, mass), Sum{});
      if (lane == 0) shared.parts[warp] = sum;
      __syncthreads();
      if (whole_row) {
        unsigned long long total = 0;
        for (int w = 0; w < kNumWarps; ++w) total += shared.parts[w];
        point = __umul64hi(random, total);
      }
      int w = 0;
      while (point >= shared.parts[w]) point -= shared.parts[w++];
      __syncthreads();
      begin += w * part;
      end = min(begin + part, end);
      if (part == kWarpSize) break;
    }
    const unsigned long long running = inclusive_scan(begin + lane < end ? mass(begin + lane) : 0);
    return begin + __ffs(__ballot_sync(kFullMask, running > point)) - 1;
  }
};

// grid (num_rows), block (kNumThreads)
template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads, 1)
sample(int* __restrict__ token_ids,            // [num_rows]
       const float* __restrict__ logits,       // [num_rows, row_size]
       const SamplingRow* __restrict__ rows,   // [num_rows]
       int row_size, int vocab_size) {         // 1 <= vocab_size <= row_size, at most 2^23
  using S = Sampler<kNumThreads>;
  static_assert(kNumThreads % kWarpSize == 0 && kNumThreads <= 1024, "whole warps, one thread block");
  __shared__ typename S::Shared shared;
  const SamplingRow row = rows[blockIdx.x];
  logits += (long long)blockIdx.x * row_size;  // 64-bit: rows * vocabulary can pass 2^31

  unsigned long long best = 0;
#pragma unroll 4
  for (int id = threadIdx.x; id < vocab_size; id += kNumThreads) best = Max{}(best, token_rank(logits[id], id));
  best = block_reduce<S::kNumWarps>(best, shared.parts, Max{});

  const bool drawable = key_of_rank(best) > kNegInfKey;
  if (!drawable || !(row.temperature > 0.f)) {
    if (threadIdx.x == 0) token_ids[blockIdx.x] = drawable ? id_of_rank(best) : -1;
    return;
  }

  Candidates candidates;
  candidates.logits = logits;
  candidates.max_logit = logit_of_key(key_of_rank(best));
  candidates.scale = kLog2E / row.temperature;
  candidates.min_mass = Max{}(1, (unsigned long long)ceilf(fminf(row.min_p, 1.f) * (float)kMaxMass));
  candidates.threshold = 0;
  if (row.top_k > 0 && row.top_k < vocab_size)
    candidates.threshold = S::threshold_key(shared, candidates, vocab_size, Count{}, row.top_k);
  if (row.top_p < 1.f) {
    // target = ceil(top_p * total), at least 1: a float32 in [2^-41, 1) is a whole number of 2^-64
    const unsigned long long total = S::total_mass(shared, candidates, vocab_size);
    const unsigned long long top_p = (unsigned long long)(fmaxf(row.top_p, 0.f) * 18446744073709551616.f);
    const unsigned long long target = Max{}(1, __umul64hi(top_p, total) + (top_p * total != 0));
    candidates.threshold =
        Max{}(candidates.threshold, S::threshold_key(shared, candidates, vocab_size, Mass{}, target));
  }
  const int token = S::draw(shared, candidates, vocab_size, philox_u64(row.seed, row.counter));
  if (threadIdx.x == 0) token_ids[blockIdx.x] = token;
}
