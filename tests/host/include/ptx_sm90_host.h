// ptx_sm90_host.h: cuda_src/ptx_sm90.cuh on the host, the same functions. Its guard keeps the real header out.
#ifndef CUPAGED_PTX_SM90_CUH
#define CUPAGED_PTX_SM90_CUH

#include "runtime.h"

inline unsigned shared_address(const void* p) { return host::shared_address(p); }

inline void mbarrier_init(unsigned long long* barrier, int num_arrivals) { host::mbarrier_init(barrier, num_arrivals); }
inline void mbarrier_arrive(unsigned long long* barrier) { host::mbarrier_arrive(barrier); }
inline void mbarrier_arrive_expect_tx(unsigned long long* barrier, int num_bytes) {
  host::mbarrier_arrive_expect_tx(barrier, num_bytes);
}
inline void mbarrier_init_fence() {}
inline bool mbarrier_test_wait(unsigned long long* barrier, int parity) {
  return host::mbarrier_test_wait(barrier, parity);
}
inline void mbarrier_wait(unsigned long long* barrier, int parity, host::Site site = host::Site::here()) {
  host::mbarrier_wait(barrier, parity, site);
}

inline void bar_sync(int id, int num_threads, host::Site site = host::Site::here()) {
  host::bar_sync(id, num_threads, site);
}
inline void bar_arrive(int id, int num_threads) { host::bar_arrive(id, num_threads); }

inline void bulk_copy(void* dst, const void* src, int num_bytes, unsigned long long* barrier,
                      host::Site site = host::Site::here()) {
  host::bulk_copy(dst, src, num_bytes, barrier, site);
}
inline void bulk_copy_evict_first(void* dst, const void* src, int num_bytes, unsigned long long* barrier,
                                  host::Site site = host::Site::here()) {
  host::bulk_copy(dst, src, num_bytes, barrier, site);
}

// Made by encode_tensor_map in build.py: address, rows, columns and rows of a box.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};
inline void tensor_copy(void* dst, const TensorMap& map, int column, int row, unsigned long long* barrier,
                        host::Site site = host::Site::here()) {
  const auto* src = reinterpret_cast<const unsigned char*>(map.opaque[0]);
  host::tensor_copy(dst, src, int(map.opaque[1]), int(map.opaque[2]), int(map.opaque[3]), column, row, barrier, site);
}
inline void tensor_copy_once(void* dst, const TensorMap& map, int column, int row, unsigned long long* barrier,
                             host::Site site = host::Site::here()) {
  tensor_copy(dst, map, column, row, barrier, site);
}
inline void tensor_prefetch(const TensorMap&) {}
inline void reduce_add(float* p, const float (&v)[4]) {
  for (int e = 0; e < 4; ++e) p[e] += v[e];
}

// There are no clusters, whatever a kernel is compiled for: every thread block is one of its own.
inline int cluster_size() { return 1; }
inline int cluster_rank() { return 0; }
inline void cluster_sync() { host::block_barrier("cluster_sync", host::Reduce::kNone, 0, {"cluster_sync", 0}); }
inline void store_at(void* p, int, float a, float b, float c, float d) {
  float* values = static_cast<float*>(p);
  values[0] = a, values[1] = b, values[2] = c, values[3] = d;
}
inline void cluster_arrive() {}
inline void cluster_wait() {}
inline void store_async(float* dst, const float (&v)[4], unsigned long long* barrier, int) {
  host::store_async(dst, v, barrier);
}

inline void fence_proxy_async() { host::fence_proxy_async(); }
inline void wgmma_fence(host::Site site = host::Site::here()) { host::converge("wgmma_fence", site); }
inline void wgmma_commit_group(host::Site site = host::Site::here()) { host::wgmma_commit_group(site); }
template <int kPending>
inline void wgmma_wait_group(host::Site site = host::Site::here()) {
  host::wgmma_wait_group(kPending, site);
}

template <int kCount>
inline void wgmma_hold(float (&)[kCount]) {}

inline unsigned long long wgmma_transposed(const void* panel, int panel_bytes) {
  return 1ull << 62 | 1024ull / 16 << 32 | (unsigned long long)(panel_bytes / 16) << 16 |
         (shared_address(panel) & 0x3ffff) / 16;
}
inline unsigned long long wgmma_descriptor(const void* panel) { return wgmma_transposed(panel, 16); }

template <typename T>
constexpr host::HalfType kHalfType{};
template <>
constexpr host::HalfType kHalfType<__half> = host::HalfType::kHalf;
template <>
constexpr host::HalfType kHalfType<__nv_bfloat16> = host::HalfType::kBFloat16;

// The operands are read, and the sums written, when a wait asks for it and no earlier; until then d holds NaNs.
template <typename T, bool kAccumulate = true, int kSums>
inline void wgmma_ss(float (&d)[kSums], unsigned long long a, unsigned long long b,
                     host::Site site = host::Site::here()) {
  host::wgmma_ss(kHalfType<T>, d, 2 * kSums, a, b, kAccumulate, site);
}
template <typename T, int kSums>
inline void wgmma_rs(float (&d)[kSums], const unsigned (&a)[4], unsigned long long b,
                     host::Site site = host::Site::here()) {
  host::wgmma_rs(kHalfType<T>, d, 2 * kSums, a, b, site);
}

inline bool elect_one(host::Site site = host::Site::here()) {
  host::converge("elect_one", site);
  return threadIdx.x % 32 == 0;
}

template <int kCount>
inline void setmaxnreg_dec() {}
template <int kCount>
inline void setmaxnreg_inc() {}

#endif  // CUPAGED_PTX_SM90_CUH
