// ptx.cpp: the tensor-core, copy and barrier instructions of ptx.cuh and ptx_sm90.cuh, lane by lane.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <limits>

#include "shim.h"
#include "state.h"

namespace host {

namespace {

float element(HalfType type, unsigned packed, int half) {
  const unsigned short bits = (unsigned short)(packed >> 16 * half);
  return type == HalfType::kHalf ? half_value(bits) : bfloat16_value(bits);
}

}  // namespace

// Products and sums in float64, one rounding to float32: no GPU is more exact, and none is more than a few ulps off.
void mma_m16n8k16(HalfType type, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Site site) {
  ENTER();
  struct Operand {
    HalfType type;
    float* d;
    const unsigned* a;
    unsigned b[2];
  } operand{type, d, a, {b0, b1}};
  warp_collective(
      "mma_m16n8k16", 0xffffffffu, &operand,
      [](void* const operands[32], unsigned) {
        double a[16][16], b[16][8], d[16][8];
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const Operand& o = *static_cast<Operand*>(operands[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            for (int half = 0; half < 2; ++half)
              a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = element(o.type, o.a[i], half);
            d[g + 8 * (i / 2)][2 * t + i % 2] = o.d[i];
          }
          for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half) b[2 * t + half + 8 * i][g] = element(o.type, o.b[i], half);
        }
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const Operand& o = *static_cast<Operand*>(operands[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) o.d[i] = float(d[g + 8 * (i / 2)][2 * t + i % 2]);
        }
      },
      site);
}

void ldmatrix_x4(unsigned (&r)[4], const void* row, bool transposed, Site site) {
  ENTER();
  if (uintptr_t(row) % 16) fail("%s:%d: ldmatrix: the address of a row is not 16-byte aligned", site.file, site.line);
  struct Operand {
    unsigned* r;
    const void* row;
    unsigned short elements[8];
    bool transposed;
  } operand{r, row, {}, transposed};
  access(row, 16, Access::kRead);
  memcpy(operand.elements, row, 16);
  warp_collective(
      transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", 0xffffffffu, &operand,
      [](void* const operands[32], unsigned) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const Operand& o = *static_cast<Operand*>(operands[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int matrix = 0; matrix < 4; ++matrix) {
            unsigned packed = 0;
            for (int half = 0; half < 2; ++half) {
              const int r = o.transposed ? 2 * t + half : g, c = o.transposed ? g : 2 * t + half;
              packed |= unsigned(static_cast<Operand*>(operands[8 * matrix + r])->elements[c]) << 16 * half;
            }
            o.r[matrix] = packed;
          }
        }
      },
      site);
}

unsigned movmatrix_trans(unsigned a, Site site) {
  struct Operand {
    unsigned a, d;
  } operand{a, 0};
  warp_collective(
      "movmatrix_trans", 0xffffffffu, &operand,
      [](void* const operands[32], unsigned) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const int g = lane / 4, t = lane % 4;
          unsigned packed = 0;
          for (int half = 0; half < 2; ++half) {  // row 2t + half, column g
            const auto& source = *static_cast<const Operand*>(operands[4 * (2 * t + half) + g / 2]);
            packed |= (source.a >> g % 2 * 16 & 0xffff) << 16 * half;
          }
          static_cast<Operand*>(operands[lane])->d = packed;
        }
      },
      site);
  return operand.d;
}

void cp_async_16(void* dst, const void* src, bool valid) {
  ENTER();
  if (uintptr_t(dst) % 16) fail("cp.async: the destination is not 16-byte aligned");
  if (valid && uintptr_t(src) % 16) fail("cp.async: the source is not 16-byte aligned");
  begin_copy(dst, src, valid);
  memset(dst, 0xff, 16);  // NaN in every type: what is there now is unspecified
  current->copies.push_back(
      {static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), valid, current->num_groups});
}

void cp_async_commit_group() { ++current->num_groups; }

