// decode_splits.cuh: how the keys of a decoding sequence are split over thread blocks.
#ifndef CUPAGED_DECODE_SPLITS_CUH
#define CUPAGED_DECODE_SPLITS_CUH

#include "common.cuh"

constexpr int kMinSplit = 256;   // keys a split has at least; twin in paged_decode.py. Fewer make merging dear.
constexpr int kSplitAlign = 64;  // splits begin at multiples of it, whatever the head_dim

// The splits of a sequence: a function of its own length, not of the batch. An empty sequence has none.
struct Splits {
  int seq_len, first;  // keys first .. seq_len - 1 are attended to
  int size, count;

  Splits() = default;
  // few: with length, splits grow from kMinSplit to four times as much before there are max_splits of them.
  __device__ __forceinline__ Splits(int seq_len, int window, int max_splits, bool few)
      : seq_len(seq_len), first(max(0, seq_len - window)) {
    const int span = seq_len - start();
    int least = kMinSplit;
    if (few && span > least * max_splits / 4) least = 2 * kMinSplit;
    if (few && span > least * max_splits / 2) least = 4 * kMinSplit;
    size = max(least, ceil_div(ceil_div(span, max_splits), kSplitAlign) * kSplitAlign);
    count = ceil_div(span, size);
  }

  __device__ __forceinline__ int start() const { return first / kSplitAlign * kSplitAlign; }
  // The keys of a split: begin .. end - 1.
  __device__ __forceinline__ int begin(int split) const { return max(first, start() + split * size); }
  __device__ __forceinline__ int end(int split) const { return min(seq_len, start() + (split + 1) * size); }
};

#endif  // CUPAGED_DECODE_SPLITS_CUH
