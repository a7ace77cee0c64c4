// cases.cu: small kernels that try the host build: first what must work, then what must be found.
#include "common.cuh"
#include "divisor.cuh"
#include "ptx_sm90.cuh"

// -- what must work -----------------------------------------------------------------------------------------

// out[0..3][lane]: the four shuffles of 100 + lane, in segments of kWidth lanes.
template <int kWidth>
__global__ void shuffles(int* out, int operand) {
  const int lane = threadIdx.x, value = 100 + lane;
  out[lane] = __shfl_sync(kFullMask, value, operand, kWidth);
  out[32 + lane] = __shfl_xor_sync(kFullMask, value, operand, kWidth);
  out[64 + lane] = __shfl_up_sync(kFullMask, value, operand, kWidth);
  out[96 + lane] = __shfl_down_sync(kFullMask, value, operand, kWidth);
}

// Each half of the warp by itself; 2-, 4- and 8-byte values.
__global__ void shuffle_halves(__half* halves, long long* wide) {
  const int lane = threadIdx.x;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16) {
    halves[lane] = __shfl_xor_sync(mask, __half(float(lane)), 15);
  } else {
    wide[lane - 16] = __shfl_sync(mask, lane * 10000000000ll, 16);
  }
}

__global__ void votes(unsigned* out, const int* predicate) {
  const int yes = predicate[threadIdx.x];
  const unsigned mask = threadIdx.x < 8 ? 0xffu : 0xffffff00u;
  unsigned* row = out + threadIdx.x * 4;
  row[0] = __ballot_sync(kFullMask, yes);
  row[1] = __any_sync(mask, yes);
  row[2] = __all_sync(mask, yes);
  row[3] = __reduce_add_sync(mask, threadIdx.x);
}

__global__ void barrier_reductions(int* out, const int* predicate) {
  const int yes = predicate[threadIdx.x];
  int* row = out + threadIdx.x * 3;
  row[0] = __syncthreads_or(yes);
  row[1] = __syncthreads_and(yes);
  row[2] = __syncthreads_count(yes);
}

// out[i] = sum of x over the thread block, through static and then through dynamic shared memory.
template <int kNumWarps>
__global__ void block_sums(float* out, const float* x) {
  DYNAMIC_SHARED(memory);
  __shared__ float scratch[kNumWarps];
  float* values = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  values[i] = block_sum<kNumWarps>(x[i], scratch);
  __syncthreads();
  out[i] = values[blockDim.x - 1 - i];
}

