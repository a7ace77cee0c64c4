// embedding.cu: out[i] = weight[ids[i]] in float32
//
// Work:    one thread block a row, 8 elements a thread and turn.
// Bound:   bytes: each row of out is written once and its source read once. Measured: docs/performance.md.
// Overlap: a step's first kernel but for take_tokens. It lets the next ones begin when all before it has ended, so that
//          what earlier steps have written is there for every kernel of this one, before it has waited for anything.
// An id outside [0, num_rows) gives a row of zeros and reads nothing.
#include "common.cuh"
#include "ptx.cuh"

template <typename scalar_t,  // storage type of weight
          int kNumThreads>    // threads per block
__global__ void __launch_bounds__(kNumThreads)
embedding(float* __restrict__ out,              // [gridDim.x, hidden_size]
          const scalar_t* __restrict__ weight,  // [num_rows, hidden_size]
          const int* __restrict__ ids,          // [gridDim.x]
          int num_rows,
          int hidden_size) {  // a multiple of 8
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int id = ids[blockIdx.x];
  const bool valid = id >= 0 && id < num_rows;
  const scalar_t* src = weight + (long long)(valid ? id : 0) * hidden_size;
  float* dst = out + (long long)blockIdx.x * hidden_size;
  for (int i = threadIdx.x * 8; i < hidden_size; i += kNumThreads * 8)
    store_float8(dst + i, valid ? load_float8(src + i) : Float8{});
}
