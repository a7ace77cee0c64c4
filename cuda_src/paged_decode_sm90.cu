// paged_decode_sm90.cu: what paged_decode.cu computes, with Hopper's copy engine.
//
// Work:     an item is a split of the keys for one sequence and kv head (8 or 16 of its query heads). Thread block b takes
//           items b, b + gridDim.x, ...; they are numbered so that the splits of a sequence, which are of one size, go to
//           thread blocks in turn: none has more than an item more to do than another. Its warps take steps of keys in
//           turn, in products that have the keys as their rows (key_attention.cuh).
// Memory:   each warp has a ring of its own, kSlots steps' keys or values in turn (K0 V0 K1 V1 ...) that bulk copies bring,
//           and needs no barrier for it: where it is done with one, it asks for another, over the ends of items, so that
//           copies are always under way. Blocks are in an order that ldmatrix reads as it comes (paged_kv.cuh).
// Merging:  of the warps at the end of an item, through shared memory, kWarps heads at a time, each by a warp; of the splits
//           by a kernel of its own. For one thread block to know that all splits of a sequence are there takes fences
//           and atomics, and these wait for the copies that are under way: that costs a quarter of the time.
// Newest:   of a step that only decodes, this kernel also does what rope.cu does: it rotates its items' queries on their way
//           to the tensor cores, and the newest key and value, which go to the cache and, as that copy may come too late,
//           to the step that a warp has of them in its ring. All that the ring fetches was then written by earlier steps
//           (a step's first kernel lets no other one begin before these have ended), so that it is fetched before the
//           wait for the kernel before this one.
// Numerics: as in paged_decode.cu: the same bits whatever else is in the batch.
// Traffic:  as there. Measured: docs/performance.md.
#include "common.cuh"
#include "decode_splits.cuh"
#include "key_attention.cuh"
#include "paged_kv.cuh"
#include "ptx_sm90.cuh"
#include "rope.cuh"
#include "softmax_state.cuh"
#include "warp_attention.cuh"

constexpr bool kFewSplits = true;  // their ends cost more here than what one long sequence gains by more thread blocks

// The items of a launch: of each sequence in turn all splits (an empty one has one as well), of each split all tiles of
// query heads. A warp walks over them, each lane knowing one sequence of 32.
class Items {
 public:
  // Of the item that was found:
  int seq, split, head_tile;
  Splits splits;  // of its sequence

  __device__ __forceinline__ Items(const int* seq_lens, int num_seqs, int head_tiles, int window, int max_splits)
      : seq_lens_(seq_lens), num_seqs_(num_seqs), head_tiles_(head_tiles), window_(window), max_splits_(max_splits) {}

  // Find item `index`, which is not before the last one; false if there are not so many.
  __device__ __forceinline__ bool find(int index) {
    for (int end; index >= (end = __shfl_sync(kFullMask, end_, kWarpSize - 1));) {
      if (first_seq_ + kWarpSize >= num_seqs_) return false;
      first_seq_ += kWarpSize;
      look(end);
    }
    const int lane = __popc(__ballot_sync(kFullMask, end_ <= index));  // that knows its sequence
    const int offset = index - __shfl_sync(kFullMask, begin_, lane);
    seq = first_seq_ + lane;
    split = offset / head_tiles_;
    head_tile = offset % head_tiles_;
    splits.seq_len = __shfl_sync(kFullMask, of_lane_.seq_len, lane);
    splits.first = __shfl_sync(kFullMask, of_lane_.first, lane);
    splits.size = __shfl_sync(kFullMask, of_lane_.size, lane);
    splits.count = __shfl_sync(kFullMask, of_lane_.count, lane);
    return true;
  }

