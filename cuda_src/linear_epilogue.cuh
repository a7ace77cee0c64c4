// linear_epilogue.cuh: what the matrix products do with a sum, before the one rounding at the store.
#ifndef CUPAGED_LINEAR_EPILOGUE_CUH
#define CUPAGED_LINEAR_EPILOGUE_CUH

enum Epilogue {  // twin in kernels/linear.py
  kStore,
  kAccumulate,  // out, which is float, is added to
  kSiluAndMul,  // out, of 2 bytes an element, has half as many columns: rows 2j and 2j + 1 of weight are gate and up
};

// Whether a kernel that writes out_t does `epilogue` when it is asked for `asked`. What it never does is left out by
// the compiler.
template <typename out_t>
__device__ __forceinline__ bool accumulates(int asked) { return sizeof(out_t) == 4 && asked == kAccumulate; }
template <typename out_t>
__device__ __forceinline__ bool gates(int asked) { return sizeof(out_t) == 2 && asked == kSiluAndMul; }

__device__ __forceinline__ float silu_and_mul(float gate, float up) { return gate / (1.f + expf(-gate)) * up; }

#endif  // CUPAGED_LINEAR_EPILOGUE_CUH
