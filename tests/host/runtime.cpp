// runtime.cpp: thread blocks on the CPU. Each thread is a fiber that runs until it waits for others.
//
// A warp runs as far as it can before the next one starts, so that what one warp needs from another without a barrier
// is not there yet (or is overwritten already). Seeds shuffle thread blocks and warps.
#include "runtime.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <string>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host {

Thread* current;
Launch* launch;
unsigned block_epoch;
bool phase_completed;
std::vector<EngineCopy> engine_copies;

namespace {

struct Random {  // splitmix64
  unsigned long long state;
  unsigned long long operator()() {
    unsigned long long z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
};

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPageBytes = 4096;

void* scheduler_stack_pointer;
Random random;
bool uses_mbarriers;  // the thread block that runs
bool all_wait[kMaxWarps];  // no lane of the warp is runnable, so that there is no need to look
std::vector<std::unique_ptr<Thread>> threads;  // grows to the largest thread block; stacks are kept
int num_threads;
bool failed;

// -- fibers -------------------------------------------------------------------------------------------------

[[noreturn]] void fiber_main();

#if defined(__x86_64__) && !defined(CUPAGED_HOST_UCONTEXT)

// Saves the callee-saved registers on the running stack, its pointer to *save, and continues on stack `load`.
extern "C" void cupaged_host_switch(void** save, void* load);
asm(R"(
.text
.globl cupaged_host_switch
.type cupaged_host_switch, @function
cupaged_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cupaged_host_switch, .-cupaged_host_switch
)");

void prepare_fiber(Thread& thread) {
  void** top = reinterpret_cast<void**>(thread.stack_end) - 1;  // a function starts 8 bytes below a multiple of 16
  *--top = reinterpret_cast<void*>(fiber_main);                // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;                 // the six registers
  thread.stack_pointer = top;
}

void switch_to_fiber(Thread& thread) { cupaged_host_switch(&scheduler_stack_pointer, thread.stack_pointer); }
void switch_to_scheduler() { cupaged_host_switch(&current->stack_pointer, scheduler_stack_pointer); }

#else

}  // namespace
}  // namespace host
#include <ucontext.h>
namespace host {
namespace {

ucontext_t scheduler_context;

void prepare_fiber(Thread& thread) {
  if (!thread.stack_pointer) thread.stack_pointer = new ucontext_t;
  ucontext_t& context = *static_cast<ucontext_t*>(thread.stack_pointer);
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack_begin;
  context.uc_stack.ss_size = thread.stack_end - thread.stack_begin;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
}

void switch_to_fiber(Thread& thread) {
  swapcontext(&scheduler_context, static_cast<ucontext_t*>(thread.stack_pointer));
}
void switch_to_scheduler() { swapcontext(static_cast<ucontext_t*>(current->stack_pointer), &scheduler_context); }

#endif

void fiber_main() {
  launch->call(launch->args);
  current->state = State::kExited;
  switch_to_scheduler();
  __builtin_unreachable();
}

std::unique_ptr<Thread> new_thread() {
  auto thread = std::make_unique<Thread>();
  void* memory = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  mprotect(memory, kPageBytes, PROT_NONE);  // stacks grow down into it
  thread->stack_begin = static_cast<unsigned char*>(memory) + kPageBytes;
  thread->stack_end = thread->stack_begin + kStackBytes;
  return thread;
}

// -- scheduling ---------------------------------------------------------------------------------------------

void shuffle_order(std::vector<unsigned>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
}

std::vector<unsigned> in_order(size_t size) {
  std::vector<unsigned> order(size);
  for (size_t i = 0; i < size; ++i) order[i] = unsigned(i);
  return order;
}

Thread& lane_of(int warp, int lane) { return *threads[warp * kWarpSize + lane]; }
int lanes_in(int warp) { return std::min(kWarpSize, num_threads - warp * kWarpSize); }

void run_warp(int warp) {  // until all of its lanes wait or have exited
  for (bool progress = !all_wait[warp]; progress && !failed;) {
    progress = false;
    for (int lane = 0; lane < lanes_in(warp) && !failed; ++lane) {
      Thread& thread = lane_of(warp, lane);
      if (thread.state != State::kRunnable) continue;
      progress = true;
      current = &thread;
      threadIdx = thread.index;
      switch_to_fiber(thread);
    }
  }
  all_wait[warp] = true;
  current = nullptr;
}

// Mostly it is one literal; AddressSanitizer's strcmp is slow, and these are compared at every collective.
bool same_text(const char* a, const char* b) { return a == b || !strcmp(a, b); }

std::string describe(const Thread& thread) {
  char text[512];
  const uint3 i = thread.index;
  if (thread.state == State::kExited)
    snprintf(text, sizeof text, "thread (%u, %u, %u) has exited", i.x, i.y, i.z);
  else
    snprintf(text, sizeof text, "thread (%u, %u, %u) waits in %s at %s:%d", i.x, i.y, i.z, thread.waits_in,
             thread.site.file, thread.site.line);
  return text;
}

void report(Thread& thread, const char* format, va_list list) {
  if (failed) return;
  failed = true;
  launch->fault_pc = thread.pc;
  const int length = vsnprintf(launch->error, sizeof launch->error, format, list);
  if (length < 0 || length >= int(sizeof launch->error)) return;
  snprintf(launch->error + length, sizeof launch->error - length, " [block (%u, %u, %u), thread (%u, %u, %u)]",
           blockIdx.x, blockIdx.y, blockIdx.z, thread.index.x, thread.index.y, thread.index.z);
}

void report(Thread& thread, const char* format, ...) {
  va_list list;
  va_start(list, format);
  report(thread, format, list);
  va_end(list);
}

// All threads wait or have exited, and no barrier is complete: say who is missing where.
void diagnose_deadlock() {
  for (int i = 0; i < num_threads; ++i)
    if (threads[i]->state == State::kAtMbarrier)
      return report(*threads[i], "%s:%d: %s: nobody is left to complete the phase of parity %d",
                    threads[i]->site.file, threads[i]->site.line, threads[i]->waits_in, threads[i]->parity);
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = *threads[i];
    if (thread.state != State::kAtWarpCollective) continue;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(thread.mask >> lane & 1)) continue;
      if (lane >= lanes_in(thread.warp))
        return report(thread, "%s:%d: %s with mask 0x%08x, but the warp has %d lanes", thread.site.file,
                      thread.site.line, thread.waits_in, thread.mask, lanes_in(thread.warp));
      const Thread& other = lane_of(thread.warp, lane);
      const bool joined = other.state == State::kAtWarpCollective && other.mask == thread.mask &&
                          other.site.line == thread.site.line && same_text(other.waits_in, thread.waits_in) &&
                          same_text(other.site.file, thread.site.file);
      if (!joined)
        return report(thread, "%s:%d: %s with mask 0x%08x, but lane %d of the warp does not take part: %s",
                      thread.site.file, thread.site.line, thread.waits_in, thread.mask, lane, describe(other).c_str());
    }
  }
  Thread* waiting = nullptr;
  for (int i = 0; i < num_threads && !waiting; ++i)
    if (threads[i]->state == State::kAtBlockBarrier) waiting = threads[i].get();
  for (int i = 0; i < num_threads; ++i) {
    const Thread& other = *threads[i];
    if (other.state != State::kAtBlockBarrier || other.site.line != waiting->site.line ||
        !same_text(other.site.file, waiting->site.file))
      return report(*waiting, "%s:%d: %s is not reached by all threads of the block: %s", waiting->site.file,
                    waiting->site.line, waiting->waits_in, describe(other).c_str());
  }
}

