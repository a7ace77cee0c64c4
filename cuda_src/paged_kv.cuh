// paged_kv.cuh: from a block id to an address, and what order a block has, in one place.
//
// The cache is a list of slabs, each [num_layers, 2 (K, V), blocks_per_slab, num_kv_heads, block_size, head_dim].
// Slabs come and go while captured graphs stay, so kernels find a slab's address in a table in device memory.
#ifndef CUPAGED_PAGED_KV_CUH
#define CUPAGED_PAGED_KV_CUH

// What a block holds of one head, [block_size, kHeadDim], has its elements in an order that the tensor cores read from
// shared memory as it is, so that one bulk copy brings it there. Where kHeadDim is a multiple of 64, it is kHeadDim / 64
// panels [block_size, 64]; in them, the eight 16-byte chunks of row r are permuted, chunk c standing at c ^ r % 8 (the
// 128-byte swizzle of wgmma_descriptor). Otherwise rows are plain.
//
// Elements from the block's start to chunk `chunk` (of 8 elements) of row `row`; cupaged/kernels/paged_kv.py has a twin.
template <int kHeadDim>
__device__ __forceinline__ int chunk_offset(int row, int chunk, int block_size) {
  if constexpr (kHeadDim % 64 == 0)
    return ((chunk / 8 * block_size + row) * 8 + (chunk % 8 ^ row % 8)) * 8;
  else
    return row * kHeadDim + chunk * 8;
}

// One layer of the cache, passed by value; cupaged/kernels/paged_kv.py builds the same 32 bytes.
struct PagedKV {
  const unsigned long long* slabs;  // [max_slabs] addresses, in device memory
  long long k_offset;               // elements from a slab's start to this layer's K
  long long v_offset;               // and to its V
  int slab_shift;                   // log2(blocks_per_slab)
  int num_kv_heads;

  // [block_size, kHeadDim] keys or values of one head in one block; part is k_offset or v_offset
  template <typename scalar_t, int kHeadDim>
  __device__ __forceinline__ scalar_t* block(long long part, int block_id, int kv_head, int block_size) const {
    scalar_t* slab = reinterpret_cast<scalar_t*>(slabs[block_id >> slab_shift]);
    const int index = block_id & ((1 << slab_shift) - 1);
    // 64-bit: a slab can hold more than 2^31 elements
    return slab + part + ((long long)index * num_kv_heads + kv_head) * (block_size * kHeadDim);
  }
};

#endif  // CUPAGED_PAGED_KV_CUH
