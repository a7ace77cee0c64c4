// paged_decode.cu: attention of one query token a sequence over its cached keys and values, split over the keys.
//
//   out[i, h] = sum_j softmax_j(sm_scale * q[i, h] . k[j]) * v[j],  j in max(0, seq_len - window) .. seq_len - 1
//
// Work:     one thread block per (split of the keys, kv head, sequence). The query heads that share a kv head are the
//           rows of one 16-row tile (more than 16 take several thread blocks), so K and V are read once for all of
//           them. The warps take 16 keys each of every tile; their states merge at the end. The keys are what is wide
//           here, but q stays the tensor core's 16-row operand: then the weights leave the first product in the layout
//           that the second one wants, and the products on padding cost nothing that the memory would not.
// Splits:   at absolute positions that depend on the sequence's own length alone, and merged in their order, so that a
//           result has the same bits whatever else is in the batch. The last thread block of a (sequence, kv head)
//           to finish merges.
// Numerics: scores, weights, sums and merging in float32; weights rounded to scalar_t before they meet V; one rounding
//           at the store.
// Traffic:  K and V once, 4 * head_dim bytes a key and kv head: bound by memory. Splits add about 8 * head_dim bytes a
//           query head each, written and read through L2. Measured: docs/performance.md.
#include "common.cuh"
#include "decode_splits.cuh"
#include "paged_kv.cuh"
#include "paged_tile.cuh"
#include "ptx.cuh"
#include "softmax_state.cuh"
#include "warp_attention.cuh"

constexpr int kTileRows = 16;  // query heads a thread block; twin in paged_decode.py

// Round columns * factor and store them; out 8-byte aligned.
template <typename scalar_t>
__device__ __forceinline__ void store_row_part(scalar_t* out, const float (&columns)[4], float factor) {
  uint2 packed;
  packed.x = pack_pair<scalar_t>(columns[0] * factor, columns[1] * factor);
  packed.y = pack_pair<scalar_t>(columns[2] * factor, columns[3] * factor);
  *reinterpret_cast<uint2*>(out) = packed;
}

// grid (splits that the longest sequence may have, num_kv_heads * ceil(group / 16), num_seqs), kNumWarps * 32 threads
template <typename scalar_t,  // __half or __nv_bfloat16: q, cache, out
          int kHeadDim,       // dimensions of a head
          int kNumWarps,      // warps a thread block; a tile holds 16 keys for each
          int kStages>        // tiles of K or V in the ring
