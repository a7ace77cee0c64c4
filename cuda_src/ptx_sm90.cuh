// ptx_sm90.cuh: the PTX that kernels for Hopper (sm_90a) use beside that of ptx.cuh. The host build replaces this
// header, too.
#ifndef CUPAGED_PTX_SM90_CUH
#define CUPAGED_PTX_SM90_CUH

#include "ptx.cuh"

// -- barriers in shared memory ------------------------------------------------------------------------------
//
// A phase of an mbarrier completes when it has been arrived at as often as it was told at its start; what a thread did
// before it arrived is then visible to those who wait for that phase. Phases count from 0; parity is phase % 2.

__device__ __forceinline__ void mbarrier_init(unsigned long long* barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(num_arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive; the phase also waits for this many bytes that the copy engine brings.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned long long* barrier, int num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(num_bytes)
               : "memory");
}

// Barriers that this thread has initialised become visible to the copy engine, and by a barrier after it to others.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Whether the phase of this parity has completed, as one can ask ahead of a wait. Where it has, no wait is needed.
__device__ __forceinline__ bool mbarrier_test_wait(unsigned long long* barrier, int parity) {
  unsigned done;
  asm volatile(
      "{.reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done;}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ bool mbarrier_try_wait(unsigned long long* barrier, int parity) {
  unsigned done;
  asm volatile(
      "{.reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done;}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Wait until the phase of this parity has completed. The phase under way must be that one or the one after it. A wait of
// some 20 seconds ends the launch with an error: an arrival was lost, and a GPU that hangs is worse. The error is that of an
// illegal address, as a trap here makes the compiler serialize wgmma.
__device__ __forceinline__ void mbarrier_wait(unsigned long long* barrier, int parity) {
  if (mbarrier_try_wait(barrier, parity)) return;
  const long long start = clock64();
  while (!mbarrier_try_wait(barrier, parity))
    if (clock64() - start > 40000000000ll) asm volatile("st.global.u32 [%0], 0;\n" ::"l"(0ull) : "memory");
}

// -- the sixteen barriers of a thread block that have numbers -------------------------------------------------
//
// A phase of barrier `id` (0 is that of __syncthreads) completes when num_threads threads, whole warps, have come to it.

// Come to the barrier and wait for the others.
__device__ __forceinline__ void bar_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// Come to the barrier and go on.
__device__ __forceinline__ void bar_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// -- the copy engine ----------------------------------------------------------------------------------------
//
// One thread starts a copy; its bytes count at an mbarrier of this thread block when they are there, and who has waited
// for that phase sees them. No fence is needed, not before wgmma either.

// num_bytes, a multiple of 16; both ends at multiples of 16 bytes.
__device__ __forceinline__ void bulk_copy(void* dst, const void* src, int num_bytes, unsigned long long* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(dst)),
               "l"(src), "r"(num_bytes), "r"(shared_address(barrier))
               : "memory");
}

// The same of what nobody reads again soon: it leaves L2 before all else, and what else is there stays.
__device__ __forceinline__ void bulk_copy_evict_first(void* dst, const void* src, int num_bytes,
                                                      unsigned long long* barrier) {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\n" ::"r"(
          shared_address(dst)),
      "l"(src), "r"(num_bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// Describes a matrix of 16-bit elements to the copy engine, and the box of rows of 64 columns that a copy brings: the
// driver's CUtensorMap, made by tensor_map.py. A kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// The box whose first element is at this row and column, to a multiple of 1024 bytes, as wgmma_descriptor wants it. What
// is past the edges of the matrix becomes zeros, and counts: it is always the whole box, 128 bytes a row.
__device__ __forceinline__ void tensor_copy(void* dst, const TensorMap& map, int column, int row,
                                            unsigned long long* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
               "[%4];\n" ::"r"(shared_address(dst)),
               "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
               : "memory");
}

// The same of what is read once: L2 lets it go before all else.
__device__ __forceinline__ void tensor_copy_once(void* dst, const TensorMap& map, int column, int row,
                                                 unsigned long long* barrier) {
  constexpr unsigned long long kEvictFirst = 0x12f0000000000000;  // as createpolicy.fractional makes it for all bytes
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
               "[%1, {%2, %3}], [%4], %5;\n" ::"r"(shared_address(dst)),
               "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(kEvictFirst)
               : "memory");
}

// Add four floats to those at p, a multiple of 16 bytes, without waiting for what is there; each sum is rounded once.
__device__ __forceinline__ void reduce_add(float* p, const float (&v)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

// Fetch the description itself, ahead of the first copy.
__device__ __forceinline__ void tensor_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// -- clusters -----------------------------------------------------------------------------------------------
//
// With __cluster_dims__(n, 1, 1), n thread blocks that follow each other run at the same time, on neighbouring SMs, and
// reach into each other's shared memory. Without, each is a cluster of its own, and so they are on the host: a kernel
// asks how many there are.

__device__ __forceinline__ int cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %cluster_nctaid.x;\n" : "=r"(size));
  return size;
}

