// sampler.cu: one token a row, drawn from softmax(logits / temperature) after min_p, top_k and top_p
//
// Probabilities: a token's mass is floor(2^40 * exp((logit - max) / temperature)), made by integer arithmetic from one
//           float32 difference, product and conversion. Sums of masses are exact, so neither the order of summation
//           nor the launch shape can change a draw, and NumPy computes the very same integers.
// Filters:  each one lowers the kept set to the tokens at or above a threshold (ties stay). Without a sort: those that
//           may be the last one kept, as a rule some tens or hundreds, are listed. For top_k these are the tokens at or
//           above a bound (row_slices.cuh), for top_p those in one bin of a histogram of masses, whose bins are 1/64 as
//           wide as they lie below the largest logit. Should they be too many, the whole row stands for the list.
// Draw:     inverse CDF in id order: the first token whose running mass exceeds random * total / 2^64. First among the
//           sums of the row's parts, then in the slices of a part; where top_k leaves few tokens, among these at once.
// Work:     three kernels over the parts of rows (row_slices.cuh). Rows end in the first that can draw them:
//           sample_likeliest  all rows: the largest logit, and the bound for top_k. Greedy rows end here.
//           sample_weighed    tokens listed for top_k, or the parts' sums; for top_p alone histograms instead
//           sample_top_p      rows with top_p alone: the bin's tokens listed, sums of the bins above it
// Overlap:  the second and third read their first slices before they wait: they begin when the first has waited itself,
//           so that the logits, which are older than that, are complete.
// Traffic:  bound by reading the row, once a kernel: from DRAM where rows don't fit into L2. Few rows: latency of the
//           launches. Measured: docs/performance.md.
#include "philox.cuh"
#include "ptx.cuh"
#include "row_slices.cuh"

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

  __device__ __forceinline__ bool is_greedy() const { return !(temperature > 0.f); }
  __device__ __forceinline__ bool has_top_k(int vocab_size) const {
    return !is_greedy() && 0 < top_k && top_k < vocab_size;
  }
  __device__ __forceinline__ bool has_top_p_alone(int vocab_size) const {
    return !is_greedy() && top_p < 1.f && !has_top_k(vocab_size);
  }
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

// The masses of one row's tokens, and which are still kept.
struct Candidates {
  float max_logit;
  float scale;                  // log2(e) / temperature
  unsigned long long min_mass;  // at least 1
  unsigned threshold;           // smallest key that is kept

  __device__ __forceinline__ Candidates(const SamplingRow& params, unsigned max_key)
      : max_logit(logit_of_key(max_key)),
        scale(kLog2E / params.temperature),
        min_mass(Max{}(1, (unsigned long long)ceilf(fminf(params.min_p, 1.f) * (float)kMaxMass))),
        threshold(0) {}

  // -log2 of a token's mass over the largest one, up to 63. NaN stands for -inf.
  __device__ __forceinline__ float exponent(float logit) const {
    const float gap = logit == max_logit ? 0.f : max_logit - logit;  // inf - inf is a tie with the maximum
    return gap <= 0.f ? 0.f : fminf(gap * scale, 63.f);
  }

  // 0 if min_p drops it
  __device__ __forceinline__ unsigned long long mass(float logit) const {
    const unsigned long long mass = exp2_mass((unsigned)(exponent(logit) * 67108864.f));  // 2^26: the product is exact
    return mass >= min_mass ? mass : 0;
  }

  // 0 if it isn't kept
  __device__ __forceinline__ unsigned long long kept_mass(unsigned key) const {
    return key >= threshold ? mass(logit_of_key(key)) : 0;
  }

  // The bin of the token's exponent, from the likeliest tokens on: the upper bits of a float, 64 bins each time that it
  // doubles from 2^-7 on.
  __device__ __forceinline__ int bin(float logit) const {
    constexpr int kMantissaBits = 6;
    static_assert(kNumBins == 13 << kMantissaBits, "exponents from 2^-7 to 2^6");
    const int upper = (int)(__float_as_uint(exponent(logit)) >> (23 - kMantissaBits));
    return max(0, upper - ((127 - 7) << kMantissaBits));
  }
};

