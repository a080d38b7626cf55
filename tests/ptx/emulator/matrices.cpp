// Matrices: ldmatrix, stmatrix, mma.sync; wgmma from its issue to the wait that completes it.
#include <algorithm>

#include "lanes.h"
#include "parsed.h"

namespace ptx {
namespace {

// ldmatrix and stmatrix. list: registers, one per matrix; offset2: transposed.
template <bool kLoads>
void move_matrices(Warp& w, const Instruction& i, Mask) {
  for (size_t n = 0; n < i.list.size(); ++n) {
    uint16_t matrix[8][8];
    uint32_t* words = w.reg<uint32_t>(i.list[n]);
    auto element = [&](int lane, int half) -> uint16_t& {
      const int row = lane / 4, column = lane % 4 * 2 + half;
      return i.offset2 ? matrix[column][row] : matrix[row][column];
    };
    if (!kLoads)
      for (int l = 0; l < 32; ++l)
        for (int half = 0; half < 2; ++half) element(l, half) = static_cast<uint16_t>(words[l] >> (16 * half));
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(n) * 8 + row;
      const auto address = static_cast<uint32_t>(w.reg<uint32_t>(i.a)[lane] + i.offset);
      const auto* value = kLoads ? nullptr : reinterpret_cast<const uint8_t*>(matrix[row]);
      uint8_t* at = shared_at(w, i, lane, address, 16, !kLoads, 16, value);
      if (kLoads) {
        std::memcpy(matrix[row], at, 16);
      } else {
        std::memcpy(at, matrix[row], 16);
        for (int l = 0; l < 32; ++l) mark_written(w, l, address, 16);  // any lane may do the fence
      }
    }
    if (kLoads)
      for (int l = 0; l < 32; ++l) words[l] = element(l, 0) | static_cast<uint32_t>(element(l, 1)) << 16;
  }
}

// mma.m16n8k16 of bf16. list: d, then c; list2: a, then b.
void mma(Warp& w, const Instruction& i, Mask) {
  float a[16][16], b[16][8];
  auto half = [&](Place place, int lane, int h) {
    return widen(static_cast<uint16_t>(w.reg<uint32_t>(place)[lane] >> (16 * h)));
  };
  for (int l = 0; l < 32; ++l)
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 4; ++r) a[l / 4 + r % 2 * 8][l % 4 * 2 + h + r / 2 * 8] = half(i.list2[r], l, h);
      for (int r = 0; r < 2; ++r) b[l % 4 * 2 + h + r * 8][l / 4] = half(i.list2[4 + r], l, h);
    }
  float d[4][32];
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) {
      double sum = w.reg<float>(i.list[4 + r])[l];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[l / 4 + r / 2 * 8][k]) * b[k][l % 4 * 2 + r % 2];
      d[r][l] = static_cast<float>(sum);
    }
  for (int r = 0; r < 4; ++r) std::copy_n(d[r], 32, w.reg<float>(i.list[r]));
}

// Where a matrix descriptor puts the 16 bytes that begin at (row, k): along k if K-major, along the rows if transposed.
uint32_t chunk_address(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(descriptor >> 62);
  const int bytes = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
  if (!bytes || (descriptor >> 49 & 7)) throw Failure("a matrix descriptor that the emulator does not know");
  const int width = bytes / 2;  // elements
  const uint32_t offset = transposed ? row % width * 2 + row / width * leading + k % 8 * bytes + k / 8 * stride
                                     : row % 8 * bytes + row / 8 * stride + k * 2;
  return swizzled(start + offset, bytes);
}

// wgmma. list: d; list2: a, if it is in registers; offset: a is transposed; offset2: b is transposed.
template <class Body>
void for_chunks(const Product& p, int warp, Body body) {
  const Instruction& i = *p.instruction;
  auto operand = [&](uint64_t descriptor, bool transposed, int first, int rows, bool of_b) {
    for (int row = 0; row < rows; row += transposed ? 8 : 1)
      for (int k = 0; k < 16; k += transposed ? 1 : 8)
        body(chunk_address(descriptor, transposed, first + row, k), row, k, transposed, of_b);
  };
  if (i.list2.empty()) operand(p.a, i.offset, warp % 4 * 16, 16, false);
  operand(p.b, i.offset2, 0, static_cast<int>(i.list.size()) * 2, true);
}

