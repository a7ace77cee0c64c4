// row_slices.cuh: rows of logits, each shared out among several thread blocks, so that one row keeps many
// multiprocessors busy. What they find goes through a workspace; the last thread block of a row to arrive goes on.
//
// Work:     rows are cut into slices of 16 ids a thread, a function of the vocabulary alone. A thread block has one
//           part of a row: some slices in a run, one where there are few rows.
// Bound for the k likeliest: a row is also cut into groups of 16 ids to 512, at least 2 * k if there are as many. The
//           k-th largest of the groups' maxima has at least k tokens at or above it, and as a rule few more: the rest
//           of the row needs no second look.
#ifndef CUPAGED_ROW_SLICES_CUH
#define CUPAGED_ROW_SLICES_CUH

#include "token_order.cuh"

constexpr int kIdsPerThread = 16;
constexpr int kVectorsPerThread = kIdsPerThread / 4;
constexpr int kListSize = 4096;  // tokens that a row can list; twin in row_slices.py
constexpr int kNumBins = 832;    // of a histogram; twin in row_slices.py

struct Token {
  unsigned key;  // of its logit
  int id;
};

// What a workspace has for each thread block of a launch, and for each row. row_slices.py has the same sizes.
struct PartState {
  unsigned long long best;  // rank of its likeliest token
  unsigned long long sum;
  unsigned long long histogram[kNumBins];
};

struct RowState {
  unsigned long long best;    // rank of the likeliest token
  unsigned long long target;  // mass that top_p wants
  unsigned long long above;   // mass in the bins of likelier tokens than those of `bin`
  unsigned bound;             // at least k tokens have this key or a larger one
  int bin;                    // where the least likely token lies that top_p keeps
  unsigned long long histogram[kNumBins];
};

struct RowCounters {  // arrivals: zeros before and after a launch
  unsigned arrivals[3];
  unsigned num_listed;  // tokens that wanted to be in the list; from the first kernel on
};

// One row's part of the workspace, whose last bytes are the rows' counters.
struct RowWorkspace {
  PartState* parts;   // [num_parts]
  RowState* state;
  float* slice_sums;  // [num_slices]
  union {
    unsigned* groups;  // [num_slices, groups of a slice] largest keys, until the bound is found
    Token* list;       // [kListSize] in any order
  };
  RowCounters* counters;

  __device__ __forceinline__ RowWorkspace(unsigned char* workspace, long long counters_start, int num_rows,
                                          int num_parts, int num_slices, int row) {
    const int sums_bytes = ceil_div(num_slices, 4) * 16;
    const int groups_bytes = max((int)sizeof(Token) * kListSize, num_slices * (int)blockDim.x * 4);
    counters = reinterpret_cast<RowCounters*>(workspace + counters_start) + row;
    parts = reinterpret_cast<PartState*>(workspace) + (long long)row * num_parts;
    workspace += (long long)num_rows * num_parts * sizeof(PartState);
    workspace += (long long)row * (sizeof(RowState) + sums_bytes + groups_bytes);
    state = reinterpret_cast<RowState*>(workspace);
    slice_sums = reinterpret_cast<float*>(state + 1);
    list = reinterpret_cast<Token*>(workspace + sizeof(RowState) + sums_bytes);
  }
};

// Whether this is the last of `count` thread blocks to arrive; what the others wrote before is visible then. All
// threads call it.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, int count) {
  __threadfence();  // this thread's results before its arrival
  __syncthreads();
  const bool last = threadIdx.x == 0 && atomicInc(counter, count - 1) == count - 1u;  // the last one leaves 0
  if (!__syncthreads_or(last)) return false;
  __threadfence();  // the others' results after their arrivals
  return true;
}

