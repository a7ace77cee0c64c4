// memory.cpp: watches every access of a kernel. The compiler puts the calls in, with -fsanitize=thread (one for each
// access) and -fsanitize=undefined. The functions that they call are here instead of in the sanitizers' own libraries:
// it is known here which arrays the launch was given and which thread asks, and a finding ends the launch, not the
// process.
//
// Bounds: an access lies in one array of the launch, in shared memory, on the thread's stack or in constants.
// Races:  in shared memory, two threads that touch a byte, one of them writing, have a __syncthreads between them, or a
//         __syncwarp if they are of one warp. Nothing else orders them (a shuffle does not), but for what the copy engine
//         writes: it must have landed at an mbarrier before it is read, and each warp that reads there has arrived at
//         one before the next copy to that place starts.
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "state.h"

// AddressSanitizer's, null unless its library is loaded into the process.
extern "C" __attribute__((weak)) void __asan_poison_memory_region(void const volatile* begin, size_t size);
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(void const volatile* begin, size_t size);

namespace host {

namespace {

constexpr short kNobody = -1, kSeveral = -2;

// What happened last to a byte of shared memory.
struct Cell {
  unsigned write_epoch, write_warp_epoch;
  unsigned read_epoch, read_warp_epoch;
  unsigned write_meeting, read_meeting;  // how many there had been
  unsigned readers;                      // warps, a bit each
  short writer;                 // thread number
  short read_warp, read_lane;   // kSeveral: more than one since that epoch
  bool write_atomic, copying;   // copying: the destination of a cp.async that hasn't landed
  bool unfenced;                // one has landed there, and no fence.proxy.async followed
  bool transferring;            // copying, by the copy engine
};

// When (in arrivals of all warps) a warp has last read 16 bytes of shared memory; 0: not since something landed there.
unsigned num_arrivals;                // at mbarriers and __syncthreads, of the thread block so far, and 1
unsigned latest_arrivals[kMaxWarps];  // of each warp

unsigned num_meetings;                            // of warps at numbered barriers, so far
unsigned latest_meetings[kMaxWarps][kMaxWarps];  // of two warps: which it was

struct SharedMemory {
  unsigned char* begin = nullptr;
  unsigned char* end = nullptr;
  const char* name = nullptr;
  std::vector<Cell> cells;
  std::vector<unsigned> chunk_reads = {};  // [chunks of 16 bytes][kMaxWarps]