 private:
  // Look at the sequences from first_seq_ on, whose items begin with first_item.
  __device__ __forceinline__ void look(int first_item) {
    const int lane = threadIdx.x % kWarpSize;
    const bool valid = first_seq_ + lane < num_seqs_;
    of_lane_ = Splits(valid ? seq_lens_[first_seq_ + lane] : 0, window_, max_splits_, kFewSplits);
    const int count = valid ? max(1, of_lane_.count) * head_tiles_ : 0;
    int sum = count;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int before = __shfl_up_sync(kFullMask, sum, distance);
      if (lane >= distance) sum += before;
    }
    end_ = first_item + sum;
    begin_ = end_ - count;
  }

  const int* seq_lens_;
  const int num_seqs_, head_tiles_, window_, max_splits_;
  int first_seq_ = -kWarpSize;  // of the 32
  Splits of_lane_;              // this lane's, and its items begin_ .. end_ - 1
  int begin_ = 0, end_ = 0;
};

// The steps of an item that a warp takes: those whose number, key / kKeys, is the warp's modulo kWarps.
template <int kKeys, int kWarps>
struct WarpSteps {
  int next = 0, end = 0;

  WarpSteps() = default;
  __device__ __forceinline__ WarpSteps(int begin_key, int end_key) {
    const int first = begin_key / kKeys, warp = threadIdx.x / kWarpSize;
    next = first + (warp + kWarps - first % kWarps) % kWarps;
    end = ceil_div(end_key, kKeys);
  }
};

// Where sequences, keys and values are.
struct Source {
  const PagedKV& kv;
  const int* block_tables;  // [num_seqs, max_blocks]
  int max_blocks, block_shift;
  int row_tiles;  // of a kv head
};

// The keys and values of a warp's steps of all items of its thread block, one after another, through a ring.
template <typename scalar_t, int kHeadDim, int kKeyTiles, int kWarps, int kSlots>
class StepStream {
 public:
  static constexpr int kKeys = 16 * kKeyTiles;        // of a step
  static constexpr int kSlotSize = kKeys * kHeadDim;  // elements
  static_assert(kSlots % 2 == 1, "when keys are released, values are the next to be fetched");

  // Looks up what comes first; copies nothing yet.
  __device__ __forceinline__ StepStream(scalar_t* ring,            // [kSlots][kKeyTiles][16, kHeadDim]
                                        unsigned long long* full,  // [kSlots] barriers of one arrival
                                        const Source& source, const Items& items)
      : ring_(ring), full_(full), source_(source), items_(items), item_(blockIdx.x) {
    // Of a tile, the rows that are in one block are one run in each panel; if a block is a tile, they are one run.
    const int block_size = 1 << source.block_shift;
    const int panels = block_size == 16 ? 1 : kHeadDim / 64;
    const int run_rows = min(block_size, 16);
    const int lane = threadIdx.x % kWarpSize;
    const int row = lane / panels * run_rows, panel = lane % panels;  // of the step
    copies_ = row < kKeys;
    block_ = row >> source.block_shift;
    run_bytes_ = run_rows * (kHeadDim / panels) * (int)sizeof(scalar_t);
    from_ = (panel * block_size + (row & (block_size - 1))) * 64;
    to_ = row / 16 * 16 * kHeadDim + (panel * 16 + row % 16) * 64;
    locate();
  }

  __device__ __forceinline__ void start() {
#pragma unroll 1  // it runs once: short code is worth more
    for (int i = 0; i < kSlots / 2; ++i) {
      fetch_keys();
      fetch_values();
    }
    fetch_keys();
  }

  // What comes next, keys or values, [kKeyTiles][16, kHeadDim], a tile as a block of 16 rows. Rows of blocks in which the
  // item has no keys hold anything.
  __device__ __forceinline__ scalar_t* next() {
    mbarrier_wait(full_ + slot_, parity_);
    return ring_ + slot_ * kSlotSize;
  }

  // The warp has left the keys, or the values, that came last.
  __device__ __forceinline__ void release_keys() {
    __syncwarp();
    fetch_values();
    leave();
  }
  __device__ __forceinline__ void release_values() {
    __syncwarp();
    fetch_keys();
    leave();
  }

 private:
  __device__ __forceinline__ void leave() {
    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
    parity_ ^= slot_ == 0;
  }

