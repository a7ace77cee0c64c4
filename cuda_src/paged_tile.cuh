// paged_tile.cuh: tiles of 16-bit rows in shared memory, and the stream of key and value tiles out of the paged cache.
#ifndef CUPAGED_PAGED_TILE_CUH
#define CUPAGED_PAGED_TILE_CUH

#include "common.cuh"
#include "paged_kv.cuh"
#include "ptx.cuh"

// What every GPU from sm_80 on gives one thread block; sm_86, sm_89 and sm_120 give no more.
constexpr int kMaxSharedBytes = 99 * 1024;

// Where the 16-byte chunks of a tile [rows, kHeadDim] lie. ldmatrix reads one chunk column of 8 successive rows at a
// time; chunks are permuted within their row so that these 8 fall on different banks, with no padding. Rows of
// kChunks = p * odd chunks come back to the same bank every 8/p rows, so that is how often the permutation changes:
//   64, 128, 256: p = 8, chunk ^ row % 8     80: p = 2, chunk ^ row / 4 % 2     96: p = 4, chunk ^ row / 2 % 4
template <int kHeadDim>
struct TileLayout {
  static_assert(kHeadDim % 16 == 0, "head_dim must be a multiple of 16, the depth of a tensor-core product");
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  // elements from the tile's start to chunk `chunk` of row `row`
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row / (8 / kPeriod) % kPeriod))) * 8;
  }
};

// The keys and values of one sequence and one kv head, at positions begin .. end - 1.
struct PagedRows {
  const PagedKV& kv;
  const int* block_table;  // [>= ceil(end / block size)] the sequence's blocks
  int block_shift;         // log2(block size)
  int kv_head;
  int begin, end;

  // Start copying positions first .. first + kKeys - 1 to a tile, by the first kNumThreads threads of the block. Rows
  // outside the range become zeros, and neither their slots nor their block table entries are read: an unused slot may
  // hold NaN, and NaN times a weight of 0 is NaN.
  template <int kHeadDim, int kKeys, int kNumThreads, typename scalar_t>
  __device__ __forceinline__ void copy(scalar_t* tile, long long part,  // kv.k_offset or kv.v_offset
                                       int first) const {
    using Layout = TileLayout<kHeadDim>;
    constexpr int kCopies = kKeys * Layout::kChunks;
    const int block_size = 1 << block_shift;
    static_assert(kCopies % kNumThreads == 0, "each thread copies the same number of chunks of a tile");
#pragma unroll 4
    for (int i = 0; i < kCopies / kNumThreads; ++i) {
      const int copy = i * kNumThreads + threadIdx.x;
      const int row = copy / Layout::kChunks, chunk = copy % Layout::kChunks;
      const int key = first + row;
      const int source = min(max(key, begin), end - 1);  // a row that exists: its address is good, if unused
      const scalar_t* block =
          kv.block<scalar_t, kHeadDim>(part, block_table[source >> block_shift], kv_head, block_size);
      const int offset = chunk_offset<kHeadDim>(source & (block_size - 1), chunk, block_size);
      cp_async_16(tile + Layout::offset(row, chunk), block + offset, key == source);
    }
  }
};

// The tiles of one sequence and one kv head, K and V in turn (K0 V0 K1 V1 ...), through a ring of kStages tiles of
// shared memory: kStages - 1 are on their way while one is in use. Tile i holds kKeys keys from first_key() + i * kKeys
// on, and first_key() is a multiple of kKeys: tiles lie at absolute positions, wherever the range begins. Rows outside
// the range are zeros.
// PRECOND: blockDim.x == kNumThreads, and all threads call prefetch() once and next() equally often.
template <typename scalar_t,  // element type
          int kHeadDim,       // elements a row
          int kKeys,          // rows a tile
          int kStages,        // tiles in the ring
          int kNumThreads>    // threads that load together
class KVStream {
 public:
  static constexpr int kTileSize = kKeys * kHeadDim;  // elements
  static_assert(kStages >= 2, "a ring needs a tile in use and one on its way");

  __device__ __forceinline__ KVStream(scalar_t* ring,             // [kStages, kKeys, kHeadDim] shared
                                      const PagedRows& rows)      // to load; none when its end <= its begin
      : ring_(ring), rows_(rows), num_tiles_(rows.end > rows.begin ? ceil_div(rows.end - first_key(), kKeys) : 0) {}

  __device__ __forceinline__ int first_key() const { return rows_.begin / kKeys * kKeys; }
  __device__ __forceinline__ int num_tiles() const { return num_tiles_; }

  // Start the first kStages - 1 loads. Asynchronous copies that the caller began before are waited for with the first.
  __device__ __forceinline__ void prefetch() {
#pragma unroll 1  // it runs once: short code is worth more
    for (int i = 0; i < kStages - 1; ++i) load();
  }

  // The next tile, [kKeys, kHeadDim] in TileLayout, valid until the call after.
  __device__ __forceinline__ const scalar_t* next() {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();  // all threads' copies are there, and all threads have left the tile that load() overwrites
    load();
    const scalar_t* tile = ring_ + use_slot_ * kTileSize;
    use_slot_ = use_slot_ + 1 == kStages ? 0 : use_slot_ + 1;
    return tile;
  }

 private:
  __device__ __forceinline__ void load() {
    if (loaded_ < 2 * num_tiles_) {
      const long long part = loaded_ % 2 == 0 ? rows_.kv.k_offset : rows_.kv.v_offset;
      rows_.copy<kHeadDim, kKeys, kNumThreads>(ring_ + load_slot_ * kTileSize, part,
                                               first_key() + loaded_ / 2 * kKeys);
      ++loaded_;
      load_slot_ = load_slot_ + 1 == kStages ? 0 : load_slot_ + 1;
    }
    cp_async_commit_group();  // also when there was nothing to load, so that next() can count groups
  }

  scalar_t* ring_;
  const PagedRows rows_;
  int num_tiles_;
  int loaded_ = 0;  // tiles whose load has begun, K and V counted each
  int load_slot_ = 0, use_slot_ = 0;
};

#endif  // CUPAGED_PAGED_TILE_CUH