  bool holds(const unsigned char* p) const { return p >= begin && p < end; }
};

SharedMemory shared[2] = {{nullptr, nullptr, "dynamic shared memory", {}}, {nullptr, nullptr, "static shared memory", {}}};
// What a thread block may have on the largest GPU. It begins at a multiple of 128, but of no more: nothing more is promised.
alignas(1024) unsigned char dynamic_memory[(227 << 10) + 128];
std::vector<Region> regions;
size_t latest_region;  // the one that held the latest access

// -- races --------------------------------------------------------------------------------------------------

bool ordered(const Cell& cell, const Thread& self) {  // the latest write, before what self does now
  return cell.write_epoch != block_epoch || cell.writer == self.number ||
         (cell.writer / kWarpSize == self.warp && cell.write_warp_epoch < self.warp_epoch) ||
         cell.write_meeting < latest_meetings[self.warp][cell.writer / kWarpSize];
}

bool readers_were_met(const Cell& cell, const Thread& self) {  // by the warp of self, since the latest read
  for (int warp = 0; warp < kMaxWarps; ++warp)
    if (cell.readers >> warp & 1 && cell.read_meeting >= latest_meetings[self.warp][warp]) return false;
  return true;
}

bool read_before(const Cell& cell, const Thread& self) {  // all reads, before what self does now
  return cell.read_epoch != block_epoch || cell.read_warp == kNobody ||
         (cell.read_warp == self.warp && (cell.read_lane == self.lane || cell.read_warp_epoch < self.warp_epoch)) ||
         readers_were_met(cell, self);
}

void note_read(Cell& cell, const Thread& self) {
  const bool first = cell.read_epoch != block_epoch || cell.read_warp == kNobody;
  cell.readers = (first ? 0u : cell.readers) | 1u << self.warp;
  cell.read_meeting = num_meetings;
  if (!first && cell.read_warp != self.warp) {
    cell.read_warp = kSeveral;
  } else if (!first && cell.read_lane != self.lane && cell.read_warp_epoch >= self.warp_epoch) {
    cell.read_lane = kSeveral;
  } else {
    cell.read_epoch = block_epoch;
    cell.read_warp = short(self.warp);
    cell.read_lane = short(self.lane);
    cell.read_warp_epoch = self.warp_epoch;
  }
}

void note_write(Cell& cell, const Thread& self, bool atomic) {
  cell.write_epoch = block_epoch;
  cell.write_warp_epoch = self.warp_epoch;
  cell.write_meeting = num_meetings;
  cell.writer = short(self.number);
  cell.write_atomic = atomic;
  cell.read_warp = kNobody;
}

Cell& cell_of(void* dst, int i) {  // of a byte of what a cp.async copies
  auto* p = static_cast<unsigned char*>(dst) + i;
  SharedMemory& memory = shared[0].holds(p) ? shared[0] : shared[1];
  return memory.cells[p - memory.begin];
}

void access_shared(SharedMemory& memory, const unsigned char* p, unsigned size, Access kind) {
  const Thread& self = *current;
  const size_t offset = p - memory.begin;
  for (size_t i = offset; i < offset + size; ++i) {
    Cell& cell = memory.cells[i];
    if (cell.transferring)
      fail("race: byte %zu of %s is the destination of a copy by thread number %d that has not landed", i, memory.name,
           cell.writer);
    if (cell.copying)
      fail("race: byte %zu of %s is the destination of a cp.async by thread number %d that no cp_async_wait_group has "
           "waited for", i, memory.name, cell.writer);
    if (!ordered(cell, self) && !(kind == Access::kAtomic && cell.write_atomic))
      fail("race: %s byte %zu of %s, which thread number %d %s with no barrier between",
           kind == Access::kRead ? "reads" : "writes", i, memory.name, cell.writer,
           cell.write_atomic ? "updated atomically" : "wrote");
    if (kind == Access::kRead) {
      note_read(cell, self);
      memory.chunk_reads[i / 16 * kMaxWarps + self.warp] = num_arrivals;
      continue;
    }
    if (!read_before(cell, self)) {
      char reader[64] = "threads of several warps";
      if (cell.read_warp >= 0 && cell.read_lane >= 0)
        snprintf(reader, sizeof reader, "thread number %d", cell.read_warp * kWarpSize + cell.read_lane);
      else if (cell.read_warp >= 0)
        snprintf(reader, sizeof reader, "several lanes of warp %d", cell.read_warp);
      fail("race: writes byte %zu of %s, which %s read with no barrier between", i, memory.name, reader);
    }
    note_write(cell, self, kind == Access::kAtomic);
  }
}

// -- bounds -------------------------------------------------------------------------------------------------

// The constants of the kernel's shared library become readable; returns where it begins.
void* add_constants(const void* kernel) {
  struct Search {
    uintptr_t address, begin;
  } search{reinterpret_cast<uintptr_t>(kernel), 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& search = *static_cast<Search*>(data);
        const auto holds = [&](const auto& header) {
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          return header.p_type == PT_LOAD && search.address >= begin && search.address < begin + header.p_memsz;
        };
        const auto* const end = info->dlpi_phdr + info->dlpi_phnum;
        if (std::none_of(info->dlpi_phdr, end, holds)) return 0;
        search.begin = info->dlpi_addr;
        for (const auto* header = info->dlpi_phdr; header != end; ++header) {
          if (header->p_type != PT_LOAD || header->p_flags & PF_W) continue;
          const auto* begin = reinterpret_cast<const unsigned char*>(info->dlpi_addr + header->p_vaddr);
          regions.push_back({begin, begin + header->p_memsz, 0, "the constants of the kernel"});
        }
        return 1;
      },
      &search);
  return reinterpret_cast<void*>(search.begin);
}

template <typename T>
void add_builtin(const T& variable, const char* name) {
  const auto* begin = reinterpret_cast<const unsigned char*>(&variable);
  regions.push_back({begin, begin + sizeof variable, 0, name});
}

bool region_allows(const Region& region, const unsigned char* p, unsigned size, Access kind) {
  return p >= region.begin && p + size <= region.end && (kind == Access::kRead || region.writable);
}

void out_of_bounds(const unsigned char* p, unsigned size, Access kind) {
  const char* verb = kind == Access::kRead ? "reads" : "writes";
  const Region* nearest = nullptr;
  size_t nearest_distance = size_t(1) << 20;  // farther away it's no neighbour
  std::vector<Region> all = regions;
  for (const SharedMemory& memory : shared) all.push_back({memory.begin, memory.end, 1, memory.name});
  for (const Region& region : all) {
    if (p >= region.begin && p + size <= region.end)
      fail("out of bounds: writes %u bytes to %s, which is read-only", size, region.name);
    const size_t distance = p < region.begin ? region.begin - p : p + size - region.end;
    if (distance < nearest_distance) nearest = &region, nearest_distance = distance;
  }
  if (!nearest) fail("out of bounds: %s %u bytes at %p, far from every array of the launch", verb, size, p);
  if (p < nearest->begin)
    fail("out of bounds: %s %u bytes, %zu bytes before the start of %s", verb, size, size_t(nearest->begin - p),
         nearest->name);
  fail("out of bounds: %s %u bytes at offset %zu of %s, which has %zu bytes", verb, size, size_t(p - nearest->begin),
       nearest->name, size_t(nearest->end - nearest->begin));
}

}  // namespace

