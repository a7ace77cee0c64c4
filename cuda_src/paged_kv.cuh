// paged_kv.cuh: from a block id to an address, in one place.
//
// The cache is a list of slabs, each [num_layers, 2 (K, V), blocks_per_slab, num_kv_heads, block_size, head_dim].
// Slabs come and go while captured graphs stay, so kernels find a slab's address in a table in device memory.
#ifndef CUPAGED_PAGED_KV_CUH
#define CUPAGED_PAGED_KV_CUH

// One layer of the cache, passed by value; cupaged/kernels/paged_kv.py builds the same 32 bytes.
struct PagedKV {
  const unsigned long long* slabs;  // [max_slabs] addresses, in device memory
  long long k_offset;               // elements from a slab's start to this layer's K
  long long v_offset;               // and to its V
  int slab_shift;                   // log2(blocks_per_slab)
  int num_kv_heads;

  template <typename scalar_t, int kBlockSize, int kHeadDim>
  __device__ __forceinline__ scalar_t* block(long long offset, int block_id, int kv_head) const {
    scalar_t* slab = reinterpret_cast<scalar_t*>(slabs[block_id >> slab_shift]);
    const int index = block_id & ((1 << slab_shift) - 1);
    // 64-bit: a slab can hold more than 2^31 elements
    return slab + offset + ((long long)index * num_kv_heads + kv_head) * (kBlockSize * kHeadDim);
  }

  // [kBlockSize, kHeadDim] keys of one head in one block
  template <typename scalar_t, int kBlockSize, int kHeadDim>
  __device__ __forceinline__ scalar_t* keys(int block_id, int kv_head) const {
    return block<scalar_t, kBlockSize, kHeadDim>(k_offset, block_id, kv_head);
  }

  // [kBlockSize, kHeadDim] values of one head in one block
  template <typename scalar_t, int kBlockSize, int kHeadDim>
  __device__ __forceinline__ scalar_t* values(int block_id, int kv_head) const {
    return block<scalar_t, kBlockSize, kHeadDim>(v_offset, block_id, kv_head);
  }

  // [kHeadDim] row `offset_in_block` of one head in one block, the block size known at run time only; offset is
  // k_offset or v_offset
  template <typename scalar_t, int kHeadDim>
  __device__ __forceinline__ const scalar_t* row(long long offset, int block_id, int kv_head, int block_shift,
                                                 int offset_in_block) const {
    const scalar_t* slab = reinterpret_cast<const scalar_t*>(slabs[block_id >> slab_shift]);
    const int index = block_id & ((1 << slab_shift) - 1);
    const long long head = (long long)index * num_kv_heads + kv_head;
    return slab + offset + ((head << block_shift) + offset_in_block) * kHeadDim;
  }
};

#endif  // CUPAGED_PAGED_KV_CUH