// Lets all threads go on if all of them wait at one barrier.
bool complete_barrier() {
  const Thread& first = *threads[0];
  int count = 0;
  for (int i = 0; i < num_threads; ++i) {
    const Thread& thread = *threads[i];
    if (thread.state != State::kAtBlockBarrier || thread.site.line != first.site.line ||
        thread.reduce != first.reduce || !same_text(thread.site.file, first.site.file))
      return false;
    count += thread.value != 0;
  }
  const int result = first.reduce == Reduce::kOr    ? count != 0
                     : first.reduce == Reduce::kAnd ? count == num_threads
                                                    : count;
  for (int i = 0; i < num_threads; ++i) {
    threads[i]->value = result;
    threads[i]->state = State::kRunnable;
  }
  std::fill_n(all_wait, kMaxWarps, false);
  ++block_epoch;
  note_barrier();
  return true;
}

// Lets those threads go on that wait in this state, and whose wait is over; whether there are any.
template <typename IsOver>
bool resume(State state, IsOver is_over) {
  bool any = false;
  for (int i = 0; i < num_threads && uses_mbarriers; ++i) {
    Thread& thread = *threads[i];
    if (thread.state != state || !is_over(thread)) continue;
    thread.state = State::kRunnable;
    all_wait[thread.warp] = false;
    any = true;
  }
  return any;
}

bool complete_mbarriers() {
  if (!phase_completed) return false;
  phase_completed = false;
  return resume(State::kAtMbarrier, [](const Thread& thread) {
    return mbarrier_is_past(thread.barrier, thread.parity);
  });
}

