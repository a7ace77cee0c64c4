// logprobs.cu: log-softmax of the raw logits, for one given token a row and for the row's k most likely ones
//
// Work:     one thread block a row; thread t has the ids t, t + kNumThreads, ... No sort: each thread knows the most
//           likely of its ids, the thread block picks the best of those, and its owner looks for its next. k is small.
// Numerics: differences to the maximum, exponentials and their sum in float32, thread by thread, then by warp, then over
//           the warps: the same bits in every run.
// Traffic:  bound by reading the row from L2: 2 passes, and one thread's share again for each of the k. Measured: docs/performance.md.
#include "token_order.cuh"

// grid (num_rows), block (kNumThreads)
template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
logprobs(int* __restrict__ top_ids,          // [num_rows, 1 + k] column 0: token_ids; then the most likely, -1 past the end
         float* __restrict__ top_logprobs,   // [num_rows, 1 + k]
         int* __restrict__ ranks,            // [num_rows] of token_ids, from 1
         const float* __restrict__ logits,   // [num_rows, row_size]
         const int* __restrict__ token_ids,  // [num_rows] an id out of range has log probability -inf
         int row_size, int vocab_size, int k) {
  static_assert(kNumThreads % kWarpSize == 0 && kNumThreads <= 1024, "whole warps, one thread block");
  constexpr int kNumWarps = kNumThreads / kWarpSize;
  __shared__ unsigned long long scratch[kNumWarps];
  __shared__ float sum_scratch[kNumWarps];
  logits += (long long)blockIdx.x * row_size;  // 64-bit: rows * vocabulary can pass 2^31
  top_ids += (long long)blockIdx.x * (1 + k);
  top_logprobs += (long long)blockIdx.x * (1 + k);

  // The most likely of this thread's ids that ranks below `limit`; 0 when there is none.
  const auto best_below = [&](unsigned long long limit) {
    unsigned long long best = 0;
#pragma unroll 4
    for (int id = threadIdx.x; id < vocab_size; id += kNumThreads) {
      const unsigned long long rank = token_rank(logits[id], id);
      if (rank < limit) best = Max{}(best, rank);
    }
    return best;
  };
  unsigned long long mine = best_below(~0ull);
  const float max_logit = logit_of_key(key_of_rank(block_reduce<kNumWarps>(mine, scratch, Max{})));
  const auto gap = [&](unsigned key) {  // logit - max_logit; 0 for a tie of infinities
    const float logit = logit_of_key(key);
    return logit == max_logit ? 0.f : logit - max_logit;
  };

  const int token = token_ids[blockIdx.x];
  const unsigned token_key = 0 <= token && token < vocab_size ? logit_key(logits[token]) : kNegInfKey;
  float sum = 0.f;
  unsigned num_above = 0;
#pragma unroll 4
  for (int id = threadIdx.x; id < vocab_size; id += kNumThreads) {
    const unsigned key = logit_key(logits[id]);
    sum += expf(gap(key));
    num_above += key > token_key;
  }
  const float log_sum = logf(block_sum<kNumWarps>(sum, sum_scratch));
  const unsigned rank = 1 + (unsigned)block_reduce<kNumWarps>(num_above, scratch, Sum{});
  const auto write = [&](int column, int id, unsigned key) {
    top_ids[column] = id;
    top_logprobs[column] = key == kNegInfKey ? kNegInf : gap(key) - log_sum;
  };
  if (threadIdx.x == 0) {
    ranks[blockIdx.x] = rank;
    write(0, token, token_key);
  }
  for (int column = 1; column <= k; ++column) {
    const unsigned long long best = block_reduce<kNumWarps>(mine, scratch, Max{});
    if (threadIdx.x == 0) {
      if (best != 0)
        write(column, id_of_rank(best), key_of_rank(best));
      else  // the vocabulary has fewer than k tokens
        write(column, -1, kNegInfKey);
    }
    if (mine == best) mine = best_below(best);  // ranks are distinct: one owner
  }
}
