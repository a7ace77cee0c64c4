// state.h: what the parts of the host runtime share. Kernels see runtime.h only.
#ifndef CUPAGED_HOST_STATE_H
#define CUPAGED_HOST_STATE_H

#include <vector>

#include "runtime.h"

namespace host {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;  // of a thread block

// Bytes that a launch may touch. cupaged's loader fills these in, one for each array.
struct Region {
  const unsigned char* begin;
  const unsigned char* end;
  int writable;
  const char* name;
};

// One launch, as the loader hands it over (build.py has the same struct).
struct Launch {
  void (*call)(void* const* args);
  void* const* args;
  unsigned grid[3], block[3];
  unsigned long long seed;  // of the order of thread blocks and warps; 0 keeps them in order
  unsigned char *static_begin, *static_end;  // static shared memory
  const Region* regions;
  int num_regions;
  int overlaps;  // it waits for the kernel before it, and must not write before
  unsigned shared_bytes;  // dynamic shared memory
  void* fault_pc;         // out: where in the kernel's code the launch failed, or null
  void* image;            // out: where the kernel's shared library begins
  char error[4096];       // out: why, or empty
};

struct Thread;

// A cp.async that has not landed.
struct Copy {
  unsigned char* dst;
  const unsigned char* src;
  bool valid;
  int group;  // the number of its commit group, counted from the thread's start
};

// 16 bytes on their way by the copy engine.
struct Transfer {
  unsigned char* dst;
  const unsigned char* src;  // null: zeros
};

// A copy by the engine that has not landed. It lands when no thread can go on without it.
struct EngineCopy {
  std::vector<Transfer> transfers;
  void* barrier;
  int num_bytes;
  Thread* thread;  // that started it
  Site site;
};

// A wgmma that has not been waited for. It reads its operands when it must have done so, and no earlier.
struct Product {
  HalfType type;
  float* d;
  int n;
  const unsigned* a_registers;  // null where a is a descriptor
  unsigned long long a, b;
  bool accumulate;
  int group;  // the number of its commit group, counted from the thread's start
  Site site;
};

// What a wgmma that is under way adds to: d itself holds NaNs until all of them are done.
struct Accumulator {
  float* d;
  std::vector<float> values;
};

// kDelayed: until the others can't go on without it
enum class State { kRunnable, kAtBlockBarrier, kAtWarpCollective, kAtMbarrier, kDelayed, kExited };

struct Thread {
  void* stack_pointer;
  unsigned char *stack_begin, *stack_end;
  uint3 index;
  int number, warp, lane;
  State state;
  void* pc;  // return address into the kernel of the latest call that can fail

  // While it waits:
  const char* waits_in;  // the name of the collective
  Site site;
  unsigned mask;
  void* operand;
  Reduce reduce;
  int value;  // a block barrier's predicate, then its result

  bool has_waited;      // for the kernel before this one
  unsigned warp_epoch;  // grows with each __syncwarp
  std::vector<Copy> copies;
  int num_groups;  // committed so far
  std::vector<unsigned char*> unfenced;  // where its copies have landed since its last fence.proxy.async

  const void* barrier;  // the mbarrier that it waits for, and the parity of the phase
  int parity;
  std::vector<Product> products;
  std::vector<Accumulator> accumulators;
  int num_product_groups;  // committed so far
  int max_pending;         // of these, at the wait that it is in
};

extern std::vector<EngineCopy> engine_copies;  // of the thread block, under way

extern Thread* current;    // null outside of a launch
extern Launch* launch;     // null outside of a launch
extern unsigned block_epoch;  // grows with each thread block and each of its barriers
extern bool phase_completed;  // of some mbarrier, since the scheduler last asked who waits for one

// -- memory.cpp ---------------------------------------------------------------------------------------------

enum class Access { kRead, kWrite, kAtomic };
void access(const void* address, unsigned size, Access kind);  // fails the launch unless it is in bounds and race-free
void begin_launch();  // sets up shared memory and the table of regions
void begin_block();   // poisons shared memory
void begin_copy(void* dst, const void* src, bool valid);  // an asynchronous write of 16 bytes: not readable yet
void end_copy(void* dst);                                 // it has landed
void drop_copy(void* dst);                                // it never will: its thread has exited
void begin_transfer(void* dst, const Thread& self, Site site);  // the same by the copy engine
void end_transfer(void* dst);                                   // its bytes are visible to all who waited for them
void drop_transfer(void* dst);
void note_arrival(int warp);  // at an mbarrier: what the warp has read so far may be overwritten by who waits for it
void note_barrier();          // the same of all warps
void note_meeting(unsigned warps);  // (a bit each) at a numbered barrier: what they did before is done, to each other
void fence_copy(void* dst);                               // wgmma may read what has landed
const unsigned char* async_read(unsigned address);        // 16 bytes of shared memory, as wgmma reads them

// -- runtime.cpp --------------------------------------------------------------------------------------------

bool coin();  // drawn from the launch's seed
void wait_for_others(State state);  // until the scheduler makes the running thread runnable again
bool mbarrier_is_past(const void* barrier, int parity);  // ptx.cpp: whether that phase has completed
void begin_numbered_barriers();                          // ptx.cpp: those of bar_sync, at a thread block's start
bool numbered_barriers_are_free();                       // ptx.cpp: whether no phase of them is half complete
void land(const EngineCopy& copy);                       // ptx.cpp: its bytes are there, and count at its barrier

}  // namespace host

// At the top of each function that a kernel calls: a failure is reported at the kernel's line.
#define ENTER() (::host::current ? void(::host::current->pc = __builtin_return_address(0)) : void())

#endif  // CUPAGED_HOST_STATE_H