void access(const void* address, unsigned size, Access kind) {
  const auto* p = static_cast<const unsigned char*>(address);
  for (SharedMemory& memory : shared)
    if (memory.holds(p) && p + size <= memory.end) return access_shared(memory, p, size, kind);
  if (p >= current->stack_begin && p + size <= current->stack_end) return;
  if (kind != Access::kRead && launch->overlaps && !current->has_waited)
    fail("writes %u bytes before griddepcontrol_wait: the kernel before this one may still read or write them", size);
  if (region_allows(regions[latest_region], p, size, kind)) return;
  for (size_t i = 0; i < regions.size(); ++i)
    if (region_allows(regions[i], p, size, kind)) {
      latest_region = i;
      return;
    }
  out_of_bounds(p, size, kind);
}

void atomic_read(const void* address, void* old, unsigned size) {
  ENTER();
  access(address, size, Access::kAtomic);
  memcpy(old, address, size);
}

void atomic_write(void* address, const void* value, unsigned size) { memcpy(address, value, size); }

unsigned char* dynamic_shared() { return shared[0].begin; }

void begin_launch() {
  shared[0].begin = dynamic_memory + 128;
  shared[0].end = shared[0].begin + launch->shared_bytes;
  shared[1].begin = launch->static_begin;
  shared[1].end = launch->static_end;
  for (SharedMemory& memory : shared) {
    memory.cells.assign(memory.end - memory.begin, Cell{});
    memory.chunk_reads.assign((memory.cells.size() + 15) / 16 * kMaxWarps, 0);
  }
  if (__asan_poison_memory_region) {  // it knows where heap arrays end; this array it doesn't
    __asan_unpoison_memory_region(dynamic_memory, sizeof dynamic_memory);
    __asan_poison_memory_region(shared[0].end, dynamic_memory + sizeof dynamic_memory - shared[0].end);
  }
  block_epoch = 0;
  regions.assign(launch->regions, launch->regions + launch->num_regions);
  launch->image = add_constants(reinterpret_cast<const void*>(launch->call));
  add_builtin(threadIdx, "threadIdx");
  add_builtin(blockIdx, "blockIdx");
  add_builtin(blockDim, "blockDim");
  add_builtin(gridDim, "gridDim");
  latest_region = 0;
}

