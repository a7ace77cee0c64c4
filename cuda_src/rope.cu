// rope.cu: rotate the query and key heads of a step by their positions; keys and values go to their slots of the cache
//
//   (x[i], x[i + r/2]) -> (x[i] * cos - x[i + r/2] * sin,  x[i + r/2] * cos + x[i] * sin)     for i < r/2
//
// with r = rotary_dim and cos, sin = entries i and r/2 + i of row `position` of the table; x[r ...] pass through. With
// kNorm, each query and key head is RMS-normed before.
//
// Work:     kLanes lanes a head, as many heads a warp as fit. Each lane owns two vectors of 8 elements: those of 8
//           rotated pairs or, past rotary_dim, two neighbours. With r = 64 in head_dim 96 the vectors 0 .. 11 go to
//               lane 0: 0, 4   lane 1: 1, 5   lane 2: 2, 6   lane 3: 3, 7   lane 4: 8, 9   lane 5: 10, 11
// Numerics: float32, one rounding, at the store.
// Overlap:  all that is read but qkv, and the place in the cache, is asked for before the wait for the kernel before.
// Bound:    bytes: qkv read once; the queries, keys and values written once. Measured: docs/performance.md.
#include "common.cuh"
#include "paged_kv.cuh"
#include "ptx.cuh"

// Lanes that share a head: a power of two, so that shuffles stay inside the group; for head_dim 80 and 96 some idle.
__host__ __device__ constexpr int lanes_per_head(int head_dim) {
  int lanes = 1;
  while (lanes * 16 < head_dim) lanes *= 2;
  return lanes;
}

template <typename scalar_t,  // storage type of qkv, the norms' weights and the cache, 2 bytes
          int kHeadDim,       // elements of a head, a multiple of 16
          int kBlockSize,     // tokens of a block of the cache
          bool kNorm,         // RMS-norm the query and key heads first
          int kNumThreads>    // threads per block
__global__ void __launch_bounds__(kNumThreads)
rope_and_store_kv(scalar_t* __restrict__ qkv,               // [gridDim.x, num_heads + 2 * num_kv_heads, kHeadDim]
                  const int* __restrict__ positions,        // [gridDim.x] rows of cos_sin
                  const int* __restrict__ slot_mapping,     // [gridDim.x] slots of the cache; -1 writes nothing
                  const float* __restrict__ cos_sin,        // [.., rotary_dim]: cosines, then sines
                  const scalar_t* __restrict__ q_norm,      // [kHeadDim], read if kNorm
                  const scalar_t* __restrict__ k_norm,      // [kHeadDim], read if kNorm
                  PagedKV kv, int num_heads,
                  int rotary_dim,  // a multiple of 16, at most kHeadDim
                  float eps) {
  static_assert(kHeadDim % 16 == 0, "a lane owns two vectors of 8 elements");
  constexpr int kLanes = lanes_per_head(kHeadDim);
  static_assert(kLanes <= kWarpSize && kNumThreads % kWarpSize == 0, "a head lies in one warp");
  const int token = blockIdx.x;
  const int total_heads = num_heads + 2 * kv.num_kv_heads;
  const int head = (blockIdx.y * kNumThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool active = head < total_heads && lane < kHeadDim / 16;  // the others only take part in shuffles
  const bool is_query = head < num_heads;
  const bool is_value = head >= num_heads + kv.num_kv_heads;

  const bool rotated = lane < rotary_dim / 16;
  const int i = rotated ? lane * 8 : lane * 16;  // of the head's elements, this lane owns i .. i+7 and k .. k+7
  const int k = rotated ? i + rotary_dim / 2 : i + 8;

  griddepcontrol_launch_dependents();
  // All but qkv before the wait: no kernel writes it.
  Float8 cosine = {}, sine = {}, weight_a = {}, weight_b = {};
  if (active && rotated && !is_value) {
    const float* row = cos_sin + (long long)positions[token] * rotary_dim;
    cosine = load_float8(row + i);
    sine = load_float8(row + rotary_dim / 2 + i);
  }
  if (kNorm && active && !is_value) {
    const scalar_t* weight = is_query ? q_norm : k_norm;
    weight_a = load_float8(weight + i);
    weight_b = load_float8(weight + k);
  }
  scalar_t* x = qkv + ((long long)token * total_heads + head) * kHeadDim;
  scalar_t *dst_a = x + i, *dst_b = x + k;
  bool stored = active;
  if (active && !is_query) {
    const int slot = slot_mapping[token];
    stored = slot >= 0;
    if (stored) {
      const int kv_head = head - num_heads - (is_value ? kv.num_kv_heads : 0);
      scalar_t* block = kv.block<scalar_t, kHeadDim>(is_value ? kv.v_offset : kv.k_offset, slot / kBlockSize, kv_head,
                                                     kBlockSize);
      dst_a = block + chunk_offset<kHeadDim>(slot % kBlockSize, i / 8, kBlockSize);
      dst_b = block + chunk_offset<kHeadDim>(slot % kBlockSize, k / 8, kBlockSize);
    }
  }
  griddepcontrol_wait();

  Float8 a = {}, b = {};
  if (active) {
    a = load_float8(x + i);
    b = load_float8(x + k);
  }
  if constexpr (kNorm) {
    float sum_sq = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum_sq += a.data[j] * a.data[j] + b.data[j] * b.data[j];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum_sq += __shfl_xor_sync(kFullMask, sum_sq, offset);
    if (!is_value) {
      const float scale = rsqrtf(sum_sq / kHeadDim + eps);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        a.data[j] *= scale * weight_a.data[j];
        b.data[j] *= scale * weight_b.data[j];
      }
    }
  }
  if (!stored) return;  // no shuffle and no barrier follows

  if (rotated && !is_value) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float first = a.data[j], second = b.data[j];
      a.data[j] = first * cosine.data[j] - second * sine.data[j];
      b.data[j] = second * cosine.data[j] + first * sine.data[j];
    }
  }
  store_float8(dst_a, a);
  store_float8(dst_b, b);
}