// The mass that top_p in [0, 1) wants of a total: ceil(top_p * total), at least 1. A float32 in [2^-41, 1) is a whole
// number of 2^-64.
__device__ __forceinline__ unsigned long long top_p_target(float top_p, unsigned long long total) {
  const unsigned long long fraction = (unsigned long long)(fmaxf(top_p, 0.f) * 18446744073709551616.f);
  return Max{}(1, __umul64hi(fraction, total) + (fraction * total != 0));
}

template <int kNumThreads>
struct Sampler {
  using Slice = RowSlice<kNumThreads>;
  using Search = RowSearch<kNumThreads>;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;

  struct Shared {
    typename Search::Shared search;
    Token list[kListSize];
    int part;
    unsigned long long point;
  };

  // Set the workspace's state from the histogram of all candidates: the bin where their running mass reaches top_p.
  static __device__ void find_bin(Shared& shared, const RowWorkspace& row, float top_p) {
    constexpr int kBinsPerThread = ceil_div(kNumBins, kNumThreads);
    int bin = min((int)threadIdx.x * kBinsPerThread, kNumBins);
    const int end = min(bin + kBinsPerThread, kNumBins);
    unsigned long long mine = 0, total;
#pragma unroll 1
    for (int i = bin; i < end; ++i) mine += row.state->histogram[i];
    unsigned long long above = exclusive_scan<kNumWarps>(mine, shared.search.scratch, total);
    const unsigned long long target = top_p_target(top_p, total);
    if (above >= target || above + mine < target) return;
#pragma unroll 1
    for (; above + row.state->histogram[bin] < target; ++bin) above += row.state->histogram[bin];
    row.state->target = target;
    row.state->above = above;
    row.state->bin = bin;
  }

  // Draw the row's token from the sums of its parts and the listed tokens, which the sums don't have yet and which
  // top_k and top_p are still to choose from; what isn't listed is kept or not for good. PRECOND: some candidate has
  // mass.
  static __device__ void draw(int* token_id, Shared& shared, const SamplingRow& params, Candidates candidates,
                              const RowWorkspace& row, int num_parts, int slices_per_part, const float* logits,
                              int vocab_size) {
    const unsigned num_listed = row.counters->num_listed;
    const bool has_top_k = params.has_top_k(vocab_size);
    if (has_top_k) candidates.threshold = row.state->bound;
    const bool overflow = num_listed > kListSize;
    const int n = overflow ? vocab_size : num_listed;
    if (overflow)
#pragma unroll 1
      for (int i = threadIdx.x; i < num_parts; i += kNumThreads) row.parts[i].sum = 0;
    else
#pragma unroll 4
      for (int i = threadIdx.x; i < n; i += kNumThreads) shared.list[i] = row.list[i];
    __syncthreads();
    const auto token = [&](int i) { return overflow ? Token{logit_key(logits[i]), i} : shared.list[i]; };

#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {  // top_k, then top_p
      const bool is_top_p = filter == 1;
      unsigned long long target = params.top_k;
      if (is_top_p && has_top_k) {
        if (!(params.top_p < 1.f)) break;
        unsigned long long sum = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += kNumThreads) sum += candidates.kept_mass(token(i).key);
        target = top_p_target(params.top_p, block_reduce<kNumWarps>(sum, shared.search.scratch, Sum{}));
      } else if (is_top_p) {
        if (n == 0) break;  // no top_p either
        target = row.state->target - (overflow ? 0 : row.state->above);
      } else if (!has_top_k) {
        continue;
      }
      const auto weight = [&](int i, unsigned& key) {
        key = token(i).key;
        const unsigned long long mass = candidates.kept_mass(key);
        return is_top_p ? mass : (unsigned long long)(mass != 0);
      };
      candidates.threshold = max(candidates.threshold, Search::threshold_key(shared.search, n, weight, target));
    }
    const unsigned long long random = philox_u64(params.seed, params.counter);

    if (has_top_k && n <= kNumThreads) {  // few tokens, and no others are kept
      const Token mine = shared.list[min((int)threadIdx.x, n - 1)];
      const unsigned long long mass = threadIdx.x < n ? candidates.kept_mass(mine.key) : 0;
      auto& few = shared.search.few;
      few.keys[threadIdx.x] = mine.id;
      few.weights[threadIdx.x] = mass;
      const unsigned long long point =
          __umul64hi(random, block_reduce<kNumWarps>(mass, shared.search.scratch, Sum{}));
      if (mass == 0) return;
      const unsigned long long before = few.sum_where(n, [&](unsigned id) { return id < (unsigned)mine.id; });
      if (before <= point && point < before + mass) *token_id = mine.id;
      return;
    }