__device__ __forceinline__ int cluster_rank() {  // of this thread block
  unsigned rank;
  asm("mov.u32 %0, %cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// A __syncthreads of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// Store a vector of 16 bytes where p points in this thread block's shared memory, but in that of the cluster's thread block
// of this rank.
__device__ __forceinline__ void store_at(void* p, int rank, float a, float b, float c, float d) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};}\n" ::"r"(shared_address(p)),
      "r"(rank), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}

// All threads of the cluster call both, in this order. Barriers that a thread block has initialised and fenced
// (mbarrier_init_fence) before cluster_arrive may be used by the others after cluster_wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory"); }

// Write 16 bytes to where dst lies, but in the shared memory of the cluster's thread block of this rank, and count them
// at the mbarrier that lies there where this one does. Who has waited for that phase sees them.
__device__ __forceinline__ void store_async(float* dst, const float (&v)[4], unsigned long long* barrier, int rank) {
  asm volatile(
      "{.reg .b32 to, at; mapa.shared::cluster.u32 to, %0, %6; mapa.shared::cluster.u32 at, %1, %6; "
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%2, %3, %4, %5}, [at];}\n" ::"r"(
          shared_address(dst)),
      "r"(shared_address(barrier)), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(rank)
      : "memory");
}

// -- products of a warpgroup --------------------------------------------------------------------------------

// This thread's writes to shared memory, those of its cp.async that it has waited for included, become visible to
// wgmma once a barrier has told others of them.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Registers that were touched by anything but wgmma are ready for the next one.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Wait until at most kPending of this warpgroup's latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keep the compiler from moving what reads or writes d to before this point: to it, sums are there when wgmma has been
// issued. Stands after the wait for them.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptors of operands in shared memory, which lie in panels: rows of 64 16-bit elements (128 bytes) one after the
// other, row r having its 16-byte chunk c at c ^ (r % 8). A panel begins at a multiple of 1024 bytes.
//
// wgmma_descriptor: the sums run along the rows; adding 2 to it moves on by 16 columns.
// wgmma_transposed: the sums run down the rows, and columns from 64 on lie in the next panel, panel_bytes on; adding 128
// to it moves on by 16 rows.
__device__ __forceinline__ unsigned long long wgmma_descriptor(const void* panel) {
  constexpr unsigned long long kSwizzle128 = 1ull << 62, kEightRows = 1024ull / 16 << 32, kUnused = 1ull << 16;
  return kSwizzle128 | kEightRows | kUnused | (shared_address(panel) & 0x3ffff) / 16;
}

__device__ __forceinline__ unsigned long long wgmma_transposed(const void* panel, int panel_bytes) {
  constexpr unsigned long long kSwizzle128 = 1ull << 62, kEightRows = 1024ull / 16 << 32;
  const unsigned long long next_panel = (unsigned long long)(panel_bytes / 16) << 16;
  return kSwizzle128 | kEightRows | next_panel | (shared_address(panel) & 0x3ffff) / 16;
}

// d (+)= a * b: a [64, 16], b [16, kN], d [64, kN] in float32, started by all four warps of a warpgroup; without
// kAccumulate d is overwritten. Lane l (g = l / 4, t = l % 4) of warp w of the four holds in d[4 * j + i] the sum of
//   row 16 * w + g + i / 2 * 8, column 8 * j + 2 * t + i % 2.
// d may not be touched until a wait says that its group is done. The number of sums says which kN is meant.
//
// wgmma_ss: both operands by wgmma_descriptor (b as [kN, 16]).
template <typename T, bool kAccumulate = true>
__device__ __forceinline__ void wgmma_ss(float (&d)[4], unsigned long long a, unsigned long long b);
template <typename T, bool kAccumulate = true>
__device__ __forceinline__ void wgmma_ss(float (&d)[8], unsigned long long a, unsigned long long b);
template <typename T, bool kAccumulate = true>
__device__ __forceinline__ void wgmma_ss(float (&d)[16], unsigned long long a, unsigned long long b);
template <typename T, bool kAccumulate = true>
__device__ __forceinline__ void wgmma_ss(float (&d)[32], unsigned long long a, unsigned long long b);
template <typename T, bool kAccumulate = true>
__device__ __forceinline__ void wgmma_ss(float (&d)[64], unsigned long long a, unsigned long long b);
template <typename T, bool kAccumulate = true>
__device__ __forceinline__ void wgmma_ss(float (&d)[96], unsigned long long a, unsigned long long b);
template <typename T, bool kAccumulate = true>
__device__ __forceinline__ void wgmma_ss(float (&d)[128], unsigned long long a, unsigned long long b);

// wgmma_rs: a in registers, each warp its 16 rows as mma_m16n8k16 has them; they too may not be touched until the wait.
// b by wgmma_transposed.
template <typename T>
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const unsigned (&a)[4], unsigned long long b);
template <typename T>
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const unsigned (&a)[4], unsigned long long b);

#define CUPAGED_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CUPAGED_16(d, i) CUPAGED_4(d, i), CUPAGED_4(d, i + 4), CUPAGED_4(d, i + 8), CUPAGED_4(d, i + 12)
#define CUPAGED_WGMMA_N8(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %6, 0; " \
      "wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type " {" \
      "%0, %1, %2, %3" \
      "}, %4, %5, accumulate, 1, 1, 0, 0;}\n" \
      : CUPAGED_4(d, 0) \
      : "l"(a), "l"(b), "n"(int(kAccumulate)))
