// linear_sm90.cu: what linear.cu computes, on Hopper's warpgroup products
//
// Tiling:   a thread block computes tiles of 128 tokens x kTileN outputs, one after the other (as many thread blocks as
//           SMs). Of its first warpgroup one thread fetches x and another weight, by the copy engine, in steps of 64
//           elements of k (128 bytes a row) through a ring of kStages stages in shared memory. The two other warpgroups
//           multiply 64 tokens each, by wgmma, whose operands both come from the ring. The next tile's first stages are
//           fetched while the last one's sums are stored, and the launch's first ones, of weight, while the kernel
//           before this one ends. Of a tile that m cuts off only kLastRows rows at a time are fetched, as far as there
//           are any: with 127 of 128 rows past m, tiles fetched whole took up to twice as long as full ones.
// Splits:   where there are fewer tiles than SMs, the thread blocks of a cluster share a tile's k, at places that depend
//           on k and their number alone. At the end each takes a part of the tile's columns, gets the sums of the others
//           for it through their shared memory, and stores it.
// Barriers: full[s] completes when both operands of stage s have come; empty[s] when all multiplying warps are done with
//           them.
// Numerics: as in linear.cu, with wgmma's sums in place of mma's: one chain of them an element and split, in the order
//           of k, then the splits in their order. The value doesn't depend on m, n, kTileN, or its place in the tile.
// Bound:    flops, 2*m*n*k: a step of 128 x 256 x 64 takes 1,024 clocks of the tensor cores and draws 48 KB from L2.
//           An H200, 2,048 x 4,096 x 4,096: 90 us; without waiting for the copies 82, without the products 67. Sending a
//           weight tile to two thread blocks of a cluster at once (multicast), and walking other groups of tiles, made
//           nothing faster. Measured: 0.94 to 1.0 times cuBLAS from 2,048 rows on; docs/performance.md.
#include "common.cuh"
#include "linear_epilogue.cuh"
#include "linear_tile.cuh"
#include "ptx_sm90.cuh"
#include "ring.cuh"

constexpr int kTileM = 128;
constexpr int kGroup = 128;             // threads of a warpgroup
constexpr int kConsumers = 2;           // warpgroups that multiply, 64 tokens each
constexpr int kWarps = 4 * kConsumers;  // that multiply, 16 tokens each
constexpr int kLastRows = 16;           // of x in a box for a tile that m cuts off
constexpr int kStagedVecs = 16;         // vectors in a row of results on its way through shared memory

// A wgmma descriptor of what lies 16 * `by` bytes on; only its lower half changes.
__device__ __forceinline__ unsigned long long moved(unsigned long long descriptor, int by) {
  return descriptor & 0xffffffff00000000ull | unsigned(descriptor) + unsigned(by);
}

// Where vector v of row r lies among a warp's rows of results: lanes that write pairs of eight rows meet every bank once.
template <typename out_t>
__device__ __forceinline__ int staged_place(int row, int vector) {
  return row * kStagedVecs + (vector ^ row * int(sizeof(out_t) / 2) % 8);
}

// Two neighbours in a row as one store; p at a multiple of its size.
__device__ __forceinline__ void store_pair(float* p, float a, float b) { *reinterpret_cast<Pair*>(p) = {a, b}; }
__device__ __forceinline__ void store_pair(__half* p, float a, float b) {
  *reinterpret_cast<__half2*>(p) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* p, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(a, b);
}

