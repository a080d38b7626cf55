// Copies to shared memory: cp.async, bulk copies and boxes of tensors. They land as late as the kernel's waits allow.
#include <algorithm>

#include "cuda_host_names.h"
#include "lanes.h"
#include "parsed.h"

namespace ptx {
namespace {

// cp.async. Operands: [d + offset], [a + offset2]; c: bytes to write; list: bytes to read, if given.
void copy_async(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const auto dst = static_cast<uint32_t>(w.reg<uint32_t>(i.d)[l] + i.offset);
    const uint64_t src = w.reg<uint64_t>(i.a)[l] + i.offset2;
    const uint32_t bytes = w.reg<uint32_t>(i.c)[l];
    const uint32_t size = i.list.empty() ? bytes : w.reg<uint32_t>(i.list[0])[l];
    if (size > bytes) fail(w, i, l, "cp.async reads more than it writes");
    shared_at(w, i, l, dst, bytes, true);
    if (src % bytes) fail(w, i, l, "cp.async from a misaligned address");
    if (size) global_at(w, i, l, src, size, false);
    for (uint32_t k = 0; k < bytes; ++k) w.cta->shared.state[dst - kSharedBegin + k] |= kInFlight;
    w.copies[l].push_back({dst, src, bytes, size, w.copy_group[l]});
  });
}
void commit_copies(Warp& w, const Instruction&, Mask m) {
  for_lanes(m, [&](int l) { ++w.copy_group[l]; });
}
void wait_copies(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) { land_copies(w, l, static_cast<uint32_t>(i.offset)); });
}

void check_reads_are_fenced(Cta& cta, Warp& w, const Instruction& i, int lane, const BulkCopy& copy) {
  const uint32_t first = (copy.dst - kSharedBegin) / 16;
  release_fences(w);  // a warp's own fences precede its own copies
  for (uint32_t k = first; !cta.shared.read.empty() && k < first + copy.bytes / 16; ++k)
    for (size_t r = 0; r < cta.cluster->fenced.size(); ++r)
      if (cta.shared.read[k][r] > cta.cluster->fenced[r])
        report(w, i, lane, "a copy to where threads have read, without fence.proxy.async");
}

void ask_for(Cta& cta, Warp& w, const Instruction& i, int lane, const BulkCopy& copy, uint32_t alignment) {
  mbarrier_at(cta, w, i, lane, copy.mbarrier, true);
  shared_at(cta, w, i, lane, copy.dst, copy.bytes, true, alignment);
  check_reads_are_fenced(cta, w, i, lane, copy);
  for (uint32_t k = 0; k < copy.bytes; ++k) cta.shared.state[copy.dst - kSharedBegin + k] |= kInFlight;
  cta.bulk.push_back(copy);
}
// d: destination, a: source, b: bytes, c: mbarrier.
void bulk_copy(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint32_t dst = w.reg<uint32_t>(i.d)[l], bytes = w.reg<uint32_t>(i.b)[l], bar = w.reg<uint32_t>(i.c)[l];
    const uint64_t src = w.reg<uint64_t>(i.a)[l];
    if (bytes % 16 || src % 16 || !bytes) fail(w, i, l, "a bulk copy is not of whole 16 bytes");
    global_at(w, i, l, src & ~15ull, 16, false);
    global_at(w, i, l, src + bytes - 16, 16, false);
    ask_for(*w.cta, w, i, l, {dst, bytes, bar, src, nullptr, 0, 0}, 16);
  });
}
void bulk_prefetch(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint64_t src = w.reg<uint64_t>(i.a)[l];
    const uint32_t bytes = w.reg<uint32_t>(i.b)[l];
    if (bytes % 16 || src % 16 || !bytes) fail(w, i, l, "a prefetch is not of whole 16 bytes");
    global_at(w, i, l, src, 16, false);
    global_at(w, i, l, src + bytes - 16, 16, false);
    const bool early = !(w.waited_pdl >> l & 1);
    cuda_host::prefetched.push_back({reinterpret_cast<const uint8_t*>(src), static_cast<int>(bytes), early});
  });
}
// d: destination, a: map, list: coordinates, c: mbarrier, b: bit mask of destination CTAs unless it is this one alone.
void tensor_copy(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const uint32_t dst = w.reg<uint32_t>(i.d)[l], bar = w.reg<uint32_t>(i.c)[l];
    const auto* map = reinterpret_cast<const TensorMap*>(w.reg<uint64_t>(i.a)[l]);
    param_at(w, i, l, reinterpret_cast<uintptr_t>(map), sizeof(TensorMap));
    if (map->magic != kTensorMapMagic || reinterpret_cast<uintptr_t>(map) % 64) fail(w, i, l, "no tensor map there");
    if (w.cta->launch->pdl && !(w.waited_pdl >> l & 1)) report(w, i, l, "a tensor ahead of the wait");
    if (w.cta->launch->pdl && !(w.fenced_global >> l & 1))
      report(w, i, l, "a tensor that threads may have stored, without fence.proxy.async");
    const uint32_t bytes = map->box_columns * map->box_rows * map->element_bytes;
    const uint32_t ctas = i.b ? w.reg<uint32_t>(i.b)[l] & 0xffff : 1u << w.cta->rank;
    if (!ctas || ctas >> w.cta->launch->cluster) fail(w, i, l, "a copy to CTAs that the cluster has not");
    for (Mask rest = ctas; rest; rest &= rest - 1) {
      Cta& cta = *w.cta->cluster->ctas[static_cast<size_t>(std::countr_zero(rest))];
      if (cta.has_ended()) fail(w, i, l, "a copy to a CTA that has ended");
      ask_for(cta, w, i, l, {dst, bytes, bar, 0, map, w.reg<int32_t>(i.list[0])[l], w.reg<int32_t>(i.list[1])[l]}, 128);
    }
  });
}
void prefetch_map(Warp& w, const Instruction& i, Mask m) {
  for_lanes(m, [&](int l) {
    const auto* map = reinterpret_cast<const TensorMap*>(w.reg<uint64_t>(i.a)[l]);
    if (map->magic != kTensorMapMagic) fail(w, i, l, "no tensor map there");
  });
}

}  // namespace

