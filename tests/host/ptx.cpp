// ptx.cpp: the tensor-core and copy instructions of the portable tier, lane by lane.
#include <stdint.h>
#include <string.h>

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
  }
  copies.erase(copies.begin(), copies.begin() + landed);
}

}  // namespace host