// Lands the copies of all committed groups but the latest `pending`, and no others.
void cp_async_wait_group(int pending) {
  ENTER();
  std::vector<Copy>& copies = current->copies;
  size_t landed = 0;
  for (; landed < copies.size() && copies[landed].group < current->num_groups - pending; ++landed) {
    const Copy& copy = copies[landed];
    if (copy.valid)
      memcpy(copy.dst, copy.src, 16);
    else
      memset(copy.dst, 0, 16);
    end_copy(copy.dst);
    current->unfenced.push_back(copy.dst);
  }
  copies.erase(copies.begin(), copies.begin() + landed);
}

// -- Hopper -------------------------------------------------------------------------------------------------

void griddepcontrol_wait() { current->has_waited = true; }

unsigned shared_address(const void* p) { return unsigned(uintptr_t(p)); }

namespace {

// What the eight bytes of an mbarrier hold.
struct Mbarrier {
  unsigned long long missing : 11, expected : 11;  // arrivals: of this phase, of each phase
  signed long long num_bytes : 26;                 // that this phase waits for
  unsigned long long phase : 16;                   // phases completed
};
static_assert(sizeof(Mbarrier) == 8, "as large as the real one");

// Store what an arrival, or bytes that have come, have changed.
void update(void* barrier, Mbarrier value) {
  if (value.missing == 0 && value.num_bytes == 0) {
    value.missing = value.expected;
    value.phase = value.phase + 1;
    phase_completed = true;
  }
  memcpy(barrier, &value, sizeof value);
}

Mbarrier load_mbarrier(const void* barrier) {
  Mbarrier value;
  memcpy(&value, barrier, sizeof value);
  return value;
}

}  // namespace

bool mbarrier_is_past(const void* barrier, int parity) { return load_mbarrier(barrier).phase % 2 != unsigned(parity); }

void mbarrier_init(void* barrier, int num_arrivals) {
  ENTER();
  if (uintptr_t(barrier) % 8) fail("mbarrier.init: the barrier is not 8-byte aligned");
  access(barrier, sizeof(Mbarrier), Access::kWrite);
  const Mbarrier value{unsigned(num_arrivals), unsigned(num_arrivals), 0, 0};
  memcpy(barrier, &value, sizeof value);
  phase_completed = true;  // what held something else before holds phase 0 now
}

void mbarrier_arrive(void* barrier) { mbarrier_arrive_expect_tx(barrier, 0); }

// Half of the times all others run first for as long as they can: what follows an arrival may come late.
void mbarrier_arrive_expect_tx(void* barrier, int num_bytes) {
  ENTER();
  access(barrier, sizeof(Mbarrier), Access::kRead);
  Mbarrier value = load_mbarrier(barrier);
  if (value.missing == 0) fail("mbarrier.arrive: all arrivals of this phase have come");
  value.missing = value.missing - 1;
  value.num_bytes = value.num_bytes + num_bytes;
  update(barrier, value);
  note_arrival(current->warp);
  if (coin()) wait_for_others(State::kDelayed);
}

bool mbarrier_test_wait(void* barrier, int parity) {
  ENTER();
  access(barrier, sizeof(Mbarrier), Access::kRead);
  return mbarrier_is_past(barrier, parity);
}

void mbarrier_wait(void* barrier, int parity, Site site) {
  ENTER();
  access(barrier, sizeof(Mbarrier), Access::kRead);
  if (mbarrier_is_past(barrier, parity)) return;
  current->waits_in = "mbarrier_wait";
  current->barrier = barrier;
  current->parity = parity;
  current->site = site;
  wait_for_others(State::kAtMbarrier);
}

