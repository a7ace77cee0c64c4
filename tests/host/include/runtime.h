// runtime.h: what a kernel built for the host calls. runtime.cpp, memory.cpp and ptx.cpp implement it.
#ifndef CUPAGED_HOST_RUNTIME_H
#define CUPAGED_HOST_RUNTIME_H

#pragma GCC visibility push(default)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

extern uint3 threadIdx, blockIdx;  // of the thread that runs now
extern dim3 blockDim, gridDim;

namespace host {

// Where in the source a thread stands.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch with this message. Never returns to the kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// -- collectives of a thread block --------------------------------------------------------------------------

enum class Reduce { kNone, kOr, kAnd, kCount };
int block_barrier(const char* name, Reduce reduce, int predicate, Site site);

// -- collectives of a warp: all lanes of mask, or the launch fails ------------------------------------------

// The last lane to arrive calls combine with every lane's operand (null for lanes outside of mask), then all go on.
using Combine = void (*)(void* const operands[32], unsigned mask);
void warp_collective(const char* name, unsigned mask, void* operand, Combine combine, Site site);
void warp_barrier(unsigned mask, Site site);  // the only one that orders memory
unsigned vote(const char* name, unsigned mask, bool predicate, Site site);  // the mask of the lanes that say yes
enum class Shuffle { kIndex, kXor, kUp, kDown };
unsigned long long shuffle(const char* name, Shuffle kind, unsigned mask, unsigned long long bits, int operand,
                           int width, Site site);
void match(const char* name, unsigned mask, unsigned long long (&values)[32], unsigned long long value, Site site);

// -- memory -------------------------------------------------------------------------------------------------

unsigned char* dynamic_shared();
void atomic_read(const void* address, void* old, unsigned size);  // an atomic operation is these two, in this order
void atomic_write(void* address, const void* value, unsigned size);

// -- PTX ----------------------------------------------------------------------------------------------------

enum class HalfType { kHalf, kBFloat16 };
void mma_m16n8k16(HalfType type, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Site site);
void ldmatrix_x4(unsigned (&r)[4], const void* row, bool transposed, Site site);
unsigned movmatrix_trans(unsigned a, Site site);
void cp_async_16(void* dst, const void* src, bool valid);
void cp_async_commit_group();
void cp_async_wait_group(int pending);

void griddepcontrol_wait();
unsigned shared_address(const void* p);
void mbarrier_init(void* barrier, int num_arrivals);
void mbarrier_arrive(void* barrier);
void mbarrier_arrive_expect_tx(void* barrier, int num_bytes);
bool mbarrier_test_wait(void* barrier, int parity);
void mbarrier_wait(void* barrier, int parity, Site site);
void bar_sync(int id, int num_threads, Site site);
void bar_arrive(int id, int num_threads);
void bulk_copy(void* dst, const void* src, int num_bytes, void* barrier, Site site);
// From a matrix [rows, columns] of 16-bit elements at src: box_rows rows of 64.
void store_async(float* dst, const float (&v)[4], void* barrier);
void tensor_copy(void* dst, const unsigned char* src, int rows, int columns, int box_rows, int column, int row,
                 void* barrier, Site site);
void fence_proxy_async();
// a: a descriptor, or registers; b: a descriptor.
void wgmma_ss(HalfType type, float* d, int n, unsigned long long a, unsigned long long b, bool accumulate, Site site);
void wgmma_rs(HalfType type, float* d, int n, const unsigned (&a)[4], unsigned long long b, Site site);
void wgmma_commit_group(Site site);
void wgmma_wait_group(int pending, Site site);
void converge(const char* name, Site site);  // all lanes of a warp, which nothing but their meeting is asked of

}  // namespace host

#pragma GCC visibility pop

#endif  // CUPAGED_HOST_RUNTIME_H
