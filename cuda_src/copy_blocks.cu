// copy_blocks.cu: copy whole blocks of the KV cache, all layers, K and V, within an arena or from one to another
//
//   dst[layer, part, dst_id] = src[layer, part, src_id]      for each pair (src_id, dst_id), layer and part (K, V)
//
// Either arena may lie in pinned host memory: through unified addressing a slab's address serves the GPU as it is. So
// copy-on-write (one arena), swapping out (to the host) and swapping in (from there) are this one kernel.
//
// Work:    a block is 2 * num_layers runs of bytes, whatever their type. kNumThreads * kNumVectors vectors of a run a
//          thread block; a thread loads all of its vectors before it stores the first, so that many are under way.
// Pairs:   come as an argument, so that copy-on-write in front of a step costs one launch, and no copy to the device.
// Bound:   bytes: each block is read once and written once, over the bus when one side is the host. Measured: docs/performance.md.
#include "common.cuh"

// (source, destination); cupaged/kernels/copy_blocks.py builds the same. All arguments have 4 KB.
template <int kMaxPairs>
struct BlockPairs {
  int ids[kMaxPairs][2];
};

// Where layer-and-part `run` of a block begins. slabs: a table of addresses, one of 1 << slab_shift blocks each.
__device__ __forceinline__ unsigned* run_of_block(const unsigned long long* slabs, int slab_shift, int block_id,
                                                  int run, int run_vectors) {
  const int index = block_id & ((1 << slab_shift) - 1);
  // In vectors, and 64-bit: a slab can hold more than 2^31 words.
  const long long first = (((long long)run << slab_shift) + index) * run_vectors;
  return reinterpret_cast<unsigned*>(slabs[block_id >> slab_shift]) + first * Vec<unsigned>::kSize;
}

// grid (num_pairs, 2 * num_layers, ceil(run_vectors / (kNumThreads * kNumVectors))), block (kNumThreads)
template <int kNumThreads,  // threads per block
          int kNumVectors,  // 16-byte vectors of a thread
          int kMaxPairs>
__global__ void __launch_bounds__(kNumThreads)
copy_blocks(const unsigned long long* __restrict__ dst_slabs,  // [max_slabs] addresses; blocks that are written
            const unsigned long long* __restrict__ src_slabs,  // [max_slabs] addresses; blocks that are read
            const __grid_constant__ BlockPairs<kMaxPairs> pairs,  // of which the first num_pairs count
            int dst_slab_shift,                                // log2 of blocks per slab
            int src_slab_shift,
            int run_vectors) {  // 16-byte vectors of one layer's K, or V, of a block
  using V = Vec<unsigned>;
  const int src_id = pairs.ids[blockIdx.x][0], dst_id = pairs.ids[blockIdx.x][1];
  const unsigned* src = run_of_block(src_slabs, src_slab_shift, src_id, blockIdx.y, run_vectors);
  unsigned* dst = run_of_block(dst_slabs, dst_slab_shift, dst_id, blockIdx.y, run_vectors);

  const int first = blockIdx.z * (kNumThreads * kNumVectors) + threadIdx.x;
  V vectors[kNumVectors];
#pragma unroll
  for (int j = 0; j < kNumVectors; ++j) {
    const int i = first + j * kNumThreads;
    if (i < run_vectors) vectors[j] = load_vec(src + (long long)i * V::kSize);
  }
#pragma unroll
  for (int j = 0; j < kNumVectors; ++j) {
    const int i = first + j * kNumThreads;
    if (i < run_vectors) store_vec(dst + (long long)i * V::kSize, vectors[j]);
  }
}