#define CUPAGED_WGMMA_N16(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %10, 0; " \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7" \
      "}, %8, %9, accumulate, 1, 1, 0, 0;}\n" \
      : CUPAGED_4(d, 0), CUPAGED_4(d, 4) \
      : "l"(a), "l"(b), "n"(int(kAccumulate)))
#define CUPAGED_WGMMA_N32(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %18, 0; " \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
      "}, %16, %17, accumulate, 1, 1, 0, 0;}\n" \
      : CUPAGED_16(d, 0) \
      : "l"(a), "l"(b), "n"(int(kAccumulate)))
#define CUPAGED_WGMMA_N64(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %34, 0; " \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
      "}, %32, %33, accumulate, 1, 1, 0, 0;}\n" \
      : CUPAGED_16(d, 0), CUPAGED_16(d, 16) \
      : "l"(a), "l"(b), "n"(int(kAccumulate)))
#define CUPAGED_WGMMA_N128(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %66, 0; " \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
      "}, %64, %65, accumulate, 1, 1, 0, 0;}\n" \
      : CUPAGED_16(d, 0), CUPAGED_16(d, 16), CUPAGED_16(d, 32), CUPAGED_16(d, 48) \
      : "l"(a), "l"(b), "n"(int(kAccumulate)))
#define CUPAGED_WGMMA_N192(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %98, 0; " \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
      "}, %96, %97, accumulate, 1, 1, 0, 0;}\n" \
      : CUPAGED_16(d, 0), CUPAGED_16(d, 16), CUPAGED_16(d, 32), CUPAGED_16(d, 48), \
        CUPAGED_16(d, 64), CUPAGED_16(d, 80) \
      : "l"(a), "l"(b), "n"(int(kAccumulate)))
#define CUPAGED_WGMMA_N256(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.ne.b32 accumulate, %130, 0; " \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, accumulate, 1, 1, 0, 0;}\n" \
      : CUPAGED_16(d, 0), CUPAGED_16(d, 16), CUPAGED_16(d, 32), CUPAGED_16(d, 48), \
        CUPAGED_16(d, 64), CUPAGED_16(d, 80), CUPAGED_16(d, 96), CUPAGED_16(d, 112) \
      : "l"(a), "l"(b), "n"(int(kAccumulate)))
#define CUPAGED_WGMMA_RS_N64(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.eq.b32 accumulate, 0, 0; " \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
      "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, 1;}\n" \
      : CUPAGED_16(d, 0), CUPAGED_16(d, 16) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define CUPAGED_WGMMA_RS_N128(type) \
  asm volatile( \
      "{.reg .pred accumulate; setp.eq.b32 accumulate, 0, 0; " \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 1;}\n" \
      : CUPAGED_16(d, 0), CUPAGED_16(d, 16), CUPAGED_16(d, 32), CUPAGED_16(d, 48) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

#define CUPAGED_WGMMA(product) \
  if constexpr (kIsHalf<T>) product("f16"); else product("bf16")
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_ss(float (&d)[4], unsigned long long a, unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_N8);
}
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_ss(float (&d)[8], unsigned long long a, unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_N16);
}
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_ss(float (&d)[16], unsigned long long a, unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_N32);
}
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_ss(float (&d)[32], unsigned long long a, unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_N64);
}
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_ss(float (&d)[64], unsigned long long a, unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_N128);
}
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_ss(float (&d)[96], unsigned long long a, unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_N192);
}
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_ss(float (&d)[128], unsigned long long a, unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_N256);
}
template <typename T>
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_RS_N64);
}
template <typename T>
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
  CUPAGED_WGMMA(CUPAGED_WGMMA_RS_N128);
}
#undef CUPAGED_WGMMA
#undef CUPAGED_WGMMA_RS_N128
#undef CUPAGED_WGMMA_RS_N64
#undef CUPAGED_WGMMA_N256
#undef CUPAGED_WGMMA_N192
#undef CUPAGED_WGMMA_N128
#undef CUPAGED_WGMMA_N64
#undef CUPAGED_WGMMA_N32
#undef CUPAGED_WGMMA_N16
#undef CUPAGED_WGMMA_N8
#undef CUPAGED_16
#undef CUPAGED_4

// -- warps --------------------------------------------------------------------------------------------------

// Whether this thread is the one of its warp that is chosen; the compiler then knows that it is one. All lanes call it.
__device__ __forceinline__ bool elect_one() {
  unsigned chosen;
  asm volatile("{.reg .pred chosen; elect.sync _|chosen, 0xffffffff; selp.b32 %0, 1, 0, chosen;}\n" : "=r"(chosen));
  return chosen != 0;
}

// -- registers ----------------------------------------------------------------------------------------------

// Give registers of this warpgroup's threads back, or wait for such ones and take them: kCount are left to each.
template <int kCount>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

#endif  // CUPAGED_PTX_SM90_CUH
