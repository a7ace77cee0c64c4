// logprobs.cu: log-softmax of the raw logits, for one given token a row and for the row's k most likely ones
//
// Work:     two kernels over the parts of rows (row_slices.cuh): the largest logit and a bound for the k likeliest;
//           then sums, and the tokens at or above the bound listed, as a rule few more than k. The last thread block of
//           a row picks from the list, k times the best that is left; should ties make it too long, from the whole row.
// Numerics: differences to the maximum, exponentials and their sum in float32: a thread's 16 of a slice, by warp, over
//           the warps, then the slices in the same way: the same bits in every run, and in every batch.
// Overlap:  the second kernel reads its slices before it waits: it begins when the first has waited itself, so that the
//           logits, which are older than that, are complete.
// Traffic:  bound by reading the row twice, from L2 if it fits there. Few rows: latency of the launches. Measured:
//           docs/performance.md.
#include "ptx.cuh"
#include "row_slices.cuh"

// Both: grid (parts of a row, num_rows), block (kNumThreads).

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
logprobs_likeliest(const float* __restrict__ logits,  // [num_rows, row_size]
                   unsigned char* workspace,          // as RowWorkspace has it
                   long long counters_start,          // bytes; arrivals are zeros before and after
                   int row_size, int vocab_size, int k, int slices_per_part) {
  using Search = RowSearch<kNumThreads>;
  __shared__ typename Search::Shared shared;
  const RowPart<kNumThreads> part(vocab_size, slices_per_part);
  const RowWorkspace row = part.in(workspace, counters_start);
  logits += (long long)part.row * row_size;  // 64-bit: rows * vocabulary can pass 2^31

  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  Search::find_likeliest(shared, row, part, logits, vocab_size, k);
}

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
logprobs(int* __restrict__ top_ids,          // [num_rows, 1 + k] column 0: token_ids; then the most likely, or -1
         float* __restrict__ top_logprobs,   // [num_rows, 1 + k]
         int* __restrict__ ranks,            // [num_rows] of token_ids, from 1
         const float* __restrict__ logits,   // [num_rows, row_size]
         const int* __restrict__ token_ids,  // [num_rows] an id out of range has log probability -inf
         unsigned char* workspace,           // as logprobs_likeliest has left it
         long long counters_start, int row_size, int vocab_size, int k, int slices_per_part) {
  using Search = RowSearch<kNumThreads>;
  using Slice = typename Search::Slice;
  constexpr int kNumWarps = Search::kNumWarps;
  __shared__ unsigned long long scratch[kNumWarps];
  __shared__ float sum_scratch[kNumWarps];
  const RowPart<kNumThreads> part(vocab_size, slices_per_part);
  const RowWorkspace row = part.in(workspace, counters_start);
  logits += (long long)part.row * row_size;
  top_ids += (long long)part.row * (1 + k);
  top_logprobs += (long long)part.row * (1 + k);

  typename Slice::Ids ids = Slice::load_streams(logits, part.first, vocab_size);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const float max_logit = logit_of_key(key_of_rank(row.state->best));
  const auto gap = [&](unsigned key) {  // logit - max_logit; 0 for a tie of infinities
    const float logit = logit_of_key(key);
    return logit == max_logit ? 0.f : logit - max_logit;
  };
  const int token = token_ids[part.row];
  const unsigned token_key = 0 <= token && token < vocab_size ? logit_key(logits[token]) : kNegInfKey;
  const unsigned bound = row.state->bound;
  unsigned num_above = 0;
  for (int slice = part.first;;) {
    float sum = 0.f;
    unsigned listed = 0;
    ids.each([&](float logit, int id, int i) {
      if (id >= vocab_size) return;
      const unsigned key = logit_key(logit);
      sum += expf(gap(key));
      num_above += key > token_key;
      listed |= (unsigned)(key >= bound) << i;
    });
    if (k > 0) Search::append(row, ids, listed);
    sum = block_sum<kNumWarps>(sum, sum_scratch);
    if (threadIdx.x == 0) row.slice_sums[slice] = sum;
    __syncthreads();  // before the scratch serves again
    if (++slice == part.end) break;
    ids = Slice::load_streams(logits, slice, vocab_size);
  }
  const unsigned long long block_above = block_reduce<kNumWarps>(num_above, scratch, Sum{});
  if (threadIdx.x == 0) row.parts[part.index].sum = block_above;
  if (!last_to_arrive(&row.counters->arrivals[1], part.num_parts)) return;

  float sum = 0.f;
  for (int i = threadIdx.x; i < part.num_slices; i += kNumThreads) sum += row.slice_sums[i];
  const float log_sum = logf(block_sum<kNumWarps>(sum, sum_scratch));
  unsigned long long rank = 0;
  for (int i = threadIdx.x; i < part.num_parts; i += kNumThreads) rank += row.parts[i].sum;
  rank = 1 + block_reduce<kNumWarps>(rank, scratch, Sum{});
  const auto write = [&](int column, int id, unsigned key) {
    top_ids[column] = id;
    top_logprobs[column] = key == kNegInfKey ? kNegInf : gap(key) - log_sum;
  };
  if (threadIdx.x == 0) {
    ranks[part.row] = (int)rank;
    write(0, token, token_key);
  }

  const unsigned num_listed = row.counters->num_listed;
  const bool overflow = num_listed > kListSize;
  // The most likely of this thread's tokens that ranks below `limit`; 0 when there is none.
  const auto best_below = [&](unsigned long long limit) {
    unsigned long long best = 0;
    for (int i = threadIdx.x; i < (overflow ? vocab_size : num_listed); i += kNumThreads) {
      const Token t = overflow ? Token{logit_key(logits[i]), i} : row.list[i];
      const unsigned long long rank = token_rank(logit_of_key(t.key), t.id);
      if (rank < limit) best = Max{}(best, rank);
    }
    return best;
  };
  unsigned long long mine = best_below(~0ull);
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