__global__ void __launch_bounds__(kNumWarps * kWarpSize)
paged_decode(scalar_t* __restrict__ out,            // [num_seqs, num_heads, kHeadDim]
             const scalar_t* __restrict__ qkv,      // [num_seqs, num_heads + 2 * num_kv_heads, kHeadDim]; q read
             const int* __restrict__ block_tables,  // [num_seqs, max_blocks]
             const int* __restrict__ seq_lens,      // [num_seqs]
             float* partial_outs,                   // [num_seqs, num_heads, gridDim.x, kHeadDim] scratch
             SoftmaxState* partial_states,          // [num_seqs, num_heads, gridDim.x] scratch
             int* counters,                         // [num_seqs, gridDim.y] zeros before and after
             PagedKV kv, int num_heads, int max_blocks, int block_shift, int max_splits, int window,
             float scale) {  // sm_scale * log2(e)
  constexpr int kKeys = 16 * kNumWarps;
  constexpr int kNumThreads = kNumWarps * kWarpSize;
  constexpr int kColumnGroups = kHeadDim / 4;
  using Layout = TileLayout<kHeadDim>;
  using Stream = KVStream<scalar_t, kHeadDim, kKeys, kStages, kNumThreads>;
  static_assert((kStages * kKeys + kTileRows) * kHeadDim * (int)sizeof(scalar_t) <= kMaxSharedBytes,
                "the ring and the query tile must fit the shared memory that every GPU has: take fewer stages");
  static_assert(kNumWarps * kTileRows * (kHeadDim * 4 + 8) <= kStages * kKeys * kHeadDim * (int)sizeof(scalar_t),
                "the warps' partial results must fit where the ring was");
  static_assert(kSplitAlign % kKeys == 0, "splits must begin with a tile");

  const int seq = blockIdx.z, split_index = blockIdx.x, num_splits = gridDim.x;
  const int group = num_heads / kv.num_kv_heads;
  const int row_tiles = ceil_div(group, kTileRows);
  const int kv_head = blockIdx.y / row_tiles;
  const int first_row = blockIdx.y % row_tiles * kTileRows;
  const int num_rows = min(kTileRows, group - first_row);
  const int head = kv_head * group + first_row;  // of row 0

  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int seq_len = seq_lens[seq];
  const Splits splits(seq_len, window, max_splits, false);
  const int begin = splits.begin(split_index), end = splits.end(split_index);
  if (split_index >= max(1, splits.count)) return;  // the whole thread block; split 0 of an empty sequence writes zeros

  DYNAMIC_SHARED(shared);
  scalar_t* ring = reinterpret_cast<scalar_t*>(shared);  // [kStages, kKeys, kHeadDim]
  scalar_t* q_tile = ring + kStages * Stream::kTileSize;  // [16, kHeadDim]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

  const scalar_t* q = qkv + ((long long)seq * (num_heads + 2 * kv.num_kv_heads) + head) * kHeadDim;
  for (int i = threadIdx.x; i < kTileRows * Layout::kChunks; i += kNumThreads) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    const bool valid = row < num_rows;
    cp_async_16(q_tile + Layout::offset(row, chunk), q + (valid ? row : 0) * kHeadDim + chunk * 8, valid);
  }
  Stream stream(ring, {kv, block_tables + (long long)seq * max_blocks, block_shift, kv_head, begin, end});
  stream.prefetch();

  WarpAttention<scalar_t, kHeadDim, 1, 16> attention;
  attention.end[0][0] = attention.end[0][1] = seq_len;
  for (int tile = 0; tile < stream.num_tiles(); ++tile) {
    const int first_key = stream.first_key() + tile * kKeys;
    attention.score(q_tile, 0, stream.next(), 16 * warp);
    if (first_key < begin || first_key + kKeys > end) attention.mask(first_key + 16 * warp, window);
    attention.softmax(scale);
    attention.weigh(stream.next(), 16 * warp);
  }
  attention.finish();

  // The warps' results go where the ring was, to be merged there.
  cp_async_wait_group<0>();
  __syncthreads();
  float* warp_outs = reinterpret_cast<float*>(shared);  // [kNumWarps, 16, kHeadDim]
  SoftmaxState* warp_states = reinterpret_cast<SoftmaxState*>(warp_outs + kNumWarps * kTileRows * kHeadDim);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kTileRows + 8 * half + lane / 4;
    if (lane % 4 == 0) warp_states[row] = attention.state[0][half];
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
      *reinterpret_cast<float2*>(warp_outs + row * kHeadDim + 8 * j + lane % 4 * 2) =
          make_float2(attention.out[0][j][2 * half], attention.out[0][j][2 * half + 1]);
  }
  __syncthreads();

  const long long first_out = (long long)seq * num_heads + head;  // row of [num_seqs, num_heads]
  const bool alone = splits.count <= 1;
  for (int i = threadIdx.x; i < num_rows * kColumnGroups; i += kNumThreads) {
    const int row = i / kColumnGroups, column = i % kColumnGroups * 4;
    float columns[4];
    const SoftmaxState state = merge_parts(columns, warp_states + row, kTileRows, warp_outs + row * kHeadDim + column,
                                           kTileRows * kHeadDim, kNumWarps);
    if (alone) {
      store_row_part(out + (first_out + row) * kHeadDim + column, columns, state.inverse_sum());
    } else {
      const long long part = (first_out + row) * num_splits + split_index;
      store_vec(partial_outs + part * kHeadDim + column, Vec<float>{columns[0], columns[1], columns[2], columns[3]});
      if (column == 0) partial_states[part] = state;
    }
  }
  if (alone) return;

  // The last split to arrive merges them all.
  __threadfence();  // this thread's partial results before its arrival
  __syncthreads();
  int* counter = counters + (long long)seq * gridDim.y + blockIdx.y;
  const bool last = threadIdx.x == 0 && atomicAdd(counter, 1) == splits.count - 1;
  if (!__syncthreads_or(last)) return;
  __threadfence();  // the others' partial results after their arrivals
  for (int i = threadIdx.x; i < num_rows * kColumnGroups; i += kNumThreads) {
    const int row = i / kColumnGroups, column = i % kColumnGroups * 4;
    const long long part = (first_out + row) * num_splits;
    float columns[4];
    const SoftmaxState state = merge_parts(columns, partial_states + part, 1, partial_outs + part * kHeadDim + column,
                                           kHeadDim, splits.count);
    store_row_part(out + (first_out + row) * kHeadDim + column, columns, state.inverse_sum());
  }
  if (threadIdx.x == 0) *counter = 0;  // for the next launch
}
