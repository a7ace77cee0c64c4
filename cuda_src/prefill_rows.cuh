// prefill_rows.cuh: the query rows that the paged_prefill kernels take of one sequence and one kv head.
#ifndef CUPAGED_PREFILL_ROWS_CUH
#define CUPAGED_PREFILL_ROWS_CUH

#include "common.cuh"
#include "divisor.cuh"
#include "ptx.cuh"

// A row is a (token, query head of the kv head's group), token by token: rows of a tile share its keys and values, and
// short chunks still fill a tile.
struct PrefillRows {
  int first_token;  // of the sequence in the step
  int num_rows;
  int context_len;  // tokens of the sequence before that one
  int kv_head, num_kv_heads;
  Divisor group;  // query heads a kv head

  __device__ __forceinline__ PrefillRows(const int* query_start_loc,  // [num_seqs + 1]
                                         const int* seq_lens,         // [num_seqs]
                                         int seq, int kv_head, int num_kv_heads, const Divisor& group)
      : first_token(query_start_loc[seq]), kv_head(kv_head), num_kv_heads(num_kv_heads), group(group) {
    const int query_len = query_start_loc[seq + 1] - first_token;
    num_rows = query_len * group.value;
    context_len = seq_lens[seq] - query_len;
  }

  // The row attends to keys below its end, its token's position + 1. Rows past the last one are taken for it.
  __device__ __forceinline__ int end_of(int row) const { return context_len + min(row, num_rows - 1) / group + 1; }

  // Start copying rows first .. first + kRows - 1 of q to a tile, which has them where Layout says, by thread `thread`
  // of kNumThreads. Rows past the last one become zeros.
  template <typename Layout, int kRows, int kNumThreads, typename scalar_t>
  __device__ __forceinline__ void copy(scalar_t* tile, const scalar_t* qkv, int first, int thread) const {
    for (int i = thread; i < kRows * Layout::kChunks; i += kNumThreads) {
      const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
      const int source = min(first + row, num_rows - 1);
      const scalar_t* src = qkv + head(source, (group.value + 2) * num_kv_heads) * (Layout::kChunks * 8) + chunk * 8;
      cp_async_16(tile + Layout::offset(row, chunk), src, source == first + row);
    }
  }

  // Store rows first .. first + kRows - 1 of a tile, those of them that there are, by the lanes of a warp. The tile has
  // Layout::kChunks * 8 of out's kHeadDim columns; out points at the first of these.
  template <typename Layout, int kRows, int kHeadDim, typename scalar_t>
  __device__ __forceinline__ void store(scalar_t* out, const scalar_t* tile, int first) const {
    for (int i = threadIdx.x % kWarpSize; i < kRows * Layout::kChunks; i += kWarpSize) {
      const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
      if (first + row < num_rows)
        store_vec(out + head(first + row, group.value * num_kv_heads) * kHeadDim + chunk * 8,
                  load_vec(tile + Layout::offset(row, chunk)));
    }
  }

 private:
  // The row's place among the heads of all tokens, each of which has heads_a_token.
  __device__ __forceinline__ long long head(int row, int heads_a_token) const {
    return (long long)(first_token + row / group) * heads_a_token + kv_head * group.value + row % group;
  }
};

#endif  // CUPAGED_PREFILL_ROWS_CUH