namespace {

constexpr int kNumberedBarriers = 16;
unsigned long long numbered_barriers[kNumberedBarriers];  // each holds an Mbarrier
unsigned waiting_warps[kNumberedBarriers];                // in the phase under way, a bit each

Mbarrier load_numbered(int id, int num_threads) {
  if (id < 1 || id >= kNumberedBarriers) fail("barrier %d: there are 1 to %d", id, kNumberedBarriers - 1);
  if (num_threads % kWarpSize) fail("barrier %d: is for whole warps; got %d threads", id, num_threads);
  Mbarrier value = load_mbarrier(numbered_barriers + id);
  if (value.missing == value.expected) value.missing = value.expected = unsigned(num_threads);  // nobody is there
  if (value.expected != unsigned(num_threads))
    fail("barrier %d: is for %u threads this time; got %d", id, unsigned(value.expected), num_threads);
  return value;
}

}  // namespace

void begin_numbered_barriers() {
  memset(numbered_barriers, 0, sizeof numbered_barriers);
  memset(waiting_warps, 0, sizeof waiting_warps);
}

bool numbered_barriers_are_free() {
  return std::all_of(numbered_barriers, numbered_barriers + kNumberedBarriers, [](const unsigned long long& barrier) {
    const Mbarrier value = load_mbarrier(&barrier);
    return value.missing == value.expected;
  });
}

namespace {

int arrive_numbered(int id, int num_threads, bool waits) {  // returns the parity of the phase
  Mbarrier value = load_numbered(id, num_threads);
  const int parity = value.phase % 2;
  value.missing = value.missing - 1;
  if (waits) waiting_warps[id] |= 1u << current->warp;
  if (value.missing == 0) {
    note_meeting(waiting_warps[id]);
    waiting_warps[id] = 0;
  }
  update(numbered_barriers + id, value);
  return parity;
}

}  // namespace

void bar_arrive(int id, int num_threads) {
  ENTER();
  arrive_numbered(id, num_threads, false);
}

void bar_sync(int id, int num_threads, Site site) {
  ENTER();
  const int parity = arrive_numbered(id, num_threads, true);
  if (mbarrier_is_past(numbered_barriers + id, parity)) return;
  current->waits_in = "bar_sync";
  current->barrier = numbered_barriers + id;
  current->parity = parity;
  current->site = site;
  wait_for_others(State::kAtMbarrier);
}

namespace {

void start_transfers(const char* name, std::vector<Transfer> transfers, void* barrier, Site site) {
  access(barrier, sizeof(Mbarrier), Access::kRead);
  for (const Transfer& transfer : transfers) begin_transfer(transfer.dst, *current, site);
  const int num_bytes = 16 * int(transfers.size());
  if (num_bytes == 0) fail("%s:%d: %s: of no bytes", site.file, site.line, name);
  engine_copies.push_back({std::move(transfers), barrier, num_bytes, current, site});
}

}  // namespace

void bulk_copy(void* dst, const void* src, int num_bytes, void* barrier, Site site) {
  ENTER();
  if (uintptr_t(dst) % 16 || uintptr_t(src) % 16 || num_bytes % 16)
    fail("%s:%d: bulk_copy: both ends and the size must be multiples of 16 bytes", site.file, site.line);
  access(src, unsigned(num_bytes), Access::kRead);
  std::vector<Transfer> transfers;
  for (int i = 0; i < num_bytes; i += 16)
    transfers.push_back({static_cast<unsigned char*>(dst) + i, static_cast<const unsigned char*>(src) + i});
  start_transfers("bulk_copy", std::move(transfers), barrier, site);
}

void tensor_copy(void* dst, const unsigned char* src, int rows, int columns, int box_rows, int column, int row,
                 void* barrier, Site site) {
  ENTER();
  if (shared_address(dst) % 1024)
    fail("%s:%d: tensor_copy: the destination is no multiple of 1024 bytes", site.file, site.line);
  std::vector<Transfer> transfers;
  for (int i = 0; i < box_rows; ++i)
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int r = row + i, c = column + 8 * chunk;
      const bool inside = r >= 0 && r < rows && c >= 0 && c < columns;
      transfers.push_back({static_cast<unsigned char*>(dst) + i * 128 + (chunk ^ i % 8) * 16,
                           inside ? src + 2 * ((long long)r * columns + c) : nullptr});
    }
  start_transfers("tensor_copy", std::move(transfers), barrier, site);
}