#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kNumThreads) {
      const Token t = token(i);
      const unsigned long long mass = candidates.kept_mass(t.key);
      if (mass != 0) atomicAdd(&row.parts[t.id / (Slice::kSize * slices_per_part)].sum, mass);
    }
    __syncthreads();

    // The part that holds the draw, then the slice, the thread and the token.
    const int parts_per_thread = ceil_div(num_parts, kNumThreads);
    int p = min((int)threadIdx.x * parts_per_thread, num_parts);
    const int end = min(p + parts_per_thread, num_parts);
    unsigned long long mine = 0, total;
#pragma unroll 1
    for (int i = p; i < end; ++i) mine += row.parts[i].sum;
    unsigned long long before = exclusive_scan<kNumWarps>(mine, shared.search.scratch, total);
    unsigned long long point = __umul64hi(random, total);
    if (before <= point && point < before + mine) {
#pragma unroll 1
      for (; point >= before + row.parts[p].sum; ++p) before += row.parts[p].sum;
      shared.part = p;
      shared.point = point - before;
    }
    __syncthreads();
    point = shared.point;
    for (int slice = shared.part * slices_per_part; slice * Slice::kSize < vocab_size; ++slice) {
      typename Slice::Ids ids = Slice::load_in_order(logits, slice, vocab_size);
      mine = 0;
      ids.each([&](float logit, int, int) { mine += candidates.kept_mass(logit_key(logit)); });
      before = exclusive_scan<kNumWarps>(mine, shared.search.scratch, total);
      if (before <= point && point < before + mine) {
        int drawn = ids.first;
        ids.each([&](float logit, int, int) {
          before += candidates.kept_mass(logit_key(logit));
          drawn += before <= point;
        });
        *token_id = drawn;
      }
      if (point < total) return;
      point -= total;
    }
  }
};

