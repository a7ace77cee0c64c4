// key_attention.cuh: one warp's attention of a few query heads over many keys: the keys are the rows of the products, so
// that 8 heads make do with half of what a 16-row query tile takes (warp_attention.cuh).
//
//   scores [keys, heads] = k . q^T      out [dimensions, heads] = v^T . weights
//
// With lane = 4 * g + t, a lane keeps of each 16 keys (of scores) or dimensions (of out) the two g and g + 8, of each 8
// heads the two 2t and 2t + 1: the accumulator's layout. The weights are transposed in registers on their way into the
// second product.
#ifndef CUPAGED_KEY_ATTENTION_CUH
#define CUPAGED_KEY_ATTENTION_CUH

#include "common.cuh"
#include "paged_kv.cuh"
#include "ptx.cuh"
#include "softmax_state.cuh"
#include "warp_attention.cuh"

// Use: score(), mask() where needed, softmax(), weigh() for each step of keys; then finish() once.
template <typename scalar_t,  // element type of queries, keys and values
          int kHeadDim,       // dimensions of a head, a multiple of 64
          int kKeyTiles,      // 16 keys each, of a step; a tile lies as a block of 16 rows does in the cache
          int kHeadTiles>     // 8 query heads each
class KeyAttention {
 public:
  static constexpr int kTileSize = 16 * kHeadDim;  // elements of a tile of keys or values

  float out[kHeadTiles][kHeadDim / 16][4] = {};  // weighted sums of values, on the base of their head's state
  SoftmaxState state[kHeadTiles][2];             // of heads 2t and 2t + 1; sum is this lane's share until finish()

  // Take the queries of num_heads heads, [num_heads, kHeadDim], `stride` elements apart.
  __device__ __forceinline__ void load(const scalar_t* queries, int stride, int num_heads) {
#pragma unroll
    for (int h = 0; h < kHeadTiles; ++h)
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const int head = 8 * h + lane_ / 4;
        const scalar_t* pair = queries + head * stride + 8 * i + lane_ % 4 * 2;
        queries_[h][i] = head < num_heads ? *reinterpret_cast<const unsigned*>(pair) : 0;
      }
  }

  // scores = keys . queries for keys [kKeyTiles][16, kHeadDim].
  __device__ __forceinline__ void score(const scalar_t* keys) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int h = 0; h < kHeadTiles; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[n][h][i] = 0.f;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        unsigned k[4];
        ldmatrix_x4(k, lane_row(keys, n, step));
#pragma unroll
        for (int h = 0; h < kHeadTiles; ++h)
          mma_m16n8k16<scalar_t>(scores_[n][h], k, queries_[h][2 * step], queries_[h][2 * step + 1]);
      }
  }

  // Strike out the scores of keys that are not among begin .. end - 1; first_key is the position of the first.
  __device__ __forceinline__ void mask(int first_key, int begin, int end) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int h = 0; h < kHeadTiles; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = first_key + 16 * n + lane_ / 4 + i / 2 * 8;
          if (key < begin || key >= end) scores_[n][h][i] = kNegInf;
        }
  }

  // weights = 2^(scale * score - max), the older sums moved to the new maximum. scale > 0.
  __device__ __forceinline__ void softmax(float scale) {
#pragma unroll
    for (int h = 0; h < kHeadTiles; ++h) {
      float factor[2], base[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float top = kNegInf;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) top = fmaxf(top, fmaxf(scores_[n][h][j], scores_[n][h][2 + j]));
#pragma unroll
        for (int lanes = 4; lanes < kWarpSize; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, lanes));
        factor[j] = state[h][j].raise_max(top * scale);
        base[j] = state[h][j].base();
      }
      // Most steps don't raise a maximum.
      if (__any_sync(kFullMask, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[h][d][i] *= factor[i % 2];
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float first = ex2_approx_ftz(fmaf(scores_[n][h][2 * half], scale, -base[0]));
          const float second = ex2_approx_ftz(fmaf(scores_[n][h][2 * half + 1], scale, -base[1]));
          state[h][0].sum += first;
          state[h][1].sum += second;
          weights_[n][h][half] = movmatrix_trans(pack_pair<scalar_t>(first, second));
        }
    }
  }

  // out += values . weights for values [kKeyTiles][16, kHeadDim].
  __device__ __forceinline__ void weigh(const scalar_t* values) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        unsigned v[4];  // keys 0 .. 7 and 8 .. 15 for the first 8 dimensions, then for the second 8
        ldmatrix_x4_trans(v, lane_row(values, n, d));
        const unsigned transposed[4] = {v[0], v[2], v[1], v[3]};
#pragma unroll
        for (int h = 0; h < kHeadTiles; ++h)
          mma_m16n8k16<scalar_t>(out[h][d], transposed, weights_[n][h][0], weights_[n][h][1]);
      }
  }

  // Add up the lanes' shares of the sums.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int h = 0; h < kHeadTiles; ++h)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int lanes = 4; lanes < kWarpSize; lanes *= 2)
          state[h][j].sum += __shfl_xor_sync(kFullMask, state[h][j].sum, lanes);
  }

 private:
  // The row that this lane names to ldmatrix for the 16 rows of tile n and the 16 columns from 16 * step on.
  __device__ __forceinline__ const scalar_t* lane_row(const scalar_t* tiles, int n, int step) const {
    return tiles + n * kTileSize + step / 4 * 16 * 64 + chunk_offset<64>(lane_ % 16, step % 4 * 2 + lane_ / 16, 16);
  }

  unsigned queries_[kHeadTiles][kHeadDim / 8];  // in pairs of scalar_t: the first product's B operand
  float scores_[kKeyTiles][kHeadTiles][4];
  unsigned weights_[kKeyTiles][kHeadTiles][2];  // in pairs of scalar_t: the second product's B operand
  const int lane_ = threadIdx.x % kWarpSize;
};

#endif  // CUPAGED_KEY_ATTENTION_CUH