// One copy of the engine lands, in any order.
bool land_copy() {
  if (engine_copies.empty()) return false;
  const size_t i = launch->seed ? random() % engine_copies.size() : 0;
  land(engine_copies[i]);
  engine_copies.erase(engine_copies.begin() + i);
  return true;
}

bool resume_delayed() {
  return resume(State::kDelayed, [](const Thread&) { return true; });
}

bool waits_at_mbarrier() {
  return std::any_of(threads.begin(), threads.begin() + num_threads,
                     [](const auto& thread) { return thread->state == State::kAtMbarrier; });
}

void run_block() {
  ++block_epoch;
  uses_mbarriers = false;
  engine_copies.clear();
  begin_numbered_barriers();
  begin_block();
  std::fill_n(all_wait, kMaxWarps, false);
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = *threads[i];
    thread.state = State::kRunnable;
    thread.warp_epoch = 0;
    thread.has_waited = false;
    thread.num_groups = 0;
    thread.copies.clear();
    thread.unfenced.clear();
    thread.products.clear();
    thread.accumulators.clear();
    thread.num_product_groups = 0;
    thread.pc = nullptr;
    prepare_fiber(thread);
  }
  std::vector<unsigned> warps = in_order((num_threads + kWarpSize - 1) / kWarpSize);
  bool skipped;
  do {
    skipped = false;
    if (launch->seed) shuffle_order(warps);
    for (unsigned warp : warps) {
      const bool skip = uses_mbarriers && coin();  // so that some warps get ahead of others
      skipped |= skip;
      if (!failed && !skip) run_warp(int(warp));
    }
  } while (!failed && (complete_barrier() || complete_mbarriers() || skipped || resume_delayed() ||
                       (waits_at_mbarrier() && land_copy())));
  for (int i = 0; i < num_threads; ++i)
    for (const Copy& copy : threads[i]->copies) drop_copy(copy.dst);
  for (const EngineCopy& copy : engine_copies)
    for (const Transfer& transfer : copy.transfers) drop_transfer(transfer.dst);
  if (failed) return;
  for (int i = 0; i < num_threads; ++i)
    if (threads[i]->state != State::kExited) return diagnose_deadlock();
  for (int i = 0; i < num_threads; ++i)
    if (launch->overlaps && !threads[i]->has_waited)
      return report(*threads[i], "exits without griddepcontrol_wait: the kernel before this one may still run");
  if (!engine_copies.empty()) {
    const EngineCopy& copy = engine_copies[0];
    return report(*copy.thread, "%s:%d: the thread block exits before this copy has been waited for", copy.site.file,
                  copy.site.line);
  }
  if (!numbered_barriers_are_free())
    return report(*threads[0], "the thread block exits, and one of its numbered barriers still waits for threads");
  for (int i = 0; i < num_threads; ++i)
    if (!threads[i]->products.empty()) {
      const Site site = threads[i]->products[0].site;
      return report(*threads[i], "%s:%d: the thread exits before this wgmma has been waited for", site.file, site.line);
    }
}

}  // namespace

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  report(*current, format, list);
  va_end(list);
  switch_to_scheduler();  // which leaves the launch, and this fiber for good
  __builtin_unreachable();
}

bool coin() { return launch->seed && random() % 2; }

void wait_for_others(State state) {
  uses_mbarriers = true;
  current->state = state;
  switch_to_scheduler();
}

// -- collectives --------------------------------------------------------------------------------------------

int block_barrier(const char* name, Reduce reduce, int predicate, Site site) {
  ENTER();
  Thread& self = *current;
  self.waits_in = name;
  self.site = site;
  self.reduce = reduce;
  self.value = predicate;
  self.state = State::kAtBlockBarrier;
  switch_to_scheduler();
  return self.value;
}

void warp_collective(const char* name, unsigned mask, void* operand, Combine combine, Site site) {
  Thread& self = *current;
  if (!(mask >> self.lane & 1))
    fail("%s:%d: lane %d calls %s with mask 0x%08x, in which it is not", site.file, site.line, self.lane, name, mask);
  self.waits_in = name;
  self.site = site;
  self.mask = mask;
  self.operand = operand;
  self.state = State::kAtWarpCollective;

  void* operands[kWarpSize] = {};
  const int lanes = lanes_in(self.warp);
  for (int lane = kWarpSize - 1; lane >= 0; --lane) {  // the last one to come is asked first
    if (!(mask >> lane & 1)) continue;
    if (lane >= lanes) return switch_to_scheduler();  // never complete; the scheduler says why
    const Thread& other = lane_of(self.warp, lane);
    if (other.state != State::kAtWarpCollective || other.mask != mask || other.site.line != site.line ||
        !same_text(other.waits_in, name) || !same_text(other.site.file, site.file))
      return switch_to_scheduler();  // a later lane completes it
    operands[lane] = other.operand;
  }
  combine(operands, mask);
  for (int lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1) lane_of(self.warp, lane).state = State::kRunnable;
}