void begin_block() {
  note_barrier();
  for (SharedMemory& memory : shared) memset(memory.begin, 0xff, memory.end - memory.begin);  // NaN in every type
}

void begin_copy(void* dst, const void* src, bool valid) {
  auto* p = static_cast<unsigned char*>(dst);
  SharedMemory* memory = shared[0].holds(p) ? &shared[0] : shared[1].holds(p) ? &shared[1] : nullptr;
  if (!memory || p + 16 > memory->end) fail("cp.async: the destination is not in shared memory");
  if (valid) access(src, 16, Access::kRead);
  access(dst, 16, Access::kWrite);
  for (int i = 0; i < 16; ++i) memory->cells[p - memory->begin + i].copying = true;
}

void end_copy(void* dst) {
  drop_copy(dst);
  access(dst, 16, Access::kWrite);
  for (int i = 0; i < 16; ++i) cell_of(dst, i).unfenced = true;
}

void begin_transfer(void* dst, const Thread& self, Site site) {
  auto* p = static_cast<unsigned char*>(dst);
  SharedMemory& memory = shared[0];
  if (!memory.holds(p) || p + 16 > memory.end)
    fail("%s:%d: the destination of the copy is not in dynamic shared memory", site.file, site.line);
  const size_t offset = p - memory.begin;
  for (size_t i = offset; i < offset + 16; ++i) {
    Cell& cell = memory.cells[i];
    if (cell.copying) fail("race: the copy overwrites byte %zu of %s, where another has not landed", i, memory.name);
    if (!ordered(cell, self))
      fail("race: the copy overwrites byte %zu of %s, which thread number %d wrote with no barrier between", i,
           memory.name, cell.writer);
  }
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    const unsigned read = memory.chunk_reads[offset / 16 * kMaxWarps + warp];
    if (warp != self.warp && read != 0 && latest_arrivals[warp] <= read)
      fail("race: the copy overwrites byte %zu of %s, which warp %d has read and not arrived anywhere since", offset,
           memory.name, warp);
  }
  memset(dst, 0xff, 16);
  for (size_t i = offset; i < offset + 16; ++i) {
    memory.cells[i] = Cell{};
    memory.cells[i].writer = short(self.number);
    memory.cells[i].copying = memory.cells[i].transferring = true;
  }
}

void end_transfer(void* dst) {
  drop_transfer(dst);
  const size_t offset = static_cast<unsigned char*>(dst) - shared[0].begin;
  std::fill_n(shared[0].chunk_reads.begin() + offset / 16 * kMaxWarps, kMaxWarps, 0u);
}

void drop_transfer(void* dst) {
  for (int i = 0; i < 16; ++i) cell_of(dst, i) = Cell{};
}

void note_arrival(int warp) { latest_arrivals[warp] = ++num_arrivals; }

void note_barrier() {
  ++num_arrivals;
  std::fill_n(latest_arrivals, kMaxWarps, num_arrivals);
}

void note_meeting(unsigned warps) {
  ++num_meetings;
  for (int a = 0; a < kMaxWarps; ++a)
    for (int b = 0; b < kMaxWarps; ++b)
      if (warps >> a & warps >> b & 1) latest_meetings[a][b] = num_meetings;
}

void fence_copy(void* dst) {
  for (int i = 0; i < 16; ++i) cell_of(dst, i).unfenced = false;
}

void drop_copy(void* dst) {
  for (int i = 0; i < 16; ++i) cell_of(dst, i).copying = false;
}

const unsigned char* async_read(unsigned address) {
  SharedMemory& memory = shared[0];
  const unsigned offset = (address - shared_address(memory.begin)) % (1u << 18);
  if (offset + 16 > memory.cells.size()) fail("out of bounds: wgmma reads at offset %u of %s", offset, memory.name);
  for (unsigned i = offset; i < offset + 16; ++i) {
    const Cell& cell = memory.cells[i];
    if (cell.copying) fail("race: wgmma reads byte %u of %s, where a copy has not landed", i, memory.name);
    if (cell.unfenced)
      fail("race: wgmma reads byte %u of %s, which thread number %d filled by cp.async with no fence.proxy.async", i,
           memory.name, cell.writer);
  }
  return memory.begin + offset;
}

}  // namespace host

