// ring.cuh: a walk through the stages of a ring in shared memory.
#ifndef CUPAGED_RING_CUH
#define CUPAGED_RING_CUH

// Where the walk stands: the stage, and the parity of its phase.
template <int kStages>
struct RingPlace {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

#endif  // CUPAGED_RING_CUH