void warp_barrier(unsigned mask, Site site) {
  ENTER();
  warp_collective(
      "__syncwarp", mask, &current->warp_epoch,
      [](void* const operands[32], unsigned) {
        unsigned epoch = 0;
        for (int lane = 0; lane < kWarpSize; ++lane)
          if (operands[lane]) epoch = std::max(epoch, *static_cast<unsigned*>(operands[lane]));
        for (int lane = 0; lane < kWarpSize; ++lane)
          if (operands[lane]) *static_cast<unsigned*>(operands[lane]) = epoch + 1;
      },
      site);
}

unsigned vote(const char* name, unsigned mask, bool predicate, Site site) {
  ENTER();
  unsigned operand = predicate;
  warp_collective(
      name, mask, &operand,
      [](void* const operands[32], unsigned) {
        unsigned ballot = 0;
        for (int lane = 0; lane < kWarpSize; ++lane)
          if (operands[lane]) ballot |= *static_cast<unsigned*>(operands[lane]) << lane;
        for (int lane = 0; lane < kWarpSize; ++lane)
          if (operands[lane]) *static_cast<unsigned*>(operands[lane]) = ballot;
      },
      site);
  return operand;
}

void match(const char* name, unsigned mask, unsigned long long (&values)[32], unsigned long long value, Site site) {
  ENTER();
  struct Operand {
    unsigned long long value, *values;
  } operand{value, values};
  warp_collective(
      name, mask, &operand,
      [](void* const operands[32], unsigned) {
        for (int to = 0; to < kWarpSize; ++to)
          for (int from = 0; from < kWarpSize && operands[to]; ++from)
            if (operands[from])
              static_cast<Operand*>(operands[to])->values[from] = static_cast<Operand*>(operands[from])->value;
      },
      site);
}

unsigned long long shuffle(const char* name, Shuffle kind, unsigned mask, unsigned long long bits, int operand,
                           int width, Site site) {
  ENTER();
  if (width < 1 || width > kWarpSize || (width & (width - 1)))
    fail("%s:%d: %s: width %d is not a power of two up to 32", site.file, site.line, name, width);
  const int lane = current->lane, first = lane & ~(width - 1);
  int source = lane;
  if (kind == Shuffle::kIndex) source = first + (operand & (width - 1));
  if (kind == Shuffle::kXor && (lane ^ operand) < first + width) source = lane ^ operand;
  if (kind == Shuffle::kUp && lane - operand >= first) source = lane - operand;
  if (kind == Shuffle::kDown && lane + operand < first + width) source = lane + operand;
  if (!(mask >> source & 1))
    fail("%s:%d: lane %d reads lane %d by %s, which is not in mask 0x%08x", site.file, site.line, lane, source, name,
         mask);
  struct Operand {
    unsigned long long bits, result;
    int source;
  } exchange{bits, 0, source};
  warp_collective(
      name, mask, &exchange,
      [](void* const operands[32], unsigned) {
        for (int i = 0; i < kWarpSize; ++i)
          if (auto* to = static_cast<Operand*>(operands[i]))
            to->result = static_cast<Operand*>(operands[to->source])->bits;
      },
      site);
  return exchange.result;
}

// -- launch -------------------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) void cupaged_host_launch(Launch* request) {
  launch = request;
  launch->error[0] = 0;
  launch->fault_pc = nullptr;
  failed = false;
  gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
  blockDim = {launch->block[0], launch->block[1], launch->block[2]};
  num_threads = int(blockDim.x * blockDim.y * blockDim.z);
  while (int(threads.size()) < num_threads) {
    threads.push_back(new_thread());
    if (!threads.back()) {
      threads.pop_back();
      snprintf(launch->error, sizeof launch->error, "no memory for the stacks of %d threads", num_threads);
      launch = nullptr;
      return;
    }
  }
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = *threads[i];
    thread.number = i;
    thread.warp = i / kWarpSize;
    thread.lane = i % kWarpSize;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
  begin_launch();

  random = {launch->seed};
  std::vector<unsigned> blocks = in_order(size_t(gridDim.x) * gridDim.y * gridDim.z);
  if (launch->seed) shuffle_order(blocks);
  for (unsigned block : blocks) {
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / (gridDim.x * gridDim.y)};
    run_block();
    if (failed) break;
  }
  current = nullptr;
  launch = nullptr;
}

}  // namespace host