  // Go to the next step to fetch. Where its blocks are, each lane looks up for one of this and further steps.
  __device__ __forceinline__ void locate() {
    bool is_new = looked_up_ == kWarpSize;
    while (steps_.next >= steps_.end) {
      if (!(more_ = items_.find(item_))) return;
      item_ += gridDim.x;
      begin_ = items_.splits.begin(items_.split);
      end_ = items_.splits.end(items_.split);
      steps_ = WarpSteps<kKeys, kWarps>(begin_, end_);
      is_new = true;
    }
    if (!is_new) return;
    const int lane = threadIdx.x % kWarpSize, block_size = 1 << source_.block_shift;
    const int key = (steps_.next + lane / blocks_a_step() * kWarps) * kKeys + lane % blocks_a_step() * block_size;
    const int block = key >> source_.block_shift;
    looked_up_ = 0;
    rows_ = nullptr;
    if (key < end_ && (block + 1) * block_size > begin_)
      rows_ = source_.kv.block<scalar_t, kHeadDim>(source_.kv.k_offset,
                                                   source_.block_tables[(long long)items_.seq * source_.max_blocks + block],
                                                   items_.head_tile / source_.row_tiles, block_size) +
              (key & (block_size - 1)) * 64;
  }

  __device__ __forceinline__ int blocks_a_step() const { return ceil_div(kKeys, 1 << source_.block_shift); }

  __device__ __forceinline__ void fetch_keys() {
    if (more_) copy(0);
  }
  __device__ __forceinline__ void fetch_values() {
    if (!more_) return;
    copy(source_.kv.v_offset - source_.kv.k_offset);
    looked_up_ += blocks_a_step();
    steps_.next += kWarps;
    locate();
  }

  __device__ __forceinline__ void copy(long long after_keys) {
    const auto rows = reinterpret_cast<const scalar_t*>(
        __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(rows_), (looked_up_ + block_) % kWarpSize));
    const bool copies = copies_ && rows != nullptr;
    const int num_copies = __popc(__ballot_sync(kFullMask, copies));
    unsigned long long* full = full_ + fill_slot_;
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive_expect_tx(full, num_copies * run_bytes_);
    __syncwarp();
    if (copies)
      bulk_copy_evict_first(ring_ + fill_slot_ * kSlotSize + to_, rows + from_ + after_keys, run_bytes_, full);
    fill_slot_ = fill_slot_ + 1 == kSlots ? 0 : fill_slot_ + 1;
  }

  scalar_t* ring_;
  unsigned long long* full_;
  const Source& source_;
  Items items_;                    // at the item that is fetched
  int item_;                       // the one after it
  int begin_, end_;                // its keys
  WarpSteps<kKeys, kWarps> steps_;  // and what is left of them
  bool more_ = true;
  const scalar_t* rows_;  // in K, of this lane's block; null where the item has no keys in it
  int looked_up_ = 0;     // the lane that knows the first block of the step to fetch
  // The run that this lane copies, if it does: of which block of the step, its bytes, where it is there and in the slot.
  bool copies_;
  int block_, run_bytes_, from_, to_;
  int slot_ = 0, parity_ = 0, fill_slot_ = 0;
};

// What a step that only decodes does to queries and keys before it attends.
template <typename scalar_t>
struct Rope {
  const float* cos_sin;    // [positions, rotary_dim]: cosines, then sines; null: all that is done already
  const scalar_t* q_norm;  // [head_dim], or null: no norms
  const scalar_t* k_norm;  // the same
  int rotary_dim;
  float eps;
};

// How a thread block norms and rotates an item's queries and, where it has one, the newest key, and passes on the newest
// value; a thread has a share of one head after another.
template <typename scalar_t, int kHeadDim, int kNumThreads>
struct HeadRotation {
  using Share = HeadShare<scalar_t, kHeadDim>;
  static constexpr int kQueryRow = kHeadDim + 8;  // elements; the 8 extra ones keep reading free of bank conflicts
  static_assert(4 * kNumThreads >= kHeadDim, "a vector a thread is enough");

