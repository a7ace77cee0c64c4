// rope.cuh: one lane's share of a head that is RMS-normed and rotated by its token's position
//
//   (x[i], x[i + r/2]) -> (x[i] * cos - x[i + r/2] * sin,  x[i + r/2] * cos + x[i] * sin)     for i < r/2
//
// with r = rotary_dim and cos, sin = entries i and r/2 + i of row `position` of the table; x[r ...] pass through.
//
// Work:     kLanes lanes a head. Each owns two vectors of 8 elements: those of 8 rotated pairs or, past rotary_dim, two
//           neighbours. With r = 64 in head_dim 96 the vectors 0 .. 11 go to
//               lane 0: 0, 4   lane 1: 1, 5   lane 2: 2, 6   lane 3: 3, 7   lane 4: 8, 9   lane 5: 10, 11
// Numerics: float32. Sums and differences of products are told which product is rounded, so that all kernels have the
//           same bits.
#ifndef CUPAGED_ROPE_CUH
#define CUPAGED_ROPE_CUH

#include "common.cuh"

// Lanes that share a head: a power of two, so that shuffles stay inside the group; for head_dim 80 and 96 some idle.
__host__ __device__ constexpr int lanes_per_head(int head_dim) {
  int lanes = 1;
  while (lanes * 16 < head_dim) lanes *= 2;
  return lanes;
}

template <typename scalar_t,  // storage type of heads and norms' weights, 2 bytes
          int kHeadDim>       // elements of a head, a multiple of 16
struct HeadShare {
  static_assert(kHeadDim % 16 == 0, "a lane owns two vectors of 8 elements");
  static constexpr int kLanes = lanes_per_head(kHeadDim);
  static_assert(kLanes <= kWarpSize, "a head lies in one warp");

  const bool exists;   // other lanes only take part in shuffles
  const bool rotated;  // its elements are pairs
  const int first, second;  // where its vectors begin in the head
  Float8 a = {}, b = {};    // what they hold

  // rotary_dim: a multiple of 16, at most kHeadDim.
  __device__ __forceinline__ explicit HeadShare(int rotary_dim) : HeadShare(threadIdx.x % kLanes, rotary_dim) {}

  // Of the head's rotation; cos_sin: its position's row of the table.
  __device__ __forceinline__ void load_rotation(const float* cos_sin, int rotary_dim) {
    if (!exists || !rotated) return;
    cosine_ = load_float8(cos_sin + first);
    sine_ = load_float8(cos_sin + rotary_dim / 2 + first);
  }

  // Of the head's norm, [kHeadDim].
  __device__ __forceinline__ void load_weight(const scalar_t* weight) {
    if (!exists) return;
    weight_a_ = load_float8(weight + first);
    weight_b_ = load_float8(weight + second);
  }

  __device__ __forceinline__ void load(const scalar_t* head) {
    if (!exists) return;
    a = load_float8(head + first);
    b = load_float8(head + second);
  }

  // head / sqrt(mean(head^2) + eps) * weight. All lanes of the warp call it, with `normed` or without.
  __device__ __forceinline__ void norm(float eps, bool normed) {
    float sum_sq = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum_sq = fmaf(b.data[j], b.data[j], fmaf(a.data[j], a.data[j], sum_sq));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum_sq += __shfl_xor_sync(kFullMask, sum_sq, offset);
    if (!normed) return;
    const float scale = rsqrtf(sum_sq / kHeadDim + eps);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      a.data[j] *= scale * weight_a_.data[j];
      b.data[j] *= scale * weight_b_.data[j];
    }
  }

  __device__ __forceinline__ void rotate() {
    if (!rotated) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float x = a.data[j], y = b.data[j];
      a.data[j] = fmaf(x, cosine_.data[j], -(y * sine_.data[j]));
      b.data[j] = fmaf(y, cosine_.data[j], x * sine_.data[j]);
    }
  }

 private:
  __device__ __forceinline__ HeadShare(int lane, int rotary_dim)
      : exists(lane < kHeadDim / 16),
        rotated(lane < rotary_dim / 16),
        first(rotated ? lane * 8 : lane * 16),
        second(rotated ? first + rotary_dim / 2 : first + 8) {}

  Float8 cosine_ = {}, sine_ = {}, weight_a_ = {}, weight_b_ = {};
};

#endif  // CUPAGED_ROPE_CUH