// -- what -fsanitize=thread calls ---------------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

#define WATCH(suffix, kind)                                                                    \
  EXPORT void __tsan_##suffix(const void* address, size_t size) {                              \
    ENTER();                                                                                   \
    host::access(address, unsigned(size), host::Access::kind);                                 \
  }
#define WATCH_SIZE(suffix, size, kind)                                                         \
  EXPORT void __tsan_##suffix##size(const void* address) {                                     \
    ENTER();                                                                                   \
    host::access(address, size, host::Access::kind);                                           \
  }
#define WATCH_SIZES(suffix, kind)                                                              \
  WATCH_SIZE(suffix, 1, kind)                                                                  \
  WATCH_SIZE(suffix, 2, kind)                                                                  \
  WATCH_SIZE(suffix, 4, kind)                                                                  \
  WATCH_SIZE(suffix, 8, kind)                                                                  \
  WATCH_SIZE(suffix, 16, kind)
WATCH_SIZES(read, kRead)
WATCH_SIZES(write, kWrite)
WATCH_SIZES(unaligned_read, kRead)
WATCH_SIZES(unaligned_write, kWrite)
WATCH_SIZES(volatile_read, kRead)
WATCH_SIZES(volatile_write, kWrite)
WATCH(read_range, kRead)
WATCH(write_range, kWrite)
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void* __tsan_memcpy(void* dst, const void* src, size_t size) {  // clang's
  ENTER();
  host::access(src, unsigned(size), host::Access::kRead);
  host::access(dst, unsigned(size), host::Access::kWrite);
  return memcpy(dst, src, size);
}
EXPORT void* __tsan_memset(void* dst, int value, size_t size) {
  ENTER();
  host::access(dst, unsigned(size), host::Access::kWrite);
  return memset(dst, value, size);
}

// -- what -fsanitize=undefined calls ------------------------------------------------------------------------

// Every handler's first argument begins with the place in the source.
struct UndefinedBehavior {
  const char* file;
  unsigned line, column;
};

#define UBSAN_HANDLER(name, what)                                                              \
  EXPORT void __ubsan_handle_##name(const UndefinedBehavior* where) {                          \
    ENTER();                                                                                   \
    host::fail("%s:%u:%u: undefined behaviour: %s", where->file, where->line, where->column, what); \
  }
UBSAN_HANDLER(add_overflow, "signed addition overflows")
UBSAN_HANDLER(sub_overflow, "signed subtraction overflows")
UBSAN_HANDLER(mul_overflow, "signed multiplication overflows")
UBSAN_HANDLER(negate_overflow, "signed negation overflows")
UBSAN_HANDLER(divrem_overflow, "division by zero, or overflow in a division")
UBSAN_HANDLER(shift_out_of_bounds, "shift by a negative or too large amount, or of a negative value")
UBSAN_HANDLER(out_of_bounds, "index outside of an array")
UBSAN_HANDLER(type_mismatch_v1, "null or misaligned pointer, or an object that doesn't fit")
UBSAN_HANDLER(load_invalid_value, "a value that its type doesn't have")
UBSAN_HANDLER(float_cast_overflow, "float to integer conversion out of range")
UBSAN_HANDLER(builtin_unreachable, "reaches what was declared unreachable")
UBSAN_HANDLER(missing_return, "function ends without a value")
UBSAN_HANDLER(vla_bound_not_positive, "array of variable length with a bound below 1")
UBSAN_HANDLER(nonnull_arg, "null for an argument that may not be null")
UBSAN_HANDLER(pointer_overflow, "pointer arithmetic overflows")
UBSAN_HANDLER(invalid_builtin, "__builtin_clz or __builtin_ctz of zero")