void land(const EngineCopy& copy) {
  for (const Transfer& transfer : copy.transfers) {
    if (transfer.src)
      memcpy(transfer.dst, transfer.src, 16);
    else
      memset(transfer.dst, 0, 16);
    end_transfer(transfer.dst);
  }
  Mbarrier value = load_mbarrier(copy.barrier);
  value.num_bytes = value.num_bytes - copy.num_bytes;
  update(copy.barrier, value);
}

void store_async(float* dst, const float (&v)[4], void* barrier) {
  ENTER();
  if (uintptr_t(dst) % sizeof v) fail("st.async: the destination is not 16-byte aligned");
  access(dst, sizeof v, Access::kWrite);
  memcpy(dst, v, sizeof v);
  access(barrier, sizeof(Mbarrier), Access::kRead);
  Mbarrier value = load_mbarrier(barrier);
  value.num_bytes = value.num_bytes - unsigned(sizeof v);
  update(barrier, value);
}

void fence_proxy_async() {
  for (unsigned char* dst : current->unfenced) fence_copy(dst);
  current->unfenced.clear();
}

void converge(const char* name, Site site) {
  ENTER();
  warp_collective(name, 0xffffffffu, current, [](void* const[32], unsigned) {}, site);
}

namespace {

void start_product(const Product& product) {
  converge("wgmma", product.site);
  for (unsigned long long descriptor : {product.a_registers ? product.b : product.a, product.b}) {
    if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3fff) != 1024 / 16)
      fail("%s:%d: wgmma: descriptor %016llx has another layout than rows of 128 swizzled bytes", product.site.file,
           product.site.line, descriptor);
    if ((descriptor & 0x3fff) * 16 % 1024 >= 128)
      fail("%s:%d: wgmma: a panel does not begin at a multiple of 1024 bytes", product.site.file, product.site.line);
  }
  std::vector<Accumulator>& accumulators = current->accumulators;
  float* d = product.d;
  if (std::none_of(accumulators.begin(), accumulators.end(), [&](const Accumulator& a) { return a.d == d; })) {
    accumulators.push_back({d, std::vector<float>(d, d + product.n / 2)});
    std::fill(d, d + product.n / 2, std::numeric_limits<float>::quiet_NaN());
  }
  current->products.push_back(product);
  current->products.back().group = current->num_product_groups;
}

}  // namespace

void wgmma_ss(HalfType type, float* d, int n, unsigned long long a, unsigned long long b, bool accumulate, Site site) {
  ENTER();
  start_product({type, d, n, nullptr, a, b, accumulate, 0, site});
}

void wgmma_rs(HalfType type, float* d, int n, const unsigned (&a)[4], unsigned long long b, Site site) {
  ENTER();
  start_product({type, d, n, a, 0, b, true, 0, site});
}