  // In shared memory; twin in paged_decode_sm90.py.
  struct Memory {
    float cos_sin[kHeadDim];       // the position's row
    scalar_t norms[2][kHeadDim];   // of queries and keys
    scalar_t newest[2][kHeadDim];  // key and value
    // and after it the queries, [8 * kHeadTiles][kQueryRow]
    __device__ __forceinline__ scalar_t* queries() { return reinterpret_cast<scalar_t*>(this + 1); }
  };

  // Ask for what no kernel writes, for a token at `position`. Its row may have left L2 since it was last read: all
  // weights go through there.
  static __device__ __forceinline__ void prepare(Memory& memory, const Rope<scalar_t>& rope, int position) {
    const int i = 4 * threadIdx.x, j = 8 * threadIdx.x;
    if (i < rope.rotary_dim) cp_async_16(memory.cos_sin + i, rope.cos_sin + (long long)position * rope.rotary_dim + i);
    if (rope.q_norm != nullptr && j < 2 * kHeadDim)
      cp_async_16(memory.norms[0] + j, j < kHeadDim ? rope.q_norm + j : rope.k_norm + j - kHeadDim);
    cp_async_commit_group();
  }

  // All threads call it, after prepare. query: the first one's head, the others follow; key: its head, or null.
  static __device__ __forceinline__ void run(Memory& memory, const Rope<scalar_t>& rope, const scalar_t* query,
                                             const scalar_t* key, const scalar_t* value, int num_queries) {
    const int count = num_queries + (key != nullptr ? 2 : 0);
#pragma unroll 1
    for (int first = 0; first < count; first += kNumThreads / Share::kLanes) {
      const int index = first + threadIdx.x / Share::kLanes;
      const bool is_query = index < num_queries, is_value = index > num_queries;
      Share share(rope.rotary_dim);
      if (index < count) share.load(is_query ? query + index * kHeadDim : is_value ? value : key);
      if (first == 0) {
        cp_async_wait_group<0>();
        __syncthreads();  // everybody's part of what was prepared is there
      }
      if (rope.q_norm != nullptr) {
        share.load_weight(memory.norms[!is_query]);
        share.norm(rope.eps, !is_value);
      }
      if (index >= count || !share.exists) continue;
      if (!is_value) {
        share.load_rotation(memory.cos_sin, rope.rotary_dim);
        share.rotate();
      }
      scalar_t* place = is_query ? memory.queries() + index * kQueryRow : memory.newest[is_value];
      store_float8(place + share.first, share.a);
      store_float8(place + share.second, share.b);
    }
    __syncthreads();
  }
};

// A warp puts the newest key or value [kHeadDim] into row `row` of a step [..][16, kHeadDim] that the copy engine has
// brought, and into the cache: row `block_row` of the block. Others see it, and the copy engine may write to the step
// again, after a fence and a barrier.
template <int kHeadDim, typename scalar_t>
__device__ __forceinline__ void put_row(scalar_t* step, int row, scalar_t* block, int block_row, int block_size,
                                        const scalar_t* from) {
  const int chunk = threadIdx.x % kWarpSize;
  if (chunk < kHeadDim / 8) {
    const Vec<scalar_t> part = load_vec(from + chunk * 8);
    store_vec(step + row / 16 * 16 * kHeadDim + chunk_offset<kHeadDim>(row % 16, chunk, 16), part);
    store_vec(block + chunk_offset<kHeadDim>(block_row, chunk, block_size), part);
  }
}

// What kParts warps have found of a head, merged by a warp: lane l gets columns kColumns * l ..+kColumns-1. Every lane
// looks at all states: that takes less time than asking each other.
template <int kParts, int kColumns>
__device__ __forceinline__ SoftmaxState merge_warps(float (&out)[kColumns], const SoftmaxState* states,
                                                    const float* outs, int out_stride) {
  struct alignas(4 * kColumns) Columns {
    float data[kColumns];
  };
  const int lane = threadIdx.x % kWarpSize;
  SoftmaxState parts[kParts], merged;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    parts[p] = states[p];
    merged.max = fmaxf(merged.max, parts[p].max);
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) out[i] = 0.f;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const auto part = *reinterpret_cast<const Columns*>(outs + p * out_stride + lane * kColumns);
    const float factor = ex2_approx_ftz(parts[p].max - merged.base());
    merged.sum += factor * parts[p].sum;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] += factor * part.data[i];
  }
  return merged;
}