template <typename T>
__device__ __forceinline__ T inclusive_scan(T x) {  // over the warp's lanes
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T below = __shfl_up_sync(kFullMask, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

// Sum over the threads before this one; total gets that over the thread block. scratch [kNumWarps] of shared memory,
// free for reuse on return. PRECOND: blockDim.x == kNumWarps * 32, and all threads call it.
template <int kNumWarps>
__device__ __forceinline__ unsigned long long exclusive_scan(unsigned long long x, unsigned long long* scratch,
                                                             unsigned long long& total) {
  const int warp = threadIdx.x / kWarpSize;
  const unsigned long long inclusive = inclusive_scan(x);
  if (threadIdx.x % kWarpSize == kWarpSize - 1) scratch[warp] = inclusive;
  __syncthreads();
  unsigned long long before = inclusive - x;
  total = 0;
#pragma unroll
  for (int w = 0; w < kNumWarps; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  __syncthreads();
  return before;
}

template <int kNumThreads>
struct RowSlice {
  static_assert(kNumThreads % kWarpSize == 0 && kNumThreads <= 1024, "whole warps, one thread block");
  static constexpr int kSize = kNumThreads * kIdsPerThread;

  // Thread t's ids of a slice come as 4 vectors: in streams, vectors t, t + kNumThreads, ... of the slice; in order,
  // the vectors 4 * t and on. Ids past the vocabulary have logits of -inf.
  struct Ids {
    Vec<float> vectors[kVectorsPerThread];
    int first, stride;

    // Calls f(logit, id, i) for each, i being 0 .. 15. The code is there for one vector only, since for few rows
    // fetching it would take longer than running it; the vectors move on by one, and end up where they were.
    template <typename F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll 1
      for (int v = 0; v < kVectorsPerThread; ++v) {
        const Vec<float> vector = vectors[0];
#pragma unroll
        for (int i = 0; i < 4; ++i) f(vector.data[i], first + v * stride + i, 4 * v + i);
#pragma unroll
        for (int w = 1; w < kVectorsPerThread; ++w) vectors[w - 1] = vectors[w];
        vectors[kVectorsPerThread - 1] = vector;
      }
    }
  };

  static __device__ __forceinline__ Ids load_streams(const float* logits, int slice, int vocab_size) {
    return load(logits, slice * kSize + 4 * threadIdx.x, 4 * kNumThreads, vocab_size);
  }
  static __device__ __forceinline__ Ids load_in_order(const float* logits, int slice, int vocab_size) {
    return load(logits, slice * kSize + kIdsPerThread * threadIdx.x, 4, vocab_size);
  }

  static __device__ __forceinline__ Ids load(const float* logits, int first, int stride, int vocab_size) {
    Ids ids;
    ids.first = first;
    ids.stride = stride;
    const bool aligned = reinterpret_cast<unsigned long long>(logits) % 16 == 0;  // of odd row sizes some aren't
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int id = first + v * stride;
      if (aligned && id + 4 <= vocab_size) {
        ids.vectors[v] = load_vec(logits + id);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) ids.vectors[v].data[i] = id + i < vocab_size ? logits[id + i] : kNegInf;
      }
    }
    return ids;
  }
};

// This thread block's part of a launch over grid (parts of a row, num_rows).
template <int kNumThreads>
struct RowPart {
  int row, index, num_parts;
  int num_slices;  // of the row
  int first, end;  // slices of this part

  __device__ __forceinline__ RowPart(int vocab_size, int slices_per_part)
      : row(blockIdx.y),
        index(blockIdx.x),
        num_parts(gridDim.x),
        num_slices(ceil_div(vocab_size, RowSlice<kNumThreads>::kSize)),
        first(index * slices_per_part),
        end(min(first + slices_per_part, num_slices)) {}

  __device__ __forceinline__ RowWorkspace in(unsigned char* workspace, long long counters_start) const {
    return RowWorkspace(workspace, counters_start, gridDim.y, num_parts, num_slices, row);
  }
};

