// linear_small.cu: y[i, j] = sum_c x[i, c] * weight[j, c] + bias[j] for m <= 16, where streaming weight is the work
//
//   out = y,   out += y   or   out[i, j] = silu(y[i, 2j]) * y[i, 2j + 1]
//
// or the same of rms_norm(x), where x is of float.
//
// Tiling:   weight is the wide operand of the tensor core: an mma takes 16 rows of weight by 8 tokens, so tokens are
//           padded to 8 or 16 and no further. A thread block computes 16 * kRowTiles outputs for all tokens; its 8
//           warps share k, in chunks of 64 columns (128 bytes, one cache line, of each row) dealt out in turn.
// Streams:  each warp has a ring of kStages chunks of weight and x in shared memory, filled by cp.async. A lane copies
//           just the 16-byte pieces that it will multiply itself, so the loop needs no barrier, no ldmatrix and no
//           swizzle. That works because the order of a sum's terms is free: lane t of four copies columns 8t .. 8t+7 of
//           each 32 for every row, of x and of weight alike, and the mma is told that those are its columns 2t, 2t+1,
//           2t+8, 2t+9, twice.
// Norm:     of at most 8 tokens. A warp asks for all its x at once and sums the squares. When the other warps' sums are
//           there, it norms and rounds x as rms_norm.cu does: to the order of the sum of squares, what is multiplied is
//           the same. From then on x stays in registers, which is what bounds k; more tokens had to be read twice, which
//           took longer than a launch. The norm's weight is asked for before the wait for the kernel before, as it may
//           have to come from DRAM. Each thread block norms anew, out of L2.
// Overlap:  the first weight is asked for before the wait for the kernel before. Where the rings hold all that a thread
//           block reads, the next kernel may ask for its own at once; else it would draw on DRAM while this one streams.
//           Weight is read once: L2 lets it go first, so that what the other kernels read again and again stays.
// Numerics: products summed in float32 along each warp's chunks in the order of k, then the 8 sums in the order of the
//           warps, then the bias, then what is added to; silu in float32, of such sums; one rounding, at the store. An
//           element's value depends on its row of x, its rows of weight, its bias, what is added to and on k alone: not
//           on m, n, kRowTiles or kStages.
// Bound:    n * k * 2 bytes of weight from DRAM. A thread block has 64 KB of them on their way (48 KB with two token
//           tiles and one row tile). At 3.1 TB/s and some 0.7 us of latency about 2.2 MB must be on their way: 36
//           thread blocks (n = 576) should do, so k is not split over thread blocks. x comes from L2 for each
//           16 * kRowTiles outputs anew: half the bytes of weight again for 16 tokens and two row tiles.
//           Measured: docs/performance.md.
#include "common.cuh"
#include "linear_epilogue.cuh"
#include "ptx.cuh"

constexpr int kWarps = 8;  // they share k: another number is another order of summation
constexpr int kNumThreads = kWarps * kWarpSize;
constexpr int kChunk = 64;              // columns of k that a warp takes at a time
constexpr int kPiece = 32;              // columns that four lanes hold in 16 bytes each: two steps of k of the mma
constexpr int kTurn = kWarps * kChunk;  // columns from a warp's chunk to its next

// Of x that is normed: columns, at most (twin of LINEAR_SMALL_NORMED_COLUMNS in tuning.py), and a warp's chunks of them.
constexpr int kMaxNormed = 2048;
constexpr int kMaxChunks = kMaxNormed / kTurn;

// Grid: ceil(n / (16 * kRowTiles)) thread blocks of 8 warps.
// PRECOND: m <= 8 * kTokenTiles, k % 8 == 0, where x is normed k <= kMaxNormed, and x, weight and norm start at
//          multiples of 16 bytes.
template <typename scalar_t,  // storage type of x, weight and bias
          typename out_t,     // of out: scalar_t or float
          typename x_t,       // of x: scalar_t, or float: rows that are normed first
          int kRowTiles,      // mma tiles of 16 rows of weight in a thread block
          int kTokenTiles,    // mma tiles of 8 tokens
          int kStages>        // chunks that a warp has on their way
