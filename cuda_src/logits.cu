// logits.cu: change logits before a token is drawn from them: penalties and biases of single tokens, and a set of
// tokens that alone may be drawn
#include "common.cuh"

// One logit and what becomes of it. cupaged/backends/base.py has the same 20 bytes (LOGIT_EDIT).
struct LogitEdit {
  int row;
  int token;
  float bias;
  float repetition_penalty;
  float penalty;
};

// edit_logits:  l += bias;  l = l > 0 ? l / repetition_penalty : l * repetition_penalty;  l -= penalty
// A bias of -inf gives -inf whatever l was, infinity and NaN included.
//
// Work:     one thread an edit; each (row, token) occurs once, so no two threads meet.
// Numerics: float32, a rounding each step, or one fewer where the compiler fuses the last two.
// Bound:    latency: 20 bytes an edit in a row, a logit's read and write wherever it lies. Measured: docs/performance.md.
// grid (ceil(num_edits / kNumThreads)), block (kNumThreads)
template <int kNumThreads>  // threads per block
__global__ void __launch_bounds__(kNumThreads)
edit_logits(float* __restrict__ logits,           // [num_rows, row_size]
            const LogitEdit* __restrict__ edits,  // [num_edits]
            int num_edits, int row_size) {
  const long long i = (long long)blockIdx.x * kNumThreads + threadIdx.x;
  if (i >= num_edits) return;
  const LogitEdit edit = edits[i];
  float* logit = logits + (long long)edit.row * row_size + edit.token;
  if (edit.bias == kNegInf) {
    *logit = kNegInf;
    return;
  }
  const float x = *logit + edit.bias;
  *logit = (x > 0.f ? x / edit.repetition_penalty : x * edit.repetition_penalty) - edit.penalty;
}

// keep_allowed:  l = -inf for each id whose bit in the row's mask is 0; id i has bit i % 32 of word i / 32
//
// Work:  kNumThreads * kIdsPerThread ids of a row a thread block; neighbouring threads have neighbouring ids.
// Bound: bytes: every logit that is not allowed is written, none is read. Measured: docs/performance.md.
// grid (num_masks, ceil(vocab_size / (kNumThreads * kIdsPerThread))), block (kNumThreads)
template <int kNumThreads,    // threads per block
          int kIdsPerThread>  // ids of a thread
__global__ void __launch_bounds__(kNumThreads)
keep_allowed(float* __restrict__ logits,           // [num_rows, row_size]
             const int* __restrict__ rows,         // [num_masks] which row of logits each mask is for
             const unsigned* __restrict__ masks,   // [num_masks, ceil(vocab_size / 32)]
             int row_size, int vocab_size) {
  const unsigned* mask = masks + (long long)blockIdx.x * ceil_div(vocab_size, 32);
  float* row = logits + (long long)rows[blockIdx.x] * row_size;
  const int first = blockIdx.y * (kNumThreads * kIdsPerThread) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kIdsPerThread; ++j) {
    const int id = first + j * kNumThreads;
    if (id < vocab_size && !(mask[id / 32] >> (id % 32) & 1u)) row[id] = kNegInf;
  }
}
