// ptx_host.h: cuda_src/ptx.cuh on the host, the same functions lane by lane. Its guard keeps the real header out.
#ifndef CUPAGED_PTX_CUH
#define CUPAGED_PTX_CUH

#include "runtime.h"

inline void griddepcontrol_wait() { host::griddepcontrol_wait(); }
inline void griddepcontrol_launch_dependents() {}

inline float ex2_approx_ftz(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

// A copy lands when a wait asks for it and no earlier; until then its destination holds NaNs.
inline void cp_async_16(void* dst, const void* src, bool valid = true) { host::cp_async_16(dst, src, valid); }
inline unsigned long long evict_first_policy() { return 0; }
inline void cp_async_16_evict_first(void* dst, const void* src, unsigned long long, bool valid) {
  host::cp_async_16(dst, src, valid);
}
inline void cp_async_commit_group() { host::cp_async_commit_group(); }
template <int kPending>
inline void cp_async_wait_group() {
  host::cp_async_wait_group(kPending);
}

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, host::Site site = host::Site::here()) {
  host::ldmatrix_x4(r, row, false, site);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, host::Site site = host::Site::here()) {
  host::ldmatrix_x4(r, row, true, site);
}

inline unsigned movmatrix_trans(unsigned a, host::Site site = host::Site::here()) {
  return host::movmatrix_trans(a, site);
}

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                         host::Site site = host::Site::here());
template <>
inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                        host::Site site) {
  host::mma_m16n8k16(host::HalfType::kBFloat16, d, a, b0, b1, site);
}
template <>
inline void mma_m16n8k16<__half>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, host::Site site) {
  host::mma_m16n8k16(host::HalfType::kHalf, d, a, b0, b1, site);
}

#endif  // CUPAGED_PTX_CUH
