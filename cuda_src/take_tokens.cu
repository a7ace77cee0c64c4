// take_tokens.cu: token_ids[i] = drawn[~token_ids[i]] where token_ids[i] < 0
//
// A batch that was put together before its tokens were known names them by the rows that draw them.
//
// Work:    one thread a token.
// Bound:   latency: 4 bytes a token, and 4 more from wherever its row lies. Measured: docs/performance.md.
// A row outside [0, num_drawn) is left as it stands.
// grid (ceil(num_tokens / kNumThreads)), block (kNumThreads)
#include "common.cuh"
#include "ptx.cuh"

template <int kNumThreads>  // threads per block
__global__ void __launch_bounds__(kNumThreads)
take_tokens(int* __restrict__ token_ids,    // [num_tokens], apart from drawn
            const int* __restrict__ drawn,  // [num_drawn]
            int num_tokens, int num_drawn) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int i = blockIdx.x * kNumThreads + threadIdx.x;
  if (i >= num_tokens) return;
  const int row = ~token_ids[i];
  if (row >= 0 && row < num_drawn) token_ids[i] = drawn[row];
}