// d [16, 8] += a [16, 16] * b [16, 8], fragments gathered element by element as the PTX manual lists them.
template <typename T>
__global__ void mma(float* d, const T* a, const T* b) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  T a_parts[8], b_parts[4];
  for (int i = 0; i < 8; ++i) {
    const int row = group + (i & 2 ? 8 : 0), column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    a_parts[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) b_parts[i] = b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
  unsigned ra[4], rb[2];
  memcpy(ra, a_parts, 16);
  memcpy(rb, b_parts, 8);
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = d[(group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + (i & 1)];
  mma_m16n8k16<T>(c, ra, rb[0], rb[1]);
  for (int i = 0; i < 4; ++i) d[(group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + (i & 1)] = c[i];
}

// d [16, 8] = a [16, 16] * b, both through shared memory and ldmatrix: b [16 (k), 8 (n)] transposed on the way in, or
// bt [8 (n), 16 (k)] as it lies there.
template <typename T, bool kTransposed>
__global__ void ldmatrix_mma(float* d, const T* a, const T* b) {
  __shared__ __align__(16) T a_tile[16 * 16];
  __shared__ __align__(16) T b_tile[16 * 16];  // only half is used: the other two matrices repeat the first two
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a_tile[i] = a[i];
  for (int i = lane; i < 128; i += 32) b_tile[i] = b[i];
  __syncwarp();
  unsigned ra[4], rb[4];
  ldmatrix_x4(ra, a_tile + lane % 16 * 16 + lane / 16 * 8);
  if (kTransposed)
    ldmatrix_x4_trans(rb, b_tile + lane % 16 * 8);
  else
    ldmatrix_x4(rb, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
  float c[4] = {0, 0, 0, 0};
  mma_m16n8k16<T>(c, ra, rb[0], rb[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

// out = x^T, both [8, 8] of 16-bit elements.
__global__ void transpose(unsigned short* out, const unsigned short* x) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  const unsigned pair = x[row * 8 + column] | unsigned(x[row * 8 + column + 1]) << 16;
  const unsigned transposed = movmatrix_trans(pair);
  out[row * 8 + column] = (unsigned short)transposed;
  out[row * 8 + column + 1] = (unsigned short)(transposed >> 16);
}

// out = x + 1, kStages tiles of 32 * 4 floats under way at a time; the wait leaves kPending groups in flight (right:
// kStages - 1), and kBarriers tells whether a tile is protected from the copy that reuses its place.
template <int kStages, int kPending, bool kBarriers>
__global__ void pipeline(float* out, const float* x, int num_tiles, int num_elements) {
  __shared__ __align__(16) float tiles[kStages][128];
  const int i = threadIdx.x, neighbour = (i + 1) % 32;
  for (int tile = 0; tile < kStages; ++tile) {
    const int first = tile * 128 + i * 4;
    if (tile < num_tiles) cp_async_16(&tiles[tile][i * 4], x + first, first < num_elements);
    cp_async_commit_group();
  }
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait_group<kPending>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) out[tile * 128 + neighbour * 4 + j] = tiles[tile % kStages][neighbour * 4 + j] + 1;
    if (kBarriers) __syncthreads();
    const int first = (tile + kStages) * 128 + i * 4;
    if (tile + kStages < num_tiles) cp_async_16(&tiles[tile % kStages][i * 4], x + first, first < num_elements);
    cp_async_commit_group();
  }
}

// d [64, 128] = a [64, k] * b [128, k]^T for k of 64 at most: boxes by the copy engine, product of a warpgroup.
template <typename T>
__global__ void tensor_product(float* d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b) {
  DYNAMIC_SHARED(memory);
  T* tiles = reinterpret_cast<T*>(memory + (1024 - shared_address(memory) % 1024) % 1024);  // [64 + 128, 64]
  auto* full = reinterpret_cast<unsigned long long*>(tiles + 192 * 64);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect_tx(full, 192 * 128);
    tensor_copy(tiles, a, 0, 0, full);
    tensor_copy(tiles + 64 * 64, b, 0, 0, full);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  float sum[64] = {};
  wgmma_fence();
  for (int part = 0; part < 4; ++part)
    wgmma_ss<T>(sum, wgmma_descriptor(tiles) + 2 * part, wgmma_descriptor(tiles + 64 * 64) + 2 * part);
  wgmma_commit_group();
  wgmma_wait_group<0>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 64; ++i)
    d[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

enum class EngineFault { kNone, kNoWait, kNoWaitForEmpty, kArrivesEarly, kNeverReads, kBytesMissing };

// out = x + 1 in tiles of 64 floats: the first warp has them brought into a ring of two, the second takes them out.
template <EngineFault kFault>
__global__ void engine_ring(float* out, const float* x, int num_tiles) {
  DYNAMIC_SHARED(memory);
  float* ring = reinterpret_cast<float*>(memory);                      // [2][64]
  auto* full = reinterpret_cast<unsigned long long*>(ring + 2 * 64);  // [2]
  auto* empty = full + 2;                                             // [2]
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int slot = tile % 2, round = tile / 2;
    if (threadIdx.x == 0) {
      if (tile >= 2 && kFault != EngineFault::kNoWaitForEmpty) mbarrier_wait(empty + slot, (round - 1) % 2);
      mbarrier_arrive_expect_tx(full + slot, kFault == EngineFault::kBytesMissing ? 512 : 256);
      bulk_copy(ring + slot * 64, x + tile * 64, 256, full + slot);
    } else if (threadIdx.x >= 32 && kFault != EngineFault::kNeverReads) {
      if (kFault != EngineFault::kNoWait) mbarrier_wait(full + slot, round % 2);
      if (kFault == EngineFault::kArrivesEarly && lane == 0) mbarrier_arrive(empty + slot);
      for (int i = lane; i < 64; i += 32) out[tile * 64 + i] = ring[slot * 64 + i] + 1;
      __syncwarp();
      if (kFault != EngineFault::kArrivesEarly && lane == 0) mbarrier_arrive(empty + slot);
    }
  }
}

enum class TurnFault { kNone, kNoPass, kNoEnd, kOtherCount };

// Two warps write down their numbers in turn, the first one first.
template <TurnFault kFault>
__global__ void warp_turns(int* out, int* count, int num_turns) {
  const int warp = threadIdx.x / 32;
  if (warp == 1) bar_arrive(1, 64);
  for (int turn = 0; turn < num_turns; ++turn) {
    bar_sync(1 + warp, 64);
    if (threadIdx.x % 32 == 0) out[(*count)++] = warp;
    if (kFault != TurnFault::kNoPass || warp == 1) bar_arrive(2 - warp, kFault == TurnFault::kOtherCount ? 96 : 64);
  }
  if (warp == 0 && kFault != TurnFault::kNoEnd) bar_sync(1, 64);
}

enum class MeetingFault { kNone, kNotBeforeReads, kNotBeforeWrites };

// The first two of three warps shift num_rows rows of 64 numbers by one, through shared memory.
template <MeetingFault kFault>
__global__ void shift_rows(int* out, const int* x, int num_rows) {
  __shared__ int row[64];
  const int i = threadIdx.x;
  if (i >= 64) return;
  for (int first = 0; first < 64 * num_rows; first += 64) {
    row[i] = x[first + i];
    if (kFault != MeetingFault::kNotBeforeReads) bar_sync(1, 64);
    out[first + i] = row[(i + 1) % 64];
    if (kFault != MeetingFault::kNotBeforeWrites) bar_sync(1, 64);
  }
}

// out[i] = x[i] / divisor, out[n + i] = x[i] % divisor
__global__ void divide(int* out, const int* x, Divisor divisor, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] / divisor, out[n + i] = x[i] % divisor;
}

// What a cp.async reads when: the source changes between issue and wait, and the destination is looked at last.
__global__ void late_copy(float* out, float* x) {
  __shared__ __align__(16) float tile[4];
  cp_async_16(tile, x);
  cp_async_commit_group();
  x[0] = 7;
  cp_async_wait_group<0>();
  out[0] = tile[0];
}

template <typename T>
__global__ void to_floats(float* out, const T* x) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = to_float(x[i]);
}

template <typename T>
__global__ void from_floats(T* out, const float* x) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = from_float<T>(x[i]);
}

