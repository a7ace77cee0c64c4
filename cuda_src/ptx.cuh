// ptx.cuh: the PTX that the portable kernels (sm_80 and up) use, one thin function an instruction, named as PTX names
// it. The host build replaces this header by lane-accurate C++ of the same signatures.
#ifndef CUPAGED_PTX_CUH
#define CUPAGED_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A kernel that is launched to overlap (kernels/launch.py) may begin before the one before it on the stream has ended.
// Until griddepcontrol_wait returns, which is when that one has ended and its writes are visible, it may touch nothing
// that another kernel writes, and write nothing that another one touches. All threads of such a kernel call it, so that
// when it has ended, those before it have. griddepcontrol_launch_dependents lets the next kernel begin, once all thread
// blocks have called it or ended: called early, it gives the next one time for what it does before it waits; called
// after the wait, it also tells the next one that all before this kernel has ended.
// Launched otherwise, and on GPUs before Hopper, both do nothing.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// 2^x, to 2 units in the last place; results below 2^-126 become 0.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Copy 16 bytes from global to shared memory, asynchronously; with valid == false write 16 zero bytes and read
// nothing. dst and src 16-byte aligned.
__device__ __forceinline__ void cp_async_16(void* dst, const void* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}

// What tells L2 to let data go before all else.
__device__ __forceinline__ unsigned long long evict_first_policy() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;\n" : "=l"(policy));
  return policy;
}

// cp_async_16 of what is read once; policy: evict_first_policy().
__device__ __forceinline__ void cp_async_16_evict_first(void* dst, const void* src, unsigned long long policy,
                                                        bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared_address(dst)),
               "l"(src), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Wait until at most kPending of this thread's latest groups are still under way. Other threads' copies are visible
// only after a barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory: lanes 8i .. 8i+7 give the addresses of the rows of matrix i
// (16 bytes each, 16-byte aligned); register i of lane l gets elements 2*(l%4) and +1 of row l/4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// An 8x8 matrix of 16-bit elements across the warp, lane l having elements 2*(l%4) and +1 of row l/4: its transpose.
__device__ __forceinline__ unsigned movmatrix_trans(unsigned a) {
  unsigned d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(d) : "r"(a));
  return d;
}

// d += a * b: a 16x16 (row), b 16x8 (column), d 16x8 in float32. Lane l (g = l/4, t = l%4) holds
//   a: {(g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..)}   b: {(2t.., g), (2t+8.., g)}
//   d: {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                            unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // CUPAGED_PTX_CUH