template <int kNumThreads>
struct RowSearch {
  using Slice = RowSlice<kNumThreads>;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kDigitBits = 8;
  static constexpr int kNumDigits = 1 << kDigitBits;
  static_assert(kNumThreads == kNumDigits, "one thread a digit");

  struct Histogram {  // of 64-bit weights, in two halves: 64-bit shared atomics are loops
    unsigned low[kNumBins], high[kNumBins];

    __device__ __forceinline__ void clear(int size) {
#pragma unroll 1
      for (int i = threadIdx.x; i < size; i += kNumThreads) low[i] = high[i] = 0;
    }
    __device__ __forceinline__ void add(int i, unsigned long long weight) {
      const unsigned low_half = (unsigned)weight;
      const unsigned carry = atomicAdd(&low[i], low_half) > ~low_half;  // the adder that overflows carries
      const unsigned high_half = (unsigned)(weight >> 32) + carry;
      if (high_half) atomicAdd(&high[i], high_half);
    }
    __device__ __forceinline__ unsigned long long operator[](int i) const {
      return (unsigned long long)high[i] << 32 | low[i];
    }
  };

  struct Few {  // items, one a thread
    alignas(16) unsigned keys[kNumThreads];
    alignas(16) unsigned long long weights[kNumThreads];  // 0 from the n-th on

    // The weight of those of the first n whose key passes.
    template <typename Passes>
    __device__ __forceinline__ unsigned long long sum_where(int n, Passes passes) const {
      constexpr int kTurn = 8;
      unsigned long long sum = 0;
      for (int first = 0; first < n; first += kTurn)
#pragma unroll
        for (int i = first; i < first + kTurn; ++i) sum += passes(keys[i]) ? weights[i] : 0;
      return sum;
    }
  };

  struct Shared {
    unsigned long long scratch[kNumWarps];
    union {
      Histogram histogram;
      Few few;
    };
    unsigned digit;
    unsigned long long remaining;
  };