// Unwritten memory is NaN: it may be multiplied as long as the result is not used.
const uint8_t* operand_at(Warp& w, const Instruction& i, uint32_t address) {
  const Shared& s = w.cta->shared;
  const uint32_t at = address - kSharedBegin;
  if (address < kSharedBegin || at + 16 > s.bytes.size()) fail(w, i, 0, "an operand outside of shared memory");
  uint8_t any = 0;
  for (int k = 0; k < 16; ++k) any |= s.state[at + k];
  if (any & kInFlight) report(w, i, 0, "an operand that a copy in flight writes");
  if (any & kMbarrier) report(w, i, 0, "an mbarrier as an operand");
  if (any & kUnfenced) report(w, i, 0, "an operand that threads have written, without fence.proxy.async");
  return s.bytes.data() + at;
}

void multiply(Warp& w, const Product& p) {
  const Instruction& i = *p.instruction;
  const int n = static_cast<int>(i.list.size()) * 2;
  float a[16][16];
  static float b[16][256];
  for_chunks(p, w.index, [&](uint32_t address, int row, int k, bool transposed, bool of_b) {
    uint16_t values[8];
    std::memcpy(values, operand_at(w, i, address), 16);
    for (int j = 0; j < 8; ++j) {
      const int r = row + (transposed ? j : 0), kk = k + (transposed ? 0 : j);
      (of_b ? b[kk][r] : a[r][kk]) = widen(values[j]);
    }
  });
  for (int l = 0; l < 32 && !i.list2.empty(); ++l)
    for (int r = 0; r < 4; ++r) {
      if (w.reg<uint32_t>(i.list2[r])[l] != p.a_regs[r][l])
        report(w, i, l, "an operand in registers that has changed before the product was waited for");
      for (int h = 0; h < 2; ++h)
        a[l / 4 + r % 2 * 8][l % 4 * 2 + h + r / 2 * 8] = widen(static_cast<uint16_t>(p.a_regs[r][l] >> (16 * h)));
    }
  std::vector<float>& sums = w.sums.at(i.list[0]);  // [register][lane]
  for (int r = 0; r < 16; ++r) {
    double row[256] = {};
    auto sum_of = [&](int c) -> float& { return sums[(c / 8 * 4 + r / 8 * 2 + c % 2) * 32 + r % 8 * 4 + c % 8 / 2]; };
    if (p.accumulate)
      for (int c = 0; c < n; ++c) row[c] = sum_of(c);
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < n; ++c) row[c] += static_cast<double>(a[r][k]) * b[k][c];
    for (int c = 0; c < n; ++c) sum_of(c) = static_cast<float>(row[c]);
  }
}

// a, b: descriptors, c: whether to accumulate.
void issue_product(Warp& w, const Instruction& i, Mask) {
  if (!w.wgmma_fenced) report(w, i, 0, "wgmma without a fence");
  Product p{&i, i.list2.empty() ? w.reg<uint64_t>(i.a)[0] : 0, w.reg<uint64_t>(i.b)[0], w.reg<uint32_t>(i.c)[0] != 0,
            w.product_group, {}, {}};
  for (int l = 0; l < 32; ++l)
    if ((i.list2.empty() && w.reg<uint64_t>(i.a)[l] != p.a) || w.reg<uint64_t>(i.b)[l] != p.b ||
        (w.reg<uint32_t>(i.c)[l] != 0) != p.accumulate)
      fail(w, i, l, "lanes disagree about an operand of wgmma");
  for (size_t r = 0; r < i.list2.size(); ++r) std::copy_n(w.reg<uint32_t>(i.list2[r]), 32, p.a_regs[r]);
  auto [found, is_new] = w.sums.try_emplace(i.list[0]);
  if (is_new)
    for (Place place : i.list) {
      float* reg = w.reg<float>(place);
      found->second.insert(found->second.end(), reg, reg + 32);
      std::fill_n(w.reg<uint32_t>(place), 32, 0x7fffdeadu);  // undefined until the product has been waited for
    }
  for_chunks(p, w.index, [&](uint32_t address, int, int, bool, bool) {
    operand_at(w, i, address);
    p.chunks.push_back((address - kSharedBegin) / 16);
    ++w.cta->shared.readers[p.chunks.back()];
  });
  ++w.num_products;
  w.products.push_back(std::move(p));
}
void fence_products(Warp& w, const Instruction&, Mask) { w.wgmma_fenced = true; }
void commit_products(Warp& w, const Instruction&, Mask) { ++w.product_group; }
void wait_products(Warp& w, const Instruction& i, Mask) {
  complete_products(w, static_cast<uint32_t>(i.offset));
  w.wgmma_fenced = false;
}

