// paged_prefill.cu: causal attention of many query tokens a sequence over its cached keys and values.
//
//   out[t, h] = sum_j softmax_j(sm_scale * q[t, h] . k[j]) * v[j],  j in max(0, p - window + 1) .. p
//
// for token t of the step at position p = seq_len - query_len + its place in its sequence's query: whole prompts and
// chunks of prompts, of any lengths, in one launch.
//
// Work:     one thread block per (tile of query rows, sequence, kv head); rows: prefill_rows.cuh. Each warp owns
//           16 * kRowTiles rows for the whole row of keys and walks over the key tiles that any of the block's rows
//           attends to; the latest tokens, which have the most keys, go first.
// Splits:   keys beyond the first kSplitKeys are split at multiples of that, so that few rows over many keys keep all of
//           the GPU busy: a thread block each, of which the last one to finish merges, in the order of the keys.
// Numerics: scores, weights and sums in float32, weights rounded to scalar_t before they meet V; one rounding at the
//           store. Key tiles lie at absolute positions and a tile that a row can't see leaves its state as it was, bit
//           for bit; so do the parts of which it sees nothing, and splits lie at absolute positions. So a token's result
//           depends neither on how its prompt was cut into chunks nor on the batch.
// Traffic:  K and V of a tile serve 16 * kRowTiles * kNumWarps rows: bound by the tensor cores. Measured: docs/performance.md.
#include "common.cuh"
#include "paged_kv.cuh"
#include "paged_tile.cuh"
#include "prefill_rows.cuh"
#include "ptx.cuh"
#include "warp_attention.cuh"

constexpr int kStages = 2;        // in the ring: K of the next tile arrives under this tile's V, and V under K
constexpr int kSplitKeys = 4096;  // keys of a split; twin in paged_prefill.py

// The keys of one of the splits that keys begin .. end - 1 lie in, and how many of these there are.
struct KeySplit {
  int begin, end, count;

  __device__ __forceinline__ KeySplit(int index, int begin, int end) {
    const int first = begin / kSplitKeys;
    count = end > begin ? (end - 1) / kSplitKeys - first + 1 : 1;
    this->begin = max(begin, (first + index) * kSplitKeys);
    this->end = min(end, (first + index + 1) * kSplitKeys);
  }
};

// grid (num_kv_heads * num_splits, sequences from first_seq on, tiles of rows down from last_tile), kNumWarps * 32
// threads. Scratch: tiles in the order of sequence, row tile and kv head; unused where all keys lie in one split.
template <typename scalar_t,  // __half or __nv_bfloat16: q, cache, out
          int kHeadDim,       // dimensions of a head
          int kNumWarps,      // warps a thread block
          int kRowTiles,      // 16-row query tiles a warp: each serves once more what was read of K and V
          int kKeys>          // keys a tile