__global__ void __launch_bounds__(kNumThreads)
linear_small(out_t* __restrict__ out,              // [m, n], with kSiluAndMul [m, n / 2]
             const x_t* __restrict__ x,            // [m, k]
             const scalar_t* __restrict__ weight,  // [n, k]
             const scalar_t* __restrict__ bias,    // [n], or null; null with kSiluAndMul
             const scalar_t* __restrict__ norm,    // [k], the norm's weight; not read if x is of scalar_t
             int m, int n, int k,
             int epilogue,  // an Epilogue
             float eps) {   // the norm's
  constexpr int kRows = 16 * kRowTiles;
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kPieces = kChunk / kPiece;
  constexpr bool kNormed = sizeof(x_t) == sizeof(float);
  // Vectors of a lane in a piece, 8 rows or 8 tokens each: those of weight, and of x as far as it comes this way.
  constexpr int kPieceVecs = 2 * kRowTiles + (kNormed ? 0 : kTokenTiles);
  constexpr int kRingVecs = kStages * kPieces * kPieceVecs * kWarpSize;  // vectors of a warp's ring
  constexpr int kOutputs = ceil_div(kTokens * kRows, kNumThreads);  // of a thread, unless the epilogue gates
  constexpr int kSumRow = kRows + 4;  // floats; the 4 extra ones keep the lanes' writes free of bank conflicts
  static_assert(kTokens * kSumRow * sizeof(float) <= kRingVecs * sizeof(Vec<scalar_t>),
                "a warp's sums fit where its ring was");

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int first_row = blockIdx.x * kRows;
  const int row = first_row + lane / 4;  // this lane's row in the first 8 rows of weight
  const int token = lane / 4;            // and its token in the first 8

  DYNAMIC_SHARED(shared);
  Vec<scalar_t>* ring = reinterpret_cast<Vec<scalar_t>*>(shared) + warp * kRingVecs + lane;  // this lane's vectors

  // Where this lane copies its first vectors from. At and past k, zeros are filled in and nothing is read.
  const int column = warp * kChunk + lane % 4 * 8;
  const scalar_t* weight_source = weight + (long long)row * k + column;
  const x_t* x_source = x + (long long)token * k + column;
  const long long stride = 8LL * k;  // from 8 rows to the next 8
  const unsigned long long evict_first = evict_first_policy();
  // Start copying this lane's part of the chunk that begins `first` columns after the warp's first one.
  auto copy_weight = [&](int stage, int first) {
    if (warp * kChunk + first >= k) return;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int offset = first + piece * kPiece;
      Vec<scalar_t>* place = ring + (stage * kPieces + piece) * kPieceVecs * kWarpSize;
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i)
        cp_async_16_evict_first(place + i * kWarpSize, weight_source + i * stride + offset, evict_first,
                                column + offset < k && row + 8 * i < n);
    }
  };
  auto copy_x = [&](int stage, int first) {
    if (kNormed || warp * kChunk + first >= k) return;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int offset = first + piece * kPiece;
      Vec<scalar_t>* place = ring + ((stage * kPieces + piece) * kPieceVecs + 2 * kRowTiles) * kWarpSize;
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i)
        cp_async_16(place + i * kWarpSize, x_source + i * stride + offset, column + offset < k && token + 8 * i < m);
    }
  };

  // Behind the rings, where x is normed: the norm's weight for each warp's chunks, a vector a lane; then the warps'
  // sums of squares, [kWarps][kTokens].
  static_assert(kMaxChunks * kChunk == kWarpSize * 8, "a warp's part of the norm's weight is a vector a lane");
  Vec<scalar_t>* block_norm = reinterpret_cast<Vec<scalar_t>*>(shared) + kWarps * kRingVecs;
  Vec<scalar_t>* warp_norm = block_norm + warp * kWarpSize;
  if constexpr (kNormed) {
    const int norm_column = warp * kChunk + lane * 8 / kChunk * kTurn + lane * 8 % kChunk;
    cp_async_16(warp_norm + lane, norm + norm_column, norm_column < k);
    cp_async_commit_group();
  }
  static_assert(!kNormed || kTokenTiles == 1, "registers hold what is normed of 8 tokens");
  // No kernel writes weight: its first chunks are on their way while the kernel before this one ends. They belong to the
  // first group, so that a group a chunk is counted below.
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) copy_weight(stage, stage * kTurn);
  const bool streams = k > kStages * kTurn;
  if (!streams) griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (streams) griddepcontrol_launch_dependents();
  Vec<unsigned> normed[kMaxChunks][kPieces];  // what the warp multiplies of x that is normed, in pairs
  if constexpr (kNormed) {
    float* squares = reinterpret_cast<float*>(block_norm + kWarps * kWarpSize);
    Float8 values[kMaxChunks][kPieces];
#pragma unroll
    for (int first = 0; first < kMaxNormed && warp * kChunk + first < k; first += kTurn)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        values[first / kTurn][piece] = {};
        if (column + first + piece * kPiece < k && token < m)
          values[first / kTurn][piece] = load_float8(x_source + first + piece * kPiece);
      }
    float square = 0.f;
#pragma unroll
    for (int first = 0; first < kMaxNormed && warp * kChunk + first < k; first += kTurn)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
        for (int e = 0; e < 8; ++e) square += values[first / kTurn][piece].data[e] * values[first / kTurn][piece].data[e];
    square += __shfl_xor_sync(kFullMask, square, 1);
    square += __shfl_xor_sync(kFullMask, square, 2);
    if (lane % 4 == 0) squares[warp * kTokens + token] = square;
    cp_async_wait_group<0>();  // the norm's weight: the copies since then are in no group yet
    __syncthreads();
    square = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) square += squares[w * kTokens + token];
    const float scale = rsqrtf(square / k + eps);
