// softmax_state.cuh: a softmax taken piece by piece: the state between the pieces, and how states merge.
//
// A state goes with a weighted sum `out` that its owner keeps: over the keys seen so far,
//   max = the largest score, sum = sum of 2^(score - max), out = sum of 2^(score - max) * value,
// and out / sum is the softmax-weighted mean. Scores are in base 2: whoever computes them folds log2(e) into their
// scale. Scores of -inf weigh nothing; where all are -inf the state is as good as empty, and nothing here makes NaN
// of it. NaN scores stay NaN.
#ifndef CUPAGED_SOFTMAX_STATE_CUH
#define CUPAGED_SOFTMAX_STATE_CUH

#include "common.cuh"

struct alignas(8) SoftmaxState {
  float max = kNegInf;
  float sum = 0.f;

  // What to take off a score before 2^x; 0 while nothing has been seen, so that -inf - -inf never arises.
  __device__ __forceinline__ float base() const { return max == kNegInf ? 0.f : max; }

  // Make room for scores up to score_max. Returns the factor that moves `out` to the new base; sum has moved already.
  __device__ __forceinline__ float raise_max(float score_max) {
    const float before = max;
    max = fmaxf(max, score_max);
    const float factor = exp2f(before - base());
    sum *= factor;
    return factor;
  }

  // The same with room for scores that exceed max by kSlack: max stays until there are greater ones, so that `out` seldom
  // has to move. A sum of weights up to 2^kSlack is as exact.
  static constexpr float kSlack = 8.f;
  __device__ __forceinline__ float raise_max_if_exceeded(float score_max) {
    return raise_max(score_max > max + kSlack ? score_max : max);
  }

  struct Factors {
    float mine, other;
  };

  // Take in a state over other keys; the merged out is mine * out + other * its out.
  __device__ __forceinline__ Factors merge(const SoftmaxState& state) {
    const float mine = raise_max(state.max);
    const float other = exp2f(state.max - base());
    sum += other * state.sum;
    return {mine, other};
  }

  // The last factor on out. Without keys it is 0: attention to nothing gives zeros.
  __device__ __forceinline__ float inverse_sum() const { return sum == 0.f ? 0.f : 1.f / sum; }
};

// Four columns of one row, merged over num_parts partial results in their order: part p has the state
// states[p * state_stride] and the columns outs[p * out_stride ..+3] (16-byte aligned).
__device__ __forceinline__ SoftmaxState merge_parts(float (&out)[4], const SoftmaxState* states, int state_stride,
                                                    const float* outs, int out_stride, int num_parts) {
  SoftmaxState merged;
  out[0] = out[1] = out[2] = out[3] = 0.f;
  for (int p = 0; p < num_parts; ++p) {
    const SoftmaxState::Factors factors = merged.merge(states[(long long)p * state_stride]);
    const Vec<float> part = load_vec(outs + (long long)p * out_stride);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = factors.mine * out[i] + factors.other * part.data[i];
  }
  return merged;
}

// The same of a whole row by a warp, for at most 32 parts: lane l gets columns kColumns * l ..+kColumns-1 (at multiples of
// their size). Sums go in the order of a warp's reduction and of the parts.
template <int kBatch,  // parts that are loaded together
          int kColumns>
__device__ __forceinline__ SoftmaxState merge_row(float (&out)[kColumns], const SoftmaxState* states,
                                                  const float* outs, int out_stride, int num_parts) {
  struct alignas(4 * kColumns) Columns {
    float data[kColumns];
  };
  const int lane = threadIdx.x % kWarpSize;
  const SoftmaxState mine = lane < num_parts ? states[lane] : SoftmaxState{};
  SoftmaxState merged;
  float my_factor = 0.f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) out[i] = 0.f;
#pragma unroll 1
  for (int first = 0; first < num_parts; first += kBatch) {
    Columns parts[kBatch];
#pragma unroll
    for (int p = 0; p < kBatch; ++p)
      if (first + p < num_parts)
        parts[p] = *reinterpret_cast<const Columns*>(outs + (long long)(first + p) * out_stride + lane * kColumns);
    if (first == 0) {  // after the first loads have been started
      merged.max = warp_max(mine.max);
      my_factor = exp2f(mine.max - merged.base());
      merged.sum = warp_sum(my_factor * mine.sum);
    }
#pragma unroll
    for (int p = 0; p < kBatch; ++p) {
      if (first + p >= num_parts) break;
      const float factor = __shfl_sync(kFullMask, my_factor, first + p);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) out[i] += factor * parts[p].data[i];
    }
  }
  return merged;
}

// Whether this thread block is the last of `count` to call this with `counter`, which is 0 before and after; then it sees
// what the others have written before their calls. For all threads of the block, after which shared memory is free.
__device__ __forceinline__ bool is_last_to_arrive(int* counter, int count) {
  __threadfence();  // this thread's results before its arrival
  __syncthreads();
  const bool last = threadIdx.x == 0 && atomicAdd(counter, 1) == count - 1;
  if (!__syncthreads_or(last)) return false;
  __threadfence();  // the others' results after their arrivals
  if (threadIdx.x == 0) *counter = 0;  // for the next launch
  return true;
}

#endif  // CUPAGED_SOFTMAX_STATE_CUH