// A warp stores 16 rows of staged results, to which if asked for what out holds is added. The first is that of row
// first_row and column first_column of out; the last column that is stored is end_column - 1.
template <typename out_t>
__device__ __forceinline__ void store_rows(out_t* out,  // [num_rows, num_columns]
                                           const Vec<out_t>* staged, int lane, int first_row, int num_rows,
                                           int first_column, int end_column, int num_columns, bool accumulate) {
  constexpr int kVec = Vec<out_t>::kSize;
  constexpr int kCount = 16 * kStagedVecs / kWarpSize;  // vectors of a lane, in every second row
  const int column = first_column + lane % kStagedVecs * kVec;
  const int row = first_row + lane / kStagedVecs;
  Vec<out_t> results[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    results[i] = staged[staged_place<out_t>(lane / kStagedVecs + 2 * i, lane % kStagedVecs)];
  if (column >= end_column) return;
  out_t* place = out + (long long)row * num_columns + column;
  const long long stride = 2ll * num_columns;
  if (num_columns % kVec == 0) {
    if constexpr (sizeof(out_t) == sizeof(float)) {
      if (accumulate) {  // in L2: nobody waits for what out holds
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (row + 2 * i < num_rows) reduce_add(place + i * stride, results[i].data);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (row + 2 * i < num_rows) store_vec(place + i * stride, results[i]);
  } else {  // rows of out don't start at multiples of 16 bytes
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (row + 2 * i >= num_rows || column + e >= end_column) continue;
        out_t* single = place + i * stride + e;
        *single = accumulate ? from_float<out_t>(to_float(results[i].data[e]) + to_float(*single)) : results[i].data[e];
      }
  }
}

// Grid: thread blocks of 3 warpgroups: any number, of which as many as SMs is best; with splits, one cluster a tile.
// PRECOND: k % 8 == 0, out starts at a multiple of 16 bytes, kSplits <= ceil(k / 64).
template <typename scalar_t,  // storage type of x, weight and bias
          typename out_t,     // of out: scalar_t or float
          int kTileN,         // outputs in a tile
          int kStages,        // stages in the ring
          int kSplits>        // of k: thread blocks in a cluster, on a GPU
__global__ void __cluster_dims__(kSplits, 1, 1) __launch_bounds__((1 + kConsumers) * kGroup, 1)
linear_sm90(out_t* __restrict__ out,                   // [m, n], with kSiluAndMul [m, n / 2]
            const __grid_constant__ TensorMap x,       // [m, k], boxes of kTileM rows
            const __grid_constant__ TensorMap last_x,  // the same, boxes of kLastRows rows
            const __grid_constant__ TensorMap weight,  // [n, k], boxes of kTileN rows
            const scalar_t* __restrict__ bias,         // [n], or null; null with kSiluAndMul
            int m, int n, int k,
            int epilogue) {  // an Epilogue
  constexpr int kStageElements = (kTileM + kTileN) * kTileK;
  constexpr int kPartSums = kTileN / 2 / kSplits;  // of a thread, in the columns that one split stores
  static_assert(kTileM * kTileN * sizeof(float) <= kStages * kStageElements * sizeof(scalar_t),
                "the sums of a tile fit where the ring was");

  DYNAMIC_SHARED(shared);
  scalar_t* ring = reinterpret_cast<scalar_t*>(shared + (1024 - shared_address(shared) % 1024) % 1024);
  Vec<out_t>* staged = reinterpret_cast<Vec<out_t>*>(ring + kStages * kStageElements);  // [kWarps][16][kStagedVecs]
  auto* full = reinterpret_cast<unsigned long long*>(staged + kWarps * 16 * kStagedVecs);  // [kStages]
  auto* empty = full + kStages;                                                            // [kStages]
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, 2);
      mbarrier_init(empty + stage, kWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const int num_splits = cluster_size(), split = cluster_rank();  // kSplits, but 1 where there are no clusters
  const int all_steps = ceil_div(k, kTileK);
  const int first_step = all_steps * split / num_splits;
  const int num_steps = all_steps * (split + 1) / num_splits - first_step;
  const int num_tiles = ceil_div(m, kTileM) * ceil_div(n, kTileN);
  const int first_tile = blockIdx.x / num_splits, tile_stride = gridDim.x / num_splits;
  RingPlace<kStages> place;

  if (threadIdx.x < kGroup) {
    setmaxnreg_dec<56>();
    if (threadIdx.x / kWarpSize == 0 && elect_one()) {
      tensor_prefetch(x);
      griddepcontrol_wait();
      for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
        const int row = TilePlace<kTileM, kTileN>(tile, m, n).first_token;
        const bool whole = row + kTileM <= m;
        const int num_boxes = whole ? 1 : ceil_div(m - row, kLastRows);
        const int box_rows = whole ? kTileM : kLastRows;
        for (int i = 0; i < num_steps; ++i, place.advance()) {
          mbarrier_wait(empty + place.stage, place.parity ^ 1);
          mbarrier_arrive_expect_tx(full + place.stage, num_boxes * box_rows * kTileK * sizeof(scalar_t));
          scalar_t* stage = ring + place.stage * kStageElements;
          for (int first = 0; first < num_boxes * box_rows; first += box_rows)
            tensor_copy(stage + first * kTileK, whole ? x : last_x, (first_step + i) * kTileK, row + first,
                        full + place.stage);
        }
      }
    } else if (threadIdx.x / kWarpSize == 1 && elect_one()) {
      tensor_prefetch(weight);
      for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
        const int row = TilePlace<kTileM, kTileN>(tile, m, n).first_output;
        for (int i = 0; i < num_steps; ++i, place.advance()) {
          mbarrier_wait(empty + place.stage, place.parity ^ 1);
          mbarrier_arrive_expect_tx(full + place.stage, kTileN * kTileK * sizeof(scalar_t));
          tensor_copy(ring + place.stage * kStageElements + kTileM * kTileK, weight, (first_step + i) * kTileK, row,
                      full + place.stage);
        }
      }
      griddepcontrol_wait();  // so late: no kernel writes weight
    } else {
      griddepcontrol_wait();
    }
    if (kSplits > 1 && first_tile < num_tiles) {  // as those that multiply
      cluster_sync();
      cluster_sync();
    }
  } else {
    setmaxnreg_inc<224>();
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int group = threadIdx.x / kGroup - 1;
    const int warp = threadIdx.x / kWarpSize - 4;
    const int lane = threadIdx.x % kWarpSize;
    auto release = [&](int stage) {
      if (lane == 0) mbarrier_arrive(empty + stage);
    };
    const unsigned long long tokens = wgmma_descriptor(ring + group * 64 * kTileK);
    const unsigned long long outputs = wgmma_descriptor(ring + kTileM * kTileK);
    for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
      const TilePlace<kTileM, kTileN> tile_place(tile, m, n);
      float sum[kTileN / 2] = {};
      if (tile_place.first_token + group * 64 < m) {
        int multiplied = place.stage;  // the stage before
        for (int i = 0; i < num_steps; ++i, place.advance()) {
          mbarrier_wait(full + place.stage, place.parity);
          const int offset = place.stage * (kStageElements * int(sizeof(scalar_t)) / 16);
          wgmma_fence();
#pragma unroll
          for (int part = 0; part < kTileK / 16; ++part)
            wgmma_ss<scalar_t>(sum, moved(tokens, offset + 2 * part), moved(outputs, offset + 2 * part));
          wgmma_commit_group();
          wgmma_wait_group<1>();
          if (i > 0) release(multiplied);
          multiplied = place.stage;
        }
        wgmma_wait_group<0>();
        wgmma_hold(sum);
        release(multiplied);
      } else {  // no tokens to multiply
        for (int i = 0; i < num_steps; ++i, place.advance()) {
          mbarrier_wait(full + place.stage, place.parity);
          release(place.stage);
        }
      }

      if constexpr (kSplits > 1) {
        // Sums on their way to where they are stored: [parts stored there][splits][kWarps][kPartSums / 4][lanes].
        const int own_parts = kSplits / num_splits;
        Vec<float>* inbox = reinterpret_cast<Vec<float>*>(ring) + warp * (kPartSums / 4 * kWarpSize) + lane;
        auto sums_of = [&](int part, int from) {
          return inbox + (part % own_parts * num_splits + from) * (kWarps * kPartSums / 4 * kWarpSize);
        };
        cluster_sync();  // everybody has multiplied: the rings are free
#pragma unroll
        for (int part = 0; part < kSplits; ++part)
#pragma unroll
          for (int i = 0; i < kPartSums / 4; ++i) {
            const int first = part * kPartSums + 4 * i;
            store_at(sums_of(part, split) + i * kWarpSize, part / own_parts, sum[first], sum[first + 1], sum[first + 2],
                     sum[first + 3]);
          }
        cluster_sync();
#pragma unroll
        for (int part = 0; part < kSplits; ++part) {
          if (part >= own_parts) continue;
          for (int from = 0; from < num_splits; ++from)
#pragma unroll
            for (int i = 0; i < kPartSums / 4; ++i) {
              const Vec<float> sums = sums_of(part, from)[i * kWarpSize];
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                float& total = sum[part * kPartSums + 4 * i + e];
                total = (from == 0 ? 0.f : total) + sums.data[e];
              }
            }
        }
      }

      // This warp's 16 rows of results, some columns at a time, through shared memory into whole vectors.
      constexpr int kVec = Vec<out_t>::kSize;
      constexpr int kRound = kStagedVecs * kVec;  // columns
      const int num_outputs = kTileN / num_splits;
      const int first_output = tile_place.first_output + split * num_outputs;
      const int end_output = min(n, first_output + num_outputs);
      const int first_token = tile_place.first_token + warp * 16;
      Vec<out_t>* rows = staged + warp * 16 * kStagedVecs;
      if (first_token >= m) continue;
      if constexpr (sizeof(out_t) == 2) {
        if (gates<out_t>(epilogue)) {
          __syncwarp();  // the last tile's results have been read
#pragma unroll
          for (int i = 0; i < kTileN / 4; ++i) {
            const int row = lane / 4 + i % 2 * 8, column = i / 2 * 4 + lane % 4;
            rows[staged_place<out_t>(row, column / kVec)].data[column % kVec] =
                from_float<out_t>(silu_and_mul(sum[2 * i], sum[2 * i + 1]));
          }
          __syncwarp();
          store_rows(out, rows, lane, first_token, m, first_output / 2, end_output / 2, n / 2, false);
          continue;
        }
      }
#pragma unroll
      for (int start = 0; start < kTileN; start += kRound) {
        if (start >= num_outputs) continue;
        __syncwarp();  // the last columns have been read
#pragma unroll
        for (int i = 0; i < kRound / 4; ++i) {
          if (start + i / 2 * 8 >= kTileN) continue;
          const int row = lane / 4 + i % 2 * 8, column = i / 2 * 8 + lane % 4 * 2;
          float first = sum[start / 2 + 2 * i], second = sum[start / 2 + 2 * i + 1];
          if (bias != nullptr) {
            const int output = first_output + start + column;
            if (output < n) first += to_float(bias[output]);
            if (output + 1 < n) second += to_float(bias[output + 1]);
          }
          store_pair(rows[staged_place<out_t>(row, column / kVec)].data + column % kVec, first, second);
        }
        __syncwarp();
        store_rows(out, rows, lane, first_token, m, first_output + start, end_output, n, accumulates<out_t>(epilogue));
      }
    }
  }
}