namespace {

// The 8 elements at an address before it is swizzled.
void load_chunk(float* values, HalfType type, unsigned address) {
  const unsigned char* p = async_read(address ^ (address >> 7 & 7) << 4);
  for (int i = 0; i < 8; ++i) {
    unsigned short bits;
    memcpy(&bits, p + 2 * i, 2);
    values[i] = element(type, bits, 0);
  }
}

unsigned first_address(unsigned long long descriptor) { return unsigned(descriptor & 0x3fff) * 16; }

// Columns 0 .. 15 of a row of an operand that a wgmma_descriptor names.
void load_row(float (&values)[16], HalfType type, unsigned long long descriptor, int row) {
  for (int chunk = 0; chunk < 2; ++chunk)
    load_chunk(values + 8 * chunk, type, first_address(descriptor) + row / 8 * 1024 + row % 8 * 128 + chunk * 16);
}

// Columns 8 * j .. + 7 of rows 0 .. 15 of an operand that a wgmma_transposed names.
void load_columns(float (&values)[16][8], HalfType type, unsigned long long descriptor, int j) {
  const unsigned panel_bytes = unsigned(descriptor >> 16 & 0x3fff) * 16;
  for (int row = 0; row < 16; ++row)
    load_chunk(values[row], type,
               first_address(descriptor) + j / 8 * panel_bytes + j % 8 * 16 + row / 8 * 1024 + row % 8 * 128);
}

// A thread's part of its product with this index, summed in float64 and rounded to float32 once. lanes: its warp.
void multiply(const Thread& thread, size_t index, void* const lanes[32], float* d) {
  const Product& product = thread.products[index];
  const int warp = thread.warp % 4, g = thread.lane / 4, t = thread.lane % 4;
  float a[2][16];
  if (product.a_registers) {  // the warp's rows are spread over its lanes
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) {
        const Thread& owner = *static_cast<Thread*>(lanes[4 * g + k / 2 % 4]);
        a[half][k] = element(product.type, owner.products[index].a_registers[half + k / 8 * 2], k % 2);
      }
  } else {
    for (int half = 0; half < 2; ++half) load_row(a[half], product.type, product.a, 16 * warp + g + 8 * half);
  }
  for (int j = 0; j < product.n / 8; ++j) {
    float b[16][8];
    if (product.a_registers) {
      load_columns(b, product.type, product.b, j);
    } else {
      for (int column = 2 * t; column < 2 * t + 2; ++column) {
        float row[16];
        load_row(row, product.type, product.b, 8 * j + column);
        for (int k = 0; k < 16; ++k) b[k][column] = row[k];
      }
    }
    for (int i = 0; i < 4; ++i) {
      double total = product.accumulate ? d[4 * j + i] : 0.;
      for (int k = 0; k < 16; ++k) total += double(a[i / 2][k]) * b[k][2 * t + i % 2];
      d[4 * j + i] = float(total);
    }
  }
}

}  // namespace

namespace {

// The first `count` are done: sums that no other adds to are there.
void finish_products(Thread& thread, size_t count) {
  std::vector<Product>& products = thread.products;
  products.erase(products.begin(), products.begin() + count);
  for (size_t i = thread.accumulators.size(); i-- > 0;) {
    const Accumulator& accumulator = thread.accumulators[i];
    if (std::any_of(products.begin(), products.end(), [&](const Product& p) { return p.d == accumulator.d; })) continue;
    std::copy(accumulator.values.begin(), accumulator.values.end(), accumulator.d);
    thread.accumulators.erase(thread.accumulators.begin() + i);
  }
}

}  // namespace

void wgmma_commit_group(Site site) {
  converge("wgmma_commit_group", site);
  ++current->num_product_groups;
}

// Does the products of all committed groups but the latest `pending`, and no others.
void wgmma_wait_group(int pending, Site site) {
  ENTER();
  current->max_pending = pending;
  warp_collective(
      "wgmma_wait_group", 0xffffffffu, current,
      [](void* const lanes[32], unsigned) {
        const auto is_done = [](const Thread& thread, const Product& product) {
          return product.group < thread.num_product_groups - thread.max_pending;
        };
        const Thread& first = *static_cast<Thread*>(lanes[0]);
        size_t done = 0;
        for (; done < first.products.size() && is_done(first, first.products[done]); ++done)
          for (int lane = 0; lane < kWarpSize; ++lane) {
            Thread& thread = *static_cast<Thread*>(lanes[lane]);
            for (Accumulator& accumulator : thread.accumulators)
              if (accumulator.d == thread.products[done].d) multiply(thread, done, lanes, accumulator.values.data());
          }
        for (int lane = 0; lane < kWarpSize; ++lane) finish_products(*static_cast<Thread*>(lanes[lane]), done);
      },
      site);
}

}  // namespace host