bool decode_wgmma(Parsed& p) {
  Instruction& o = p.out;
  o.kind = Kind::kAligned;
  if (p.parts[1] == "fence") o.run = fence_products;
  if (p.parts[1] == "commit_group") o.run = commit_products;
  if (p.parts[1] == "wait_group") {
    o.run = wait_products;
    o.offset = immediate(p.operands[0], 4);
  }
  if (p.parts[1] != "mma_async") return o.run != nullptr;
  const std::string& shape = p.parts[4];
  if (shape.substr(0, 4) != "m64n" || shape.substr(shape.size() - 3) != "k16" || p.type() != "bf16") return false;
  o.run = issue_product;
  for (const auto& name : p.elements(0)) o.list.push_back(p.place(name, 4));
  if (static_cast<int>(o.list.size()) * 2 != std::stoi(shape.substr(4))) return false;
  const bool registers = p.operands[1][0] == '{';
  if (registers)
    for (const auto& name : p.elements(1)) o.list2.push_back(p.place(name, 4));
  else
    o.a = p.at(1, 8);
  o.b = p.at(2, 8);
  o.c = p.at(3, 4);
  if (p.operands[4] != "1" || p.operands[5] != "1") return false;
  if (!registers) o.offset = p.operands.at(6) == "1";
  o.offset2 = p.operands.at(registers ? 6 : 7) == "1";
  return p.operands.size() == (registers ? 7u : 8u);
}

}  // namespace

void complete_products(Warp& w, uint32_t pending_groups) {
  while (!w.products.empty() && w.products.front().group + pending_groups < w.product_group) {
    const Product p = std::move(w.products.front());
    w.products.pop_front();
    multiply(w, p);
    for (uint32_t chunk : p.chunks) {
      --w.cta->shared.readers[chunk];
      check_races(*w.cta, w, *p.instruction, 0, kSharedBegin + chunk * 16, 16, false);
    }
    const Place first = p.instruction->list[0];
    auto follows = [&](const Product& q) { return q.instruction->list[0] == first; };
    if (std::any_of(w.products.begin(), w.products.end(), follows)) continue;
    const std::vector<float>& sums = w.sums.at(first);
    for (size_t r = 0; r < p.instruction->list.size(); ++r)
      std::copy_n(sums.data() + 32 * r, 32, w.reg<float>(p.instruction->list[r]));
    w.sums.erase(first);
  }
}

bool decode_matrices(Parsed& p) {
  const std::string &op = p.parts[0], &t = p.type();
  Instruction& o = p.out;
  if (op == "ldmatrix" || op == "stmatrix") {
    const bool loads = op == "ldmatrix";
    if (!p.has("m8n8") || t != "b16") return false;
    o.kind = Kind::kAligned;
    for (const auto& name : p.elements(loads ? 0 : 1)) o.list.push_back(p.place(name, 4));
    o.a = p.address(loads ? 1 : 0, 4);
    o.offset2 = p.has("trans");
    o.run = loads ? move_matrices<true> : move_matrices<false>;
  } else if (op == "mma") {
    if (!p.has("m16n8k16") || !p.has("row") || !p.has("col") || !p.has("bf16") || t != "f32") return false;
    o.kind = Kind::kAligned;
    for (size_t k : {0, 3})
      for (const auto& name : p.elements(k)) o.list.push_back(p.place(name, 4));
    for (size_t k : {1, 2})
      for (const auto& name : p.elements(k)) o.list2.push_back(p.place(name, 4));
    o.run = mma;
  } else if (op == "wgmma") {
    return decode_wgmma(p);
  }
  return o.run != nullptr;
}

}  // namespace ptx