// Round columns * factor and store them.
template <typename scalar_t, int kColumns>
__device__ __forceinline__ void store_columns(scalar_t* out, const float (&columns)[kColumns], float factor) {
  struct alignas(2 * kColumns) Pairs {
    unsigned data[kColumns / 2];
  } pairs;
#pragma unroll
  for (int i = 0; i < kColumns; i += 2)
    pairs.data[i / 2] = pack_pair<scalar_t>(columns[i] * factor, columns[i + 1] * factor);
  *reinterpret_cast<Pairs*>(out) = pairs;
}

// grid (thread blocks that the GPU holds at a time, or items that there may be, if these are fewer), kWarps * 32 threads
template <typename scalar_t,  // __half or __nv_bfloat16: q, cache, out
          int kHeadDim,       // dimensions of a head: 64 or 128
          int kHeadTiles,     // 8 query heads each, of an item
          int kKeyTiles,      // 16 keys each, of a warp's step
          int kWarps,         // warps a thread block
          int kSlots>         // keys or values of a step in a warp's ring
__global__ void __launch_bounds__(kWarps * kWarpSize, 2)  // as many as have room for their rings
paged_decode_sm90(scalar_t* __restrict__ out,            // [num_seqs, num_heads, kHeadDim]
                  // [num_seqs, num_heads + 2 * num_kv_heads, kHeadDim]; queries are read, with rope keys and values, too
                  const scalar_t* __restrict__ qkv,
                  const int* __restrict__ block_tables,  // [num_seqs, max_blocks]
                  const int* __restrict__ seq_lens,      // [num_seqs]
                  float* partial_outs,                   // [num_seqs, num_heads, num_splits, kHeadDim] scratch
                  SoftmaxState* partial_states,          // [num_seqs, num_heads, num_splits] scratch
                  PagedKV kv, int num_heads, int max_blocks, int block_shift, int max_splits, int window,
                  float scale,  // sm_scale * log2(e)
                  int num_seqs,
                  int num_splits,          // that the longest sequence may have
                  const float* cos_sin,    // these five: a Rope
                  const scalar_t* q_norm,
                  const scalar_t* k_norm,
                  int rotary_dim, float eps) {
  using Stream = StepStream<scalar_t, kHeadDim, kKeyTiles, kWarps, kSlots>;
  using Rotation = HeadRotation<scalar_t, kHeadDim, kWarps * kWarpSize>;
  constexpr int kHeads = 8 * kHeadTiles;
  constexpr int kColumns = kHeadDim / kWarpSize;         // of a lane that merges a head
  constexpr int kPartsSize = kWarps * kHeadDim + 4;      // floats; the 4 extra ones spread the heads over the banks
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int group = num_heads / kv.num_kv_heads;
  const int row_tiles = ceil_div(group, kHeads);

  DYNAMIC_SHARED(shared);
  scalar_t* ring = reinterpret_cast<scalar_t*>(shared);                                    // [kWarps][kSlots][kSlotSize]
  float* part_outs = reinterpret_cast<float*>(ring + kWarps * kSlots * Stream::kSlotSize);  // [head][part][kHeadDim]
  auto* part_states = reinterpret_cast<SoftmaxState*>(part_outs + kWarps * kPartsSize);     // [head][part]
  auto& rotation = *reinterpret_cast<typename Rotation::Memory*>(part_states + kWarps * kWarps);
  auto* full = reinterpret_cast<unsigned long long*>(rotation.queries() + kHeads * Rotation::kQueryRow) + warp * kSlots;
  if (lane == 0) {
    for (int i = 0; i < kSlots; ++i) mbarrier_init(full + i, 1);
    mbarrier_init_fence();
  }
  __syncwarp();

  const Rope<scalar_t> rope{cos_sin, q_norm, k_norm, rotary_dim, eps};
  const bool ropes = cos_sin != nullptr;
  const int block_size = 1 << block_shift;

  // Lengths, block tables and slabs are written by no kernel, but by copies that all launches wait for.
  Items items(seq_lens, num_seqs, kv.num_kv_heads * row_tiles, window, max_splits);
  // Of the item that was found:
  int begin, end, kv_head, first_head, num_item_heads;
  int newest_key;          // -1 where the item has none, or it needs no rotation
  scalar_t* newest_block;  // its keys
  auto find_item = [&](int index) {
    if (!items.find(index)) return false;
    begin = items.splits.begin(items.split), end = items.splits.end(items.split);
    kv_head = items.head_tile / row_tiles;
    first_head = kv_head * group + items.head_tile % row_tiles * kHeads;
    num_item_heads = min(kHeads, (kv_head + 1) * group - first_head);
    newest_key = -1, newest_block = nullptr;
    if (!ropes) return true;
    const int last_key = items.splits.seq_len - 1;  // -1 in padding, whose result nobody reads
    Rotation::prepare(rotation, rope, max(0, last_key));
    if (items.split == items.splits.count - 1) {
      newest_key = last_key;
      const int block = block_tables[(long long)items.seq * max_blocks + (last_key >> block_shift)];
      newest_block = kv.block<scalar_t, kHeadDim>(kv.k_offset, block, kv_head, block_size);
    }
    return true;
  };

  int item = blockIdx.x;
  items.find(item);  // for the stream, too
  const Source source{kv, block_tables, max_blocks, block_shift, row_tiles};
  Stream stream(ring + warp * kSlots * Stream::kSlotSize, full, source, items);
  bool found = find_item(item);
  if (!ropes) griddepcontrol_wait();
  stream.start();
  if (ropes) griddepcontrol_wait();
  griddepcontrol_launch_dependents();

  for (; found; found = find_item(item += gridDim.x)) {
    KeyAttention<scalar_t, kHeadDim, kKeyTiles, kHeadTiles> attention;
    const scalar_t* heads = qkv + (long long)items.seq * (num_heads + 2 * kv.num_kv_heads) * kHeadDim;
    if (ropes) {
      const scalar_t* key = heads + (num_heads + kv_head) * kHeadDim;
      Rotation::run(rotation, rope, heads + first_head * kHeadDim, newest_key < 0 ? nullptr : key,
                    key + kv.num_kv_heads * kHeadDim, num_item_heads);
      attention.load(rotation.queries(), Rotation::kQueryRow, num_item_heads);
    } else {
      attention.load(heads + first_head * kHeadDim, kHeadDim, num_item_heads);
    }
    for (WarpSteps<Stream::kKeys, kWarps> steps(begin, end); steps.next < steps.end; steps.next += kWarps) {
      const int first_key = steps.next * Stream::kKeys;
      const bool whole = first_key >= begin && first_key + Stream::kKeys <= end;
      const bool has_newest = newest_key >= first_key && newest_key < first_key + Stream::kKeys;
      scalar_t* keys = stream.next();
      auto put_newest = [&](scalar_t* step, scalar_t* block, const scalar_t* from) {
        put_row<kHeadDim>(step, newest_key - first_key, block, newest_key & (block_size - 1), block_size, from);
      };
      if (has_newest) {
        put_newest(keys, newest_block, rotation.newest[0]);
        fence_proxy_async();
        __syncwarp();
      }
      attention.score(keys);
      stream.release_keys();
      if (!whole) attention.mask(first_key, begin, end);
      attention.softmax(scale);
      scalar_t* values = stream.next();
      if (has_newest) put_newest(values, newest_block + (kv.v_offset - kv.k_offset), rotation.newest[1]);
      if (!whole) {
        // Slots without a key may hold NaN, and NaN times a weight of 0 is NaN.
        auto clear = [&](int first, int last) {  // rows of the step
          constexpr int kChunks = kHeadDim / 8;
#pragma unroll 1
          for (int row = first + lane / kChunks; row < last; row += kWarpSize / kChunks)
            store_vec(values + row / 16 * 16 * kHeadDim + chunk_offset<kHeadDim>(row % 16, lane % kChunks, 16),
                      Vec<scalar_t>{});
        };
        clear(0, begin - first_key);
        clear(max(0, end - first_key), Stream::kKeys);
      }
      if (has_newest || !whole) {
        fence_proxy_async();  // before the copy engine writes there again
        __syncwarp();
      }
      attention.weigh(values);
      stream.release_values();
    }
    attention.finish();

    const bool alone = items.splits.count <= 1;
    const long long first_out = (long long)items.seq * num_heads + first_head;  // row of [num_seqs, num_heads]
    for (int first = 0; first < num_item_heads; first += kWarps) {
      __syncthreads();  // the last heads have been read
#pragma unroll
      for (int h = 0; h < kHeadTiles; ++h)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int head = 8 * h + lane % 4 * 2 + j - first;
          if (head < 0 || head >= kWarps) continue;
          if (lane / 4 == 0) part_states[head * kWarps + warp] = attention.state[h][j];
          float* part_out = part_outs + head * kPartsSize + warp * kHeadDim + lane / 4;
#pragma unroll
          for (int i = 0; i < kHeadDim / 8; ++i) part_out[8 * i] = attention.out[h][i / 2][i % 2 * 2 + j];
        }
      __syncthreads();
      const int head = first + warp;
      if (head >= num_item_heads) continue;
      float columns[kColumns];
      const SoftmaxState state =
          merge_warps<kWarps>(columns, part_states + warp * kWarps, part_outs + warp * kPartsSize, kHeadDim);
      if (alone) {
        store_columns(out + (first_out + head) * kHeadDim + lane * kColumns, columns, state.inverse_sum());
      } else {
        const long long part = (first_out + head) * num_splits + items.split;
#pragma unroll
        for (int i = 0; i < kColumns; i += 2)
          *reinterpret_cast<float2*>(partial_outs + part * kHeadDim + lane * kColumns + i) =
              make_float2(columns[i], columns[i + 1]);
        if (lane == 0) partial_states[part] = state;
      }
    }
  }
}