template <typename T>
__global__ void arithmetic(T* out, const T* x, const T* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  T* row = out + i * 4;
  row[0] = x[i] + y[i];
  row[1] = x[i] - y[i];
  row[2] = x[i] * y[i];
  row[3] = x[i] / y[i];
}

__global__ void integer_intrinsics(unsigned long long* out, unsigned a, unsigned b, unsigned long long c,
                                   unsigned long long d) {
  out[0] = __umulhi(a, b);
  out[1] = __umul64hi(c, d);
  out[2] = __popc(a);
  out[3] = __clz(int(a));
  out[4] = __ffs(int(a));
  out[5] = __brev(a);
  out[6] = __float2uint_rn(-3.f) + __float2uint_rn(5e9f);
  out[7] = (unsigned)__float2int_rz(-2.9f);
  out[8] = __float2int_rn(2.5f);
  out[9] = min(-1, 1u);  // the unsigned overload, as in CUDA
}

// tickets[block] = how many thread blocks have run before; warps[w] = how many warps of the first block to run.
__global__ void order(int* tickets, int* warps, int* counter) {
  __shared__ int ticket;
  if (threadIdx.x == 0) tickets[blockIdx.x] = ticket = atomicAdd(counter, 1);
  __syncthreads();
  if (ticket == 0 && threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = atomicAdd(counter + 1, 1);
}

// -- what must be found -------------------------------------------------------------------------------------

enum class Fault {
  kNone,
  kNoBarrier,          // reads what another warp wrote
  kNoSyncwarp,         // reads what another lane wrote
  kShuffleOrders,      // relies on a shuffle to order memory
  kOverwrite,          // writes what another warp reads
  kBothWrite,
  kBarrierInBranch,
  kBarrierAfterExit,
  kTwoBarriers,        // the warps wait in different ones
  kShuffleInBranch,
  kShuffleAfterExit,
  kNotInMask,
  kSourceNotInMask,
  kSyncwarpInBranch,
  kMmaInBranch,
  kReadPastEnd,
  kReadBeforeStart,
  kWritePastEnd,
  kWriteConst,
  kDynamicPastEnd,
  kStaticPastEnd,
  kLocalPastEnd,
  kCopyPastEnd,
  kCopyMisaligned,
  kMisaligned,
  kNullPointer,
  kOverflow,
  kShift,
  kAtomicPastEnd,
  kWild,
};

__device__ int next_of(int i) { return i + 1; }

// out [64], x [64] floats, two warps, dynamic shared memory of 64 floats.
template <Fault kFault>
__global__ void faulty(float* out, const float* x, int n, unsigned long long address) {
  DYNAMIC_SHARED(memory);
  __shared__ __align__(16) float tile[64];
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, warp = i / 32, last = n - 1;
  if (kFault == Fault::kNone || kFault == Fault::kNoBarrier) {
    tile[i] = x[i];
    if (kFault == Fault::kNone) __syncthreads();
    out[i] = tile[last - i];
  }
  if (kFault == Fault::kNoSyncwarp || kFault == Fault::kShuffleOrders) {
    tile[i] = x[i];
    if (kFault == Fault::kShuffleOrders) __shfl_sync(kFullMask, i, 0);
    out[i] = tile[i ^ 1];
  }
  if (kFault == Fault::kOverwrite) {
    tile[i] = x[i];
    __syncthreads();
    out[i] = tile[last - i];
    tile[i] = 0;
  }
  if (kFault == Fault::kBothWrite) tile[i % 32] = x[i];
  if (kFault == Fault::kBarrierInBranch && warp == 0) __syncthreads();
  if (kFault == Fault::kBarrierAfterExit) {
    if (warp == 1) return;
    __syncthreads();
  }
  if (kFault == Fault::kTwoBarriers) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (kFault == Fault::kShuffleInBranch && i % 2 == 0) out[i] = __shfl_xor_sync(kFullMask, x[i], 2);
  if (kFault == Fault::kShuffleAfterExit) {
    if (i == 5) return;
    out[i] = warp_sum(x[i]);
  }
  if (kFault == Fault::kNotInMask) out[i] = __shfl_sync(0x7fffffffu, x[i], 0);
  if (kFault == Fault::kSourceNotInMask && i % 32 < 16) out[i] = __shfl_sync(0x0000ffffu, x[i], 20);
  if (kFault == Fault::kSyncwarpInBranch && i % 32 < 16) __syncwarp();
  if (kFault == Fault::kMmaInBranch && i % 32 < 31) {
    float d[4] = {};
    const unsigned a[4] = {};
    mma_m16n8k16<__half>(d, a, 0, 0);
    out[i] = d[0];
  }
  if (kFault == Fault::kReadPastEnd) out[i] = x[next_of(i)];
  if (kFault == Fault::kReadBeforeStart) out[i] = x[i - 1];
  if (kFault == Fault::kWritePastEnd) out[next_of(i)] = x[i];
  if (kFault == Fault::kWriteConst) const_cast<float*>(x)[i] = 0;
  if (kFault == Fault::kDynamicPastEnd) shared[next_of(i)] = x[i];
  if (kFault == Fault::kStaticPastEnd) tile[next_of(i)] = x[i];
  if (kFault == Fault::kLocalPastEnd) {
    float local[8] = {};
    out[i] = local[i % 8 + n / 64];
  }
  if (kFault == Fault::kCopyPastEnd) cp_async_16(tile + i * 4 % 64, x + i * 4);
  if (kFault == Fault::kCopyMisaligned) cp_async_16(tile + i / 2 * 4, x + 1);
  if (kFault == Fault::kMisaligned) out[i] = reinterpret_cast<const Vec<float>*>(x + 1)->data[0];
  if (kFault == Fault::kNullPointer) out[i] = *reinterpret_cast<const float*>(address & 0);
  if (kFault == Fault::kOverflow) out[i] = float(n * 50000000);
  if (kFault == Fault::kShift) out[i] = float(1 << (n / 2));
  if (kFault == Fault::kAtomicPastEnd) atomicAdd(out + n, 1.f);
  if (kFault == Fault::kWild) out[i] = *reinterpret_cast<const float*>(address);
}

// Static shared memory, dynamic shared memory and a local variable, of which nobody has written to any.
__global__ void uninitialised(float* out, int n) {
  DYNAMIC_SHARED(memory);
  __shared__ float scratch[8];
  if (n < 0) scratch[-n] = out[0];
  float sum;
  for (int i = 0; i < n; ++i) sum += out[i];
  out[0] = scratch[0];
  out[1] = reinterpret_cast<float*>(memory)[0];
  out[2] = sum;
}

struct Pair {
  float first, second;
};
__global__ void takes_everything(float* out, const __half* x, int i, long long l, float f, Pair pair, const void* any) {
  out[0] = (any ? 1 : 0) + float(x[0]) + i + float(l) + f + pair.first + pair.second;
}
