// rope.cu: rotate the query and key heads of a step by their positions; keys and values go to their slots of the cache
//
// What happens to a head: rope.cuh. With kNorm, each query and key head is RMS-normed before.
//
// Work:     a lane has two vectors of a head (rope.cuh), a warp as many heads as fit.
// Numerics: float32, one rounding, at the store.
// Overlap:  all that is read but qkv, and the place in the cache, is asked for before the wait for the kernel before.
// Bound:    bytes: qkv read once; the queries, keys and values written once. Measured: docs/performance.md.
#include "common.cuh"
#include "paged_kv.cuh"
#include "ptx.cuh"
#include "rope.cuh"

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
                  int rotary_dim,                           // a multiple of 16, at most kHeadDim
                  float eps, PagedKV kv, int num_heads) {
  using Share = HeadShare<scalar_t, kHeadDim>;
  static_assert(kNumThreads % kWarpSize == 0, "whole warps");
  const int token = blockIdx.x;
  const int total_heads = num_heads + 2 * kv.num_kv_heads;
  const int head = (blockIdx.y * kNumThreads + threadIdx.x) / Share::kLanes;
  const bool is_query = head < num_heads;
  const bool is_value = head >= num_heads + kv.num_kv_heads;
  Share share(rotary_dim);
  const bool active = head < total_heads && share.exists;

  griddepcontrol_launch_dependents();
  // All but qkv before the wait: no kernel writes it.
  if (active && !is_value) {
    share.load_rotation(cos_sin + (long long)positions[token] * rotary_dim, rotary_dim);
    if (kNorm) share.load_weight(is_query ? q_norm : k_norm);
  }
  scalar_t* x = qkv + ((long long)token * total_heads + head) * kHeadDim;
  scalar_t *dst_a = x + share.first, *dst_b = x + share.second;
  bool stored = active;
  if (active && !is_query) {
    const int slot = slot_mapping[token];
    stored = slot >= 0;
    if (stored) {
      const int kv_head = head - num_heads - (is_value ? kv.num_kv_heads : 0);
      scalar_t* block = kv.block<scalar_t, kHeadDim>(is_value ? kv.v_offset : kv.k_offset, slot / kBlockSize, kv_head,
                                                     kBlockSize);
      dst_a = block + chunk_offset<kHeadDim>(slot % kBlockSize, share.first / 8, kBlockSize);
      dst_b = block + chunk_offset<kHeadDim>(slot % kBlockSize, share.second / 8, kBlockSize);
    }
  }
  griddepcontrol_wait();

  if (active) share.load(x);
  if constexpr (kNorm) share.norm(eps, !is_value);
  if (!stored) return;  // no shuffle and no barrier follows

  if (!is_value) share.rotate();
  store_float8(dst_a, share.a);
  store_float8(dst_b, share.b);
}
