// warp_attention.cuh: one warp's attention of 16-row query tiles over key and value tiles in shared memory.
//
// With lane = 4 * g + t, a lane keeps of each 16-row tile the rows g and g + 8 ("half" 0 and 1), of each 8 columns
// (keys in scores, dimensions in out) the two from 2t on: the accumulator's layout. Weights are rounded to scalar_t and
// go as they lie into the second product as its A operand; they never pass through shared memory.
#ifndef CUPAGED_WARP_ATTENTION_CUH
#define CUPAGED_WARP_ATTENTION_CUH

#include "common.cuh"
#include "paged_tile.cuh"
#include "ptx.cuh"
#include "softmax_state.cuh"

// Two floats rounded to 16 bits each, `low` in the lower half.
template <typename scalar_t>
__device__ __forceinline__ unsigned pack_pair(float low, float high);
template <>
__device__ __forceinline__ unsigned pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ __forceinline__ unsigned pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Use: score(), mask() where needed, softmax(), weigh() for each tile of keys; then finish() once.
// Row r of the warp attends to keys max(0, end - window) .. end - 1 with its own `end`.
template <typename scalar_t,  // element type of the tiles
          int kHeadDim,       // columns of the query, key and value tiles
          int kRowTiles,      // query tiles of 16 rows
          int kKeys>          // keys that the warp takes of each tile; a multiple of 16
class WarpAttention {
 public:
  static_assert(kKeys % 16 == 0, "weights go into the second product 16 keys at a time");

  float out[kRowTiles][kHeadDim / 8][4] = {};  // weighted sums of values, on the base of their row's state
  SoftmaxState state[kRowTiles][2];            // by half; sum is this lane's share until finish()
  int end[kRowTiles][2];                       // by half; set by the owner before the first mask()

  // scores = q . k for rows q_row ..+16*kRowTiles-1 of the query tile, rows k_row ..+kKeys-1 of the key tile.
  __device__ __forceinline__ void score(const scalar_t* q_tile, int q_row, const scalar_t* k_tile, int k_row) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[r][n][i] = 0.f;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      unsigned q[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
        ldmatrix_x4(q[r], lane_row(q_tile, q_row + 16 * r, step));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        unsigned k[4];  // keys 0..7 and 8..15 of the sixteen over the first 8 dimensions, then over the second 8
        ldmatrix_x4(k, lane_row(k_tile, k_row + 16 * n, step));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma_m16n8k16<scalar_t>(scores_[r][2 * n], q[r], k[0], k[2]);
          mma_m16n8k16<scalar_t>(scores_[r][2 * n + 1], q[r], k[1], k[3]);
        }
      }
    }
  }

  // Strike out the scores of keys that a row doesn't attend to; first_key is the position of the warp's first key.
  __device__ __forceinline__ void mask(int first_key, int window) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = first_key + 8 * n + lane_ % 4 * 2 + i % 2;
          const int row_end = end[r][i / 2];
          if (key >= row_end || key < row_end - window) scores_[r][n][i] = kNegInf;
        }
  }

  // weights = 2^(scale * score - max), the older sums moved to the new maximum. scale > 0.
  __device__ __forceinline__ void softmax(float scale) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = kNegInf;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          top = fmaxf(top, fmaxf(scores_[r][n][2 * half], scores_[r][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));  // now over the row's four lanes

        const float factor = state[r][half].raise_max(top * scale);
        const float base = state[r][half].base();
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          out[r][j][2 * half] *= factor;
          out[r][j][2 * half + 1] *= factor;
        }
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const float first = exp2f(fmaf(scores_[r][n][2 * half], scale, -base));
          const float second = exp2f(fmaf(scores_[r][n][2 * half + 1], scale, -base));
          state[r][half].sum += first + second;
          weights_[r][n / 2][n % 2 * 2 + half] = pack_pair<scalar_t>(first, second);
        }
      }
  }

  // out += weights . values, for rows v_row ..+kKeys-1 of the value tile.
  __device__ __forceinline__ void weigh(const scalar_t* v_tile, int v_row) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n)
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        unsigned v[4];  // keys 0..7 and 8..15 of the sixteen for the first 8 dimensions, then for the second 8
        ldmatrix_x4_trans(v, lane_row(v_tile, v_row + 16 * n, j));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma_m16n8k16<scalar_t>(out[r][2 * j], weights_[r][n], v[0], v[1]);
          mma_m16n8k16<scalar_t>(out[r][2 * j + 1], weights_[r][n], v[2], v[3]);
        }
      }
  }

  // Add up the lanes' shares of the sums.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = state[r][half].sum;
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
      }
  }

 private:
  float scores_[kRowTiles][kKeys / 8][4];       // q . k
  unsigned weights_[kRowTiles][kKeys / 16][4];  // of scores_, in pairs of scalar_t: the second product's A operand
  const int lane_ = threadIdx.x % kWarpSize;

  // The row that this lane names to ldmatrix for the 16x16 elements from row first_row (a multiple of 8, the most rows
  // after which TileLayout repeats) and column 16 * step on.
  __device__ __forceinline__ const scalar_t* lane_row(const scalar_t* tile, int first_row, int step) const {
    return tile + first_row * kHeadDim + TileLayout<kHeadDim>::offset(lane_ % 16, 2 * step + lane_ / 16);
  }
};

#endif  // CUPAGED_WARP_ATTENTION_CUH