// All three: grid (parts of a row, num_rows), block (kNumThreads).

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
sample_likeliest(int* __restrict__ token_ids,           // [num_rows]
                 const float* __restrict__ logits,      // [num_rows, row_size]
                 const SamplingRow* __restrict__ rows,  // [num_rows]
                 unsigned char* workspace,              // as RowWorkspace has it
                 long long counters_start,              // bytes; arrivals are zeros before and after
                 int row_size, int vocab_size,          // 1 <= vocab_size <= row_size, at most 2^23
                 int slices_per_part) {
  using S = Sampler<kNumThreads>;
  __shared__ typename S::Search::Shared shared;
  const RowPart<kNumThreads> part(vocab_size, slices_per_part);
  const RowWorkspace row = part.in(workspace, counters_start);
  logits += (long long)part.row * row_size;  // 64-bit: rows * vocabulary can pass 2^31

  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const SamplingRow params = rows[part.row];
  if (params.has_top_p_alone(vocab_size))
    for (int i = part.index * kNumThreads + threadIdx.x; i < kNumBins; i += part.num_parts * kNumThreads)
      row.state->histogram[i] = 0;
  const int k = params.has_top_k(vocab_size) ? params.top_k : 0;
  if (!S::Search::find_likeliest(shared, row, part, logits, vocab_size, k)) return;
  if (threadIdx.x != 0) return;
  const unsigned long long best = row.state->best;
  const bool drawable = key_of_rank(best) > kNegInfKey;
  if (!drawable || params.is_greedy()) token_ids[part.row] = drawable ? id_of_rank(best) : -1;
}

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
sample_weighed(int* __restrict__ token_ids,           // [num_rows]
               const float* __restrict__ logits,      // [num_rows, row_size]
               const SamplingRow* __restrict__ rows,  // [num_rows]
               unsigned char* workspace,              // as sample_likeliest has left it
               long long counters_start, int row_size, int vocab_size, int slices_per_part) {
  using S = Sampler<kNumThreads>;
  using Slice = typename S::Slice;
  __shared__ typename S::Shared shared;
  const RowPart<kNumThreads> part(vocab_size, slices_per_part);
  const RowWorkspace row = part.in(workspace, counters_start);
  logits += (long long)part.row * row_size;

  griddepcontrol_launch_dependents();
  const SamplingRow params = rows[part.row];
  typename Slice::Ids ids;
  if (!params.is_greedy()) ids = Slice::load_streams(logits, part.first, vocab_size);
  griddepcontrol_wait();
  if (params.is_greedy()) return;
  const unsigned max_key = key_of_rank(row.state->best);
  if (max_key <= kNegInfKey) return;

  const bool has_top_k = params.has_top_k(vocab_size), has_top_p_alone = params.has_top_p_alone(vocab_size);
  auto& histogram = shared.search.histogram;
  if (has_top_p_alone) {
    histogram.clear(kNumBins);
    __syncthreads();
  }
  const Candidates candidates(params, max_key);
  const unsigned bound = max(row.state->bound, kNegInfKey + 1);
  unsigned long long sum = 0;
  for (int slice = part.first;;) {
    if (has_top_k) {
      unsigned listed = 0;
      ids.each([&](float logit, int, int i) { listed |= (unsigned)(logit_key(logit) >= bound) << i; });
      S::Search::append(row, ids, listed);
    } else if (has_top_p_alone) {
      ids.each([&](float logit, int, int) {
        if (const unsigned long long mass = candidates.mass(logit)) histogram.add(candidates.bin(logit), mass);
      });
    } else {
      ids.each([&](float logit, int, int) { sum += candidates.mass(logit); });
    }
    if (++slice == part.end) break;
    ids = Slice::load_streams(logits, slice, vocab_size);
  }

  PartState& state = row.parts[part.index];
  if (has_top_p_alone) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kNumBins; i += kNumThreads) {
      const unsigned long long mass = histogram[i];
      state.histogram[i] = mass;
      if (mass != 0) atomicAdd(&row.state->histogram[i], mass);
    }
  } else {
    sum = block_reduce<S::kNumWarps>(sum, shared.search.scratch, Sum{});
    if (threadIdx.x == 0) state.sum = sum;
  }
  if (!last_to_arrive(&row.counters->arrivals[1], part.num_parts)) return;
  if (has_top_p_alone)
    S::find_bin(shared, row, params.top_p);
  else
    S::draw(token_ids + part.row, shared, params, candidates, row, part.num_parts, slices_per_part, logits, vocab_size);
}

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
sample_top_p(int* __restrict__ token_ids,           // [num_rows]
             const float* __restrict__ logits,      // [num_rows, row_size]
             const SamplingRow* __restrict__ rows,  // [num_rows]
             unsigned char* workspace,              // as sample_weighed has left it
             long long counters_start, int row_size, int vocab_size, int slices_per_part) {
  using S = Sampler<kNumThreads>;
  using Slice = typename S::Slice;
  __shared__ typename S::Shared shared;
  const RowPart<kNumThreads> part(vocab_size, slices_per_part);
  const RowWorkspace row = part.in(workspace, counters_start);
  logits += (long long)part.row * row_size;

  const SamplingRow params = rows[part.row];
  const bool has_top_p_alone = params.has_top_p_alone(vocab_size);
  typename Slice::Ids ids;
  if (has_top_p_alone) ids = Slice::load_streams(logits, part.first, vocab_size);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (!has_top_p_alone) return;
  const unsigned max_key = key_of_rank(row.state->best);
  if (max_key <= kNegInfKey) return;

  const Candidates candidates(params, max_key);
  const int last_bin = row.state->bin;
  PartState& state = row.parts[part.index];
  unsigned long long sum = 0;
  for (int i = threadIdx.x; i < last_bin; i += kNumThreads) sum += state.histogram[i];
  for (int slice = part.first;;) {
    unsigned listed = 0;
    ids.each([&](float logit, int, int i) { listed |= (unsigned)(candidates.bin(logit) == last_bin) << i; });
    S::Search::append(row, ids, listed);
    if (++slice == part.end) break;
    ids = Slice::load_streams(logits, slice, vocab_size);
  }
  sum = block_reduce<S::kNumWarps>(sum, shared.search.scratch, Sum{});
  if (threadIdx.x == 0) state.sum = sum;
  if (!last_to_arrive(&row.counters->arrivals[2], part.num_parts)) return;
  S::draw(token_ids + part.row, shared, params, candidates, row, part.num_parts, slices_per_part, logits, vocab_size);
}
