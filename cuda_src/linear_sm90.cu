// linear_sm90.cu: what linear.cu computes, on Hopper's warpgroup products
//
// Tiling:   a thread block computes tiles of 128 tokens x kTileN outputs, one after the other (as many thread blocks as
//           SMs). Its first warpgroup fetches: it walks k in steps of 64 elements (128 bytes a row) through a ring of
//           kStages stages in shared memory. The two others multiply 64 tokens each, by wgmma, whose operands both come
//           from the ring. The next tile's first stages are fetched while the last one's sums are stored.
// Barriers: full[s] is arrived at by each fetching thread when its own copies to stage s have landed (kLag steps after
//           it started them, so that kLag + 1 stages are on their way) and are visible to wgmma; empty[s] by each
//           multiplying warp when its products of stage s are done.
// Copies:   cp.async rather than the copy engine: rows past the edges become zeros, no tensor map has to be made for
//           each operand, and 24 copies a thread and step are few beside the 1,024 clocks that its products take.
// Numerics: as in linear.cu, with wgmma's sums in place of mma's: one chain of them an element, in the order of k. The
//           value doesn't depend on m, n, kTileN, or its place in the tile.
// Bound:    flops, 2*m*n*k. A step of 128 x 256 x 64 takes 1,024 clocks of the tensor cores and draws 48 KB from L2, 48
//           bytes a clock and SM. Should L2 not give that to all SMs at once, thread blocks that share their
//           operands (a cluster, multicast copies) are what is left to try. Measured: docs/performance.md.
#include "common.cuh"
#include "linear_epilogue.cuh"
#include "linear_tile.cuh"
#include "ptx_sm90.cuh"

constexpr int kTileM = 128;
constexpr int kGroup = 128;      // threads of a warpgroup
constexpr int kConsumers = 2;    // warpgroups that multiply, 64 tokens each
constexpr int kLag = 2;          // steps between starting copies and waiting for them
constexpr int kStagedCols = 32;  // columns of a warp's sums that are stored at a time
constexpr int kStagedRow = kStagedCols + 4;  // floats; the 4 extra ones spread the rows over the banks

// Grid: any number of thread blocks of 3 warpgroups; as many as SMs is best.
// PRECOND: k % 8 == 0, and x, weight and out start at multiples of 16 bytes.
template <typename scalar_t,  // storage type of x, weight and bias
          typename out_t,     // of out: scalar_t or float
          int kTileN,         // outputs in a tile
          int kStages>        // stages in the ring
__global__ void __launch_bounds__((1 + kConsumers) * kGroup, 1)
linear_sm90(out_t* __restrict__ out,              // [m, n], with kSiluAndMul [m, n / 2]
            const scalar_t* __restrict__ x,       // [m, k]
            const scalar_t* __restrict__ weight,  // [n, k]
            const scalar_t* __restrict__ bias,    // [n], or null; null with kSiluAndMul
            int m, int n, int k,
            int epilogue) {  // an Epilogue
  constexpr int kStageElements = (kTileM + kTileN) * kTileK;
  static_assert(kLag < kStages - 1, "copies are waited for before the ring comes round to them");

  DYNAMIC_SHARED(shared);
  scalar_t* ring = reinterpret_cast<scalar_t*>(shared + (1024 - shared_address(shared) % 1024) % 1024);
  float* staged = reinterpret_cast<float*>(ring + kStages * kStageElements);  // [8 warps][16][kStagedRow]
  auto* full = reinterpret_cast<unsigned long long*>(staged + kConsumers * 4 * 16 * kStagedRow);  // [kStages]
  auto* empty = full + kStages;                                                                   // [kStages]
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, kGroup);
      mbarrier_init(empty + stage, kConsumers * 4);
    }
  }
  __syncthreads();
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();

  const int num_tiles = ceil_div(m, kTileM) * ceil_div(n, kTileN);
  const int num_steps = ceil_div(k, kTileK);  // of a tile
  int step = 0;                               // of all tiles of this thread block

  if (threadIdx.x < kGroup) {
    setmaxnreg_dec<56>();
    auto hand_over = [&](int landed_step) {
      fence_proxy_async();
      mbarrier_arrive(full + landed_step % kStages);
    };
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
      const TilePlace<kTileM, kTileN> place(tile, m, n);
      TileCopier<scalar_t, kTileM, kGroup> x_copier(x, place.first_token, m, k);
      TileCopier<scalar_t, kTileN, kGroup> weight_copier(weight, place.first_output, n, k);
      for (int i = 0; i < num_steps; ++i, ++step) {
        if (step >= kStages) mbarrier_wait(empty + step % kStages, (step / kStages - 1) % 2);
        scalar_t* stage = ring + step % kStages * kStageElements;
        x_copier.copy(stage);
        weight_copier.copy(stage + kTileM * kTileK);
        cp_async_commit_group();
        if (step >= kLag) {
          cp_async_wait_group<kLag>();
          hand_over(step - kLag);
        }
      }
    }
    cp_async_wait_group<0>();
    for (int landed = max(0, step - kLag); landed < step; ++landed) hand_over(landed);
  } else {
    setmaxnreg_inc<224>();
    const int group = threadIdx.x / kGroup - 1;
    const int warp = threadIdx.x / kWarpSize - 4;
    const int lane = threadIdx.x % kWarpSize;
    const bool gated = gates<out_t>(epilogue);
    auto release = [&](int done_step) {
      if (lane == 0) mbarrier_arrive(empty + done_step % kStages);
    };
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
      const TilePlace<kTileM, kTileN> place(tile, m, n);
      float sum[kTileN / 2] = {};
      for (int i = 0; i < num_steps; ++i, ++step) {
        mbarrier_wait(full + step % kStages, step / kStages % 2);
        const scalar_t* stage = ring + step % kStages * kStageElements;
        const unsigned long long tokens = wgmma_descriptor(stage + group * 64 * kTileK);
        const unsigned long long outputs = wgmma_descriptor(stage + kTileM * kTileK);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < kTileK / 16; ++part)
          wgmma_ss<scalar_t>(sum, tokens + 2 * part, outputs + 2 * part);
        wgmma_commit_group();
        wgmma_wait_group<1>();
        if (i > 0) release(step - 1);
      }
      wgmma_wait_group<0>();
      wgmma_hold(sum);
      release(step - 1);

      // This warp's 16 rows of results, some columns at a time, through shared memory into whole vectors.
      float* rows = staged + warp * 16 * kStagedRow;
      const int first_token = place.first_token + warp * 16;
#pragma unroll
      for (int start = 0; start < kTileN; start += kStagedCols) {
        __syncwarp();  // the last columns have been read
#pragma unroll
        for (int j = 0; j < kStagedCols / 8; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float* row = rows + (lane / 4 + half * 8) * kStagedRow;
            const int column = j * 8 + lane % 4 * 2;
            const Pair pair = {sum[start / 2 + j * 4 + half * 2], sum[start / 2 + j * 4 + half * 2 + 1]};
            if (gated)
              row[column / 2] = silu_and_mul(pair.first, pair.second);
            else
              *reinterpret_cast<Pair*>(row + column) = pair;
          }
        __syncwarp();
        const int first_output = place.first_output + start;
        if (gated)
          store_tile<16, kStagedCols / 2, kStagedRow, kWarpSize>(out, rows, bias, lane, first_token, m,
                                                                 first_output / 2, n / 2, false);
        else
          store_tile<16, kStagedCols, kStagedRow, kWarpSize>(out, rows, bias, lane, first_token, m, first_output, n,
                                                             accumulates<out_t>(epilogue));
      }
    }
  }
}