// The splits of each sequence that has several, merged.
// grid (num_seqs, ceil(num_heads / kWarps)), kWarps * 32 threads
template <typename scalar_t,  // __half or __nv_bfloat16: out
          int kHeadDim,       // dimensions of a head
          int kWarps>         // warps a thread block, each with a head
__global__ void __launch_bounds__(kWarps * kWarpSize)
merge_splits(scalar_t* __restrict__ out,                          // [num_seqs, num_heads, kHeadDim]
             const int* __restrict__ seq_lens,                    // [num_seqs]
             const float* __restrict__ partial_outs,              // [num_seqs, num_heads, num_splits, kHeadDim]
             const SoftmaxState* __restrict__ partial_states,     // [num_seqs, num_heads, num_splits]
             int num_heads, int num_splits, int max_splits, int window) {
  constexpr int kColumns = kHeadDim / kWarpSize;
  const Splits splits(seq_lens[blockIdx.x], window, max_splits, kFewSplits);
  // The kernel after this one may begin when this one does: it, too, waits for what it doesn't know to be there.
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int head = blockIdx.y * kWarps + threadIdx.x / kWarpSize;
  if (splits.count <= 1 || head >= num_heads) return;
  const long long row = (long long)blockIdx.x * num_heads + head;
  float columns[kColumns];
  const SoftmaxState state = merge_row<16>(columns, partial_states + row * num_splits,
                                           partial_outs + row * num_splits * kHeadDim, kHeadDim, splits.count);
  store_columns(out + row * kHeadDim + threadIdx.x % kWarpSize * kColumns, columns, state.inverse_sum());
}