#pragma unroll
    for (int first = 0; first < kMaxNormed && warp * kChunk + first < k; first += kTurn)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const Float8 factors = load_float8(warp_norm[(first / kTurn * kPieces + piece) * 4 + lane % 4].data);
        Vec<scalar_t> products;
#pragma unroll
        for (int e = 0; e < 8; ++e)
          products.data[e] = from_float<scalar_t>(values[first / kTurn][piece].data[e] * (scale * factors.data[e]));
        normed[first / kTurn][piece] = *reinterpret_cast<const Vec<unsigned>*>(&products);
      }
  }
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    copy_x(stage, stage * kTurn);
    cp_async_commit_group();
  }
  // Where output `index` of the thread block's kTokens * kRows goes; null if there is none.
  auto output = [&](int index) -> out_t* {
    const int out_token = index / kRows, out_row = first_row + index % kRows;
    return index < kTokens * kRows && out_token < m && out_row < n ? out + (long long)out_token * n + out_row : nullptr;
  };
  // What is added to is on its way meanwhile: at the end everybody would wait for it.
  float held[kOutputs] = {};
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const out_t* place = output(threadIdx.x + i * kNumThreads);
    if (accumulates<out_t>(epilogue) && place != nullptr) held[i] = to_float(*place);
  }

  float sum[kRowTiles][kTokenTiles][4] = {};
  int stage = 0;
  // Registers have no indices: with x in them, every chunk has code of its own.
#pragma unroll(kNormed ? kMaxChunks : 1)
  for (int first = 0; warp * kChunk + first < k && (!kNormed || first < kMaxNormed); first += kTurn) {
    cp_async_wait_group<kStages - 1>();  // this lane's own copies: nobody else reads them
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const Vec<scalar_t>* place = ring + (stage * kPieces + piece) * kPieceVecs * kWarpSize;
      Vec<unsigned> pairs[2 * kRowTiles + kTokenTiles];  // of elements, as the mma takes them
#pragma unroll
      for (int i = 0; i < kPieceVecs; ++i)
        pairs[i] = load_vec(reinterpret_cast<const unsigned*>(place + i * kWarpSize));
      if constexpr (kNormed) pairs[2 * kRowTiles] = normed[first / kTurn][piece];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const unsigned* low = pairs[2 * r].data + 2 * step;       // rows 0 .. 7 of the tile
          const unsigned* high = pairs[2 * r + 1].data + 2 * step;  // and 8 .. 15
          const unsigned weights[4] = {low[0], high[0], low[1], high[1]};
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) {
            const unsigned* tokens = pairs[2 * kRowTiles + t].data + 2 * step;
            mma_m16n8k16<scalar_t>(sum[r][t], weights, tokens[0], tokens[1]);
          }
        }
      }
    }
    copy_weight(stage, first + kStages * kTurn);
    copy_x(stage, first + kStages * kTurn);
    cp_async_commit_group();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // Each warp leaves its sums where its ring was, [kTokens][kRows], kSumRow floats apart.
  cp_async_wait_group<0>();  // the groups past k, which are empty
  __syncwarp();              // and every lane is that far
  float* warp_sums = reinterpret_cast<float*>(reinterpret_cast<Vec<scalar_t>*>(shared) + warp * kRingVecs);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        warp_sums[(t * 8 + lane % 4 * 2 + e % 2) * kSumRow + r * 16 + e / 2 * 8 + lane / 4] = sum[r][t][e];
  __syncthreads();

  const float* block_sums = reinterpret_cast<const float*>(shared);
  constexpr int kWarpStride = kRingVecs * sizeof(Vec<scalar_t>) / sizeof(float);
  auto total = [&](int out_token, int out_row) {
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += block_sums[w * kWarpStride + out_token * kSumRow + out_row];
    return value;
  };
  if (gates<out_t>(epilogue)) {
    for (int i = threadIdx.x; i < kTokens * kRows / 2; i += kNumThreads) {
      const int out_token = i / (kRows / 2);
      const int gate = i % (kRows / 2) * 2;
      if (out_token >= m || first_row + gate >= n) continue;
      out[(long long)out_token * (n / 2) + (first_row + gate) / 2] =
          from_float<out_t>(silu_and_mul(total(out_token, gate), total(out_token, gate + 1)));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int index = threadIdx.x + i * kNumThreads;
    out_t* place = output(index);
    if (place == nullptr) continue;
    float value = total(index / kRows, index % kRows);
    if (bias != nullptr) value += to_float(bias[first_row + index % kRows]);
    if (accumulates<out_t>(epilogue)) value += held[i];
    *place = from_float<out_t>(value);
  }
}