void land_copies(Warp& w, int lane, uint32_t pending_groups) {
  auto& copies = w.copies[lane];
  while (!copies.empty() && copies.front().group + pending_groups < w.copy_group[lane]) {
    const CopyAsync c = copies.front();
    copies.pop_front();
    uint8_t* to = w.cta->shared.bytes.data() + (c.dst - kSharedBegin);
    std::memset(to, 0, c.bytes);
    if (c.size) std::memcpy(to, reinterpret_cast<const void*>(c.src), c.size);
    mark_written(w, lane, c.dst, c.bytes);
  }
}

uint32_t swizzled(uint32_t address, int bytes) {
  const uint32_t mask = bytes == 128 ? 0x70 : bytes == 64 ? 0x30 : bytes == 32 ? 0x10 : 0;
  return address ^ (address >> 3 & mask);
}

void land(Cta& cta, const BulkCopy& c) {
  Shared& s = cta.shared;
  if (!c.map) {
    std::memcpy(s.bytes.data() + (c.dst - kSharedBegin), reinterpret_cast<const void*>(c.src), c.bytes);
  } else {
    const TensorMap& map = *c.map;
    for (uint32_t r = 0; r < map.box_rows; ++r)
      for (uint32_t k = 0; k < map.box_columns; ++k) {
        const uint32_t at = swizzled(c.dst + (r * map.box_columns + k) * map.element_bytes, map.swizzle_bytes);
        const int64_t row = int64_t(c.row) + r, column = int64_t(c.column) + k;
        const bool inside = 0 <= row && row < int64_t(map.rows) && 0 <= column && column < int64_t(map.columns);
        uint16_t value = 0;
        if (inside) {
          const uint64_t from = map.base + row * map.stride_bytes + column * map.element_bytes;
          const auto [begin, end] = bounds(from, cta.launch->modes);
          if (from < begin || from + 2 > end) throw Failure("a tensor map reaches outside of every allocation");
          std::memcpy(&value, reinterpret_cast<const void*>(from), 2);
        }
        std::memcpy(s.bytes.data() + (at - kSharedBegin), &value, 2);
      }
  }
  std::fill_n(s.state.data() + (c.dst - kSharedBegin), c.bytes, kWritten);
  const uint32_t granule = cta.launch->kernel->granule;
  std::fill_n(s.words.begin() + (c.dst - kSharedBegin) / granule, c.bytes / granule, Word{});  // waiters see it
  if (!s.read.empty()) std::fill_n(s.read.begin() + (c.dst - kSharedBegin) / 16, c.bytes / 16, Clocks{});
  Mbarrier& barrier = cta.mbarriers.at(c.mbarrier);
  barrier.bytes -= c.bytes;
  cta.settle(barrier);
}

bool decode_copies(Parsed& p) {
  Instruction& o = p.out;
  bool plain = true;  // addresses without offsets, for which bulk copies have no field
  auto address = [&](size_t operand, int bytes) {
    const Place place = p.address(operand, bytes);
    plain &= o.offset == 0;
    return place;
  };
  if (p.parts[0] == "prefetch" && p.has("tensormap")) {
    o.run = prefetch_map;
    o.a = address(0, 8);
  } else if (p.parts[0] != "cp") {
    return false;
  } else if (p.has("commit_group")) {
    o.run = commit_copies;
  } else if (p.has("wait_group") || p.has("wait_all")) {
    o.run = wait_copies;
    o.offset = p.has("wait_all") ? 0 : immediate(p.operands[0], 4);
  } else if (p.has("prefetch")) {
    o.run = bulk_prefetch;
    o.a = address(0, 8);
    o.b = p.at(1, 4);
  } else if (p.has("tensor")) {
    if (!p.has("2d") || !p.has("tile")) return false;
    o.run = tensor_copy;
    o.d = address(0, 4);
    const std::string inner = p.operands[1].substr(1, p.operands[1].size() - 2);
    const auto parts = split(inner, ',', true);
    o.a = p.place(parts.at(0), 8);
    const std::string coordinates = parts.at(1).substr(1, parts.at(1).size() - 2);
    for (const auto& c : split(coordinates, ',', false)) o.list.push_back(p.place(c, 4));
    o.c = address(2, 4);
    if (p.has("multicast::cluster")) o.b = p.at(3, 4);
  } else if (p.has("bulk")) {
    if (!p.has("shared::cluster") || !p.has("global")) return false;
    o.run = bulk_copy;
    o.d = address(0, 4);
    o.a = address(1, 8);
    o.b = p.at(2, 4);
    o.c = address(3, 4);
  } else {
    o.run = copy_async;
    o.a = p.address(1, 8);
    o.offset2 = o.offset;
    o.d = p.address(0, 4);
    o.c = p.at(2, 4);
    if (p.operands.size() > 3) o.list.push_back(p.at(3, 4));
  }
  return plain;
}

}  // namespace ptx