  // Find the row's likeliest token and, if k > 0, a bound for its k likeliest; true in the thread block that found
  // them, with the workspace's state filled in. All threads call it.
  static __device__ __forceinline__ bool find_likeliest(Shared& shared, const RowWorkspace& row,
                                                        const RowPart<kNumThreads>& part, const float* logits,
                                                        int vocab_size, int k) {
    int lanes = kWarpSize;  // whose ids of a slice are a group
    while (lanes > 1 && part.num_slices * (kNumThreads / lanes) < 2 * k) lanes /= 2;
    const int groups_per_slice = kNumThreads / lanes;
    unsigned long long best = 0;
    for (int slice = part.first; slice < part.end; ++slice) {
      typename Slice::Ids ids = Slice::load_streams(logits, slice, vocab_size);
      unsigned long long group = 0;
      ids.each([&](float logit, int id, int) { group = Max{}(group, token_rank(logit, id)); });
      best = Max{}(best, group);
      if (k == 0) continue;
#pragma unroll 1
      for (int offset = 1; offset < lanes; offset *= 2)
        group = Max{}(group, __shfl_xor_sync(kFullMask, group, offset));
      if (threadIdx.x % lanes == 0) row.groups[slice * groups_per_slice + threadIdx.x / lanes] = key_of_rank(group);
    }
    best = block_reduce<kNumWarps>(best, shared.scratch, Max{});
    if (threadIdx.x == 0) row.parts[part.index].best = best;
    if (!last_to_arrive(&row.counters->arrivals[0], part.num_parts)) return false;

    best = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < part.num_parts; i += kNumThreads) best = Max{}(best, row.parts[i].best);
    best = block_reduce<kNumWarps>(best, shared.scratch, Max{});
    unsigned bound = kNegInfKey;
    const int num_groups = part.num_slices * groups_per_slice;
    if (0 < k && k <= num_groups) {
      const auto group = [&](int i, unsigned& key) { key = row.groups[i]; return 1ull; };
      bound = threshold_key(shared, num_groups, group, k);
    }
    if (threadIdx.x == 0) {
      row.state->best = best;
      row.state->bound = bound;
      row.counters->num_listed = 0;
    }
    return true;
  }

  // Append those of this thread's tokens that `listed` has a bit for to the row's list.
  static __device__ __forceinline__ void append(const RowWorkspace& row, typename Slice::Ids& ids, unsigned listed) {
    if (!__any_sync(kFullMask, listed)) return;
    const int count = __popc(listed), lane = threadIdx.x % kWarpSize;
    const int inclusive = inclusive_scan(count);
    const int total = __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
    unsigned next = lane == 0 ? atomicAdd(&row.counters->num_listed, (unsigned)total) : 0;
    next = __shfl_sync(kFullMask, next, 0) + inclusive - count;
    ids.each([&](float logit, int id, int i) {
      if (!(listed >> i & 1)) return;
      if (next < kListSize) row.list[next] = {logit_key(logit), id};
      ++next;
    });
  }

  // The largest key such that the items 0 .. n - 1 at or above it weigh at least `target` (> 0) together; if they weigh
  // less, a key that none is below. weight(i, key) gives an item's weight and key; those without weight don't count.
  // All threads call it.
  //
  // No sort: each of few items is compared with all; else a radix descent over what the keys differ by, 8 bits a pass
  // from the top.
  template <typename Weight>
  static __device__ unsigned threshold_key(Shared& shared, int n, Weight weight, unsigned long long target) {
    if (n <= kNumThreads) {
      unsigned key = 0;
      const unsigned long long mine = threadIdx.x < n ? weight(threadIdx.x, key) : 0;
      shared.few.keys[threadIdx.x] = key;
      shared.few.weights[threadIdx.x] = mine;
      __syncthreads();
      const bool reached =
          mine != 0 && shared.few.sum_where(n, [&](unsigned other) { return other >= key; }) >= target;
      return (unsigned)block_reduce<kNumWarps>(reached ? key : 0, shared.scratch, Max{});
    }

    unsigned smallest = ~0u, largest = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kNumThreads) {
      unsigned key;
      if (weight(i, key) == 0) continue;
      smallest = min(smallest, key);
      largest = max(largest, key);
    }
    smallest = ~(unsigned)block_reduce<kNumWarps>(~smallest, shared.scratch, Max{});
    largest = (unsigned)block_reduce<kNumWarps>(largest, shared.scratch, Max{});
    if (largest <= smallest) return largest;  // of all that has weight, or nothing has

    unsigned offset = 0, known = 0;  // the upper digits of the key less the smallest, and a mask of those
    for (int shift = max(0, 32 - __clz(largest - smallest) - kDigitBits);; shift = max(0, shift - kDigitBits)) {
      shared.histogram.clear(kNumDigits);
      __syncthreads();
#pragma unroll 4
      for (int i = threadIdx.x; i < n; i += kNumThreads) {
        unsigned key;
        const unsigned long long w = weight(i, key);
        key -= smallest;
        if (w != 0 && (key & known) == offset) shared.histogram.add(key >> shift & (kNumDigits - 1), w);
      }
      __syncthreads();
      // The largest digit at which the histogram, summed from the top, reaches the target; 0 if it is never reached.
      const unsigned digit = kNumDigits - 1 - threadIdx.x;
      const unsigned long long here = shared.histogram[digit];
      unsigned long long total;
      const unsigned long long above = exclusive_scan<kNumWarps>(here, shared.scratch, total);
      if (above < target && (above + here >= target || digit == 0)) {
        shared.digit = digit;
        shared.remaining = target - above;
      }
      __syncthreads();
      offset |= shared.digit << shift;  // the last digit's upper bits may be known already
      target = shared.remaining;
      if (shift == 0) return smallest + offset;
      known = ~0u << shift;
    }
  }
};

#endif  // CUPAGED_ROW_SLICES_CUH