__global__ void __launch_bounds__(kNumWarps * kWarpSize)
paged_prefill(scalar_t* __restrict__ out,               // [num_tokens, num_heads, kHeadDim]
              const scalar_t* __restrict__ qkv,         // [num_tokens, num_heads + 2 * num_kv_heads, kHeadDim]; q read
              const int* __restrict__ block_tables,     // [num_seqs, max_blocks]
              const int* __restrict__ seq_lens,         // [num_seqs]
              const int* __restrict__ query_start_loc,  // [num_seqs + 1]
              PagedKV kv, Divisor group, int max_blocks, int block_shift, int first_seq, int window,
              float scale,                   // sm_scale * log2(e)
              float* partial_outs,           // [tiles, num_splits, kRows, kHeadDim] scratch
              SoftmaxState* partial_states,  // [tiles, num_splits, kRows] scratch
              int* counters,                 // [tiles] zeros before and after
              int num_splits,                // that a sequence's keys lie in at most
              int last_tile) {
  constexpr int kNumThreads = kNumWarps * kWarpSize;
  constexpr int kWarpRows = 16 * kRowTiles, kRows = kNumWarps * kWarpRows;
  using Layout = TileLayout<kHeadDim>;
  using Stream = KVStream<scalar_t, kHeadDim, kKeys, kStages, kNumThreads>;
  static_assert(kSplitKeys % kKeys == 0, "splits must begin with a tile");
  static_assert((kStages * kKeys + kRows) * kHeadDim * (int)sizeof(scalar_t) <= kMaxSharedBytes,
                "the ring and the query tile must fit the shared memory that every GPU has: take smaller tiles");

  const int kv_head = blockIdx.x / num_splits, split_index = blockIdx.x % num_splits;
  const int seq = first_seq + blockIdx.y;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const PrefillRows rows(query_start_loc, seq_lens, seq, kv_head, kv.num_kv_heads, group);
  const int first_row = (last_tile - (int)blockIdx.z) * kRows;
  if (first_row >= rows.num_rows) return;  // the whole thread block
  const KeySplit split(split_index, max(0, rows.end_of(first_row) - window), rows.end_of(first_row + kRows - 1));
  if (split_index >= split.count) return;

  DYNAMIC_SHARED(shared);
  scalar_t* ring = reinterpret_cast<scalar_t*>(shared);   // [kStages, kKeys, kHeadDim]
  scalar_t* q_tile = ring + kStages * Stream::kTileSize;  // [kRows, kHeadDim]; in the end the results

  rows.copy<Layout, kRows, kNumThreads>(q_tile, qkv, first_row, threadIdx.x);
  Stream stream(ring, {kv, block_tables + (long long)seq * max_blocks, block_shift, kv_head, split.begin, split.end});
  stream.prefetch();

  const int lane = threadIdx.x % kWarpSize;
  const int warp_row = threadIdx.x / kWarpSize * kWarpRows;  // the warp's first row in the tile
  const int warp_first_end = rows.end_of(first_row + warp_row);
  const int warp_last_end = rows.end_of(first_row + warp_row + kWarpRows - 1);
  WarpAttention<scalar_t, kHeadDim, kRowTiles, kKeys> attention;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      attention.end[r][half] = rows.end_of(first_row + warp_row + 16 * r + 8 * half + lane / 4);

  for (int tile = 0; tile < stream.num_tiles(); ++tile) {
    const int first_key = stream.first_key() + tile * kKeys;
    // Does any row of the warp see a key of the tile, and do all rows see all of them?
    const bool seen = first_key < warp_last_end && first_key + kKeys > warp_first_end - window;
    const bool whole = first_key + kKeys <= warp_first_end && first_key >= warp_last_end - window;
    const scalar_t* k_tile = stream.next();
    if (seen) {
      attention.score(q_tile, warp_row, k_tile, 0);
      if (!whole) attention.mask(first_key, window);
      attention.softmax(scale);
    }
    const scalar_t* v_tile = stream.next();
    if (seen) attention.weigh(v_tile, 0);
  }
  attention.finish();

  if (split.count > 1) {
    const long long tile = ((long long)blockIdx.y * gridDim.z + blockIdx.z) * kv.num_kv_heads + kv_head;
    float* outs = partial_outs + tile * num_splits * kRows * kHeadDim;
    SoftmaxState* states = partial_states + tile * num_splits * kRows;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = split_index * kRows + warp_row + 16 * r + 8 * half + lane / 4;
        if (lane % 4 == 0) states[row] = attention.state[r][half];
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j)
          *reinterpret_cast<float2*>(outs + row * kHeadDim + 8 * j + lane % 4 * 2) =
              make_float2(attention.out[r][j][2 * half], attention.out[r][j][2 * half + 1]);
      }
    cp_async_wait_group<0>();
    if (!is_last_to_arrive(counters + tile, split.count)) return;
    // The merged rows go through shared memory too, as scalar_t.
    for (int i = threadIdx.x; i < kRows * (kHeadDim / 4); i += kNumThreads) {
      const int row = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
      float columns[4];
      const SoftmaxState state = merge_parts(columns, states + row, kRows, outs + row * kHeadDim + column,
                                             kRows * kHeadDim, split.count);
      const float factor = state.inverse_sum();
      uint2 packed;
      packed.x = pack_pair<scalar_t>(columns[0] * factor, columns[1] * factor);
      packed.y = pack_pair<scalar_t>(columns[2] * factor, columns[3] * factor);
      *reinterpret_cast<uint2*>(q_tile + Layout::offset(row, column / 8) + column % 8) = packed;
    }
    __syncthreads();
    rows.store<Layout, kWarpRows, kHeadDim>(out, q_tile + Layout::offset(warp_row, 0), first_row + warp_row);
    return;
  }

  // Each warp puts its rows where its queries were, and from there in 16-byte stores into out.
  cp_async_wait_group<0>();
  __syncthreads();  // the queries have arrived even where there was no key to wait for
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = attention.state[r][half].inverse_sum();
      const int row = warp_row + 16 * r + 8 * half + lane / 4;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j)
        *reinterpret_cast<unsigned*>(q_tile + Layout::offset(row, j) + lane % 4 * 2) = pack_pair<scalar_t>(
            attention.out[r][j][2 * half] * factor, attention.out[r][j][2 * half + 1] * factor);
    }
  __syncwarp();
  rows.store<Layout, kWarpRows, kHeadDim>(out, q_tile + Layout::offset(warp_row, 0), first_row + warp_row);
}
