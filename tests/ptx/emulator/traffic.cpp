// Counters of instructions, sectors and wavefronts. Accesses of 8 bytes a lane are served by half-warps, those of 16 by
// quarter-warps. In each, lanes at one word of a bank share it, and the bank's other words take a wavefront each.
#include "traffic.h"

#include <algorithm>
#include <sstream>

#include "lanes.h"
#include "parsed.h"

namespace ptx {
namespace {

constexpr int kSector = 32, kLine = 128, kBanks = 32;
using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;  // [begin, end)

// Calls take(number) once for each unit of that many bytes that the sorted ranges touch.
template <class Take>
void for_units(const Ranges& sorted, uint64_t bytes, Take take) {
  uint64_t next = 0;
  for (const auto& [begin, end] : sorted) {
    for (next = std::max(next, begin / bytes); next * bytes < end; ++next) take(next);
  }
}
uint64_t distinct_bytes(const Ranges& sorted) {
  uint64_t sum = 0, next = 0;
  for (const auto& [begin, end] : sorted) {
    if (end <= next) continue;
    sum += end - std::max(next, begin);
    next = end;
  }
  return sum;
}

struct Access {
  int lane;
  uint32_t address;
};
void wavefronts(Wavefronts& of, const std::vector<Access>& accesses, uint32_t bytes) {
  if (accesses.empty()) return;
  ++of.requests;
  const int lanes_at_once = bytes <= 4 ? 32 : 128 / static_cast<int>(bytes);
  for (size_t from = 0; from < accesses.size();) {
    std::vector<uint32_t> words;
    const int phase = accesses[from].lane / lanes_at_once;
    for (; from < accesses.size() && accesses[from].lane / lanes_at_once == phase; ++from)
      for (uint32_t b = 0; b < bytes; b += 4) words.push_back((accesses[from].address + b) / 4);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int of_bank[kBanks] = {};
    for (uint32_t word : words) ++of_bank[word % kBanks];
    of.wavefronts += static_cast<uint64_t>(*std::max_element(of_bank, of_bank + kBanks));
    of.least += (words.size() + kBanks - 1) / kBanks;
  }
}

template <class Address>
std::vector<Access> accesses(Mask m, Address address) {
  std::vector<Access> all;
  for_lanes(m, [&](int l) { all.push_back({l, address(l)}); });
  return all;
}

Ranges ranges_of_box(const TensorMap& map, int64_t column, int64_t row) {
  Ranges ranges;
  const int64_t first = std::max<int64_t>(column, 0), columns = static_cast<int64_t>(map.columns);
  const int64_t last = std::min<int64_t>(column + map.box_columns, columns);
  const int64_t end = first < last ? std::min<int64_t>(row + map.box_rows, static_cast<int64_t>(map.rows)) : 0;
  for (int64_t r = std::max<int64_t>(row, 0); r < end; ++r) {
    const uint64_t base = map.base + static_cast<uint64_t>(r) * map.stride_bytes;
    ranges.push_back({base + static_cast<uint64_t>(first) * map.element_bytes,
                      base + static_cast<uint64_t>(last) * map.element_bytes});
  }
  return ranges;
}

}  // namespace

void Traffic::request(Requests& of, Ranges& ranges, std::unordered_set<uint64_t>& touched) {
  if (ranges.empty()) return;
  std::sort(ranges.begin(), ranges.end());
  ++of.requests;
  for (const auto& [begin, end] : ranges) of.bytes += end - begin;
  of.least += (distinct_bytes(ranges) + kSector - 1) / kSector;
  for_units(ranges, kLine, [&](uint64_t) { ++of.lines; });
  for_units(ranges, kSector, [&](uint64_t sector) {
    ++of.sectors;
    if (&of != &prefetches) touched.insert(sector);
  });
}

void Traffic::count(Warp& w, const Instruction& i, Mask m) {
  const uint32_t bytes = i.lane_bytes;
  Ranges ranges;
  auto shared_address = [&](int l) {
    const Place place = i.memory == Memory::kCopyAsync ? i.d : i.a;
    return static_cast<uint32_t>(w.reg<uint32_t>(place)[l] + i.offset);
  };
  switch (i.memory) {
    case Memory::kNone: return;
    case Memory::kSharedLoad: return wavefronts(shared_loads, accesses(m, shared_address), bytes);
    case Memory::kSharedStore: return wavefronts(shared_stores, accesses(m, shared_address), bytes);
    case Memory::kMatrices: {
      const auto lanes = static_cast<int>(i.list.size()) * 8;
      return wavefronts(matrices, accesses(lanes == 32 ? ~0u : (1u << lanes) - 1, shared_address), 16);
    }
    case Memory::kGlobalLoad:
    case Memory::kGlobalStore: {
      for_lanes(m, [&](int l) {
        const uint64_t from = w.reg<uint64_t>(i.a)[l] + i.offset;
        ranges.push_back({from, from + bytes});
      });
      const bool reads = i.memory == Memory::kGlobalLoad;
      return request(reads ? loads : stores, ranges, reads ? read : written);
    }
    case Memory::kCopyAsync: {
      for_lanes(m, [&](int l) {
        const uint64_t from = w.reg<uint64_t>(i.a)[l] + i.offset2;
        const uint32_t size = w.reg<uint32_t>(i.list.empty() ? i.c : i.list[0])[l];
        if (size) ranges.push_back({from, from + size});
      });
      wavefronts(shared_copies, accesses(m, shared_address), w.reg<uint32_t>(i.c)[std::countr_zero(m)]);
      return request(copies, ranges, read);
    }
    case Memory::kBulk:
    case Memory::kPrefetch:
    case Memory::kTensor:
      for_lanes(m, [&](int l) {
        if (i.memory == Memory::kTensor) {
          const auto* map = reinterpret_cast<const TensorMap*>(w.reg<uint64_t>(i.a)[l]);
          ranges = ranges_of_box(*map, w.reg<int32_t>(i.list[0])[l], w.reg<int32_t>(i.list[1])[l]);
        } else {
          const uint64_t from = w.reg<uint64_t>(i.a)[l];
          ranges = {{from, from + w.reg<uint32_t>(i.b)[l]}};
        }
        request(i.memory == Memory::kPrefetch ? prefetches : bulk, ranges, read);
      });
  }
}

void Traffic::end_launch(const Launch& launch) {
  ++launches;
  ctas += static_cast<uint64_t>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  threads = launch.threads;
  distinct_read += read.size();
  distinct_written += written.size();
  read.clear();
  written.clear();
}

std::string as_json(const std::map<std::string, Traffic>& kernels) {
  std::ostringstream s;
  const char* between = "{";
  for (const auto& [name, t] : kernels) {
    s << between << '"' << name << "\":{\"launches\":" << t.launches << ",\"ctas\":" << t.ctas
      << ",\"threads\":" << t.threads << ",\"distinct_read\":" << t.distinct_read
      << ",\"distinct_written\":" << t.distinct_written;
    for (int u = 0; u < kNumUnits; ++u) s << ",\"" << kUnitNames[u] << "\":" << t.issued[static_cast<size_t>(u)];
    auto requests = [&](const char* what, const Requests& r) {
      s << ",\"" << what << "\":{\"requests\":" << r.requests << ",\"bytes\":" << r.bytes
        << ",\"sectors\":" << r.sectors << ",\"least\":" << r.least << ",\"lines\":" << r.lines << '}';
    };
    requests("loads", t.loads);
    requests("stores", t.stores);
    requests("copies", t.copies);
    requests("bulk", t.bulk);
    requests("prefetches", t.prefetches);
    auto shared = [&](const char* what, const Wavefronts& x) {
      s << ",\"" << what << "\":{\"requests\":" << x.requests << ",\"wavefronts\":" << x.wavefronts
        << ",\"least\":" << x.least << '}';
    };
    shared("shared_loads", t.shared_loads);
    shared("shared_stores", t.shared_stores);
    shared("matrices", t.matrices);
    shared("shared_copies", t.shared_copies);
    s << '}';
    between = ",";
  }
  s << (kernels.empty() ? "{}" : "}");
  return s.str();
}

// Which unit an instruction runs on, and what it does to memory.
void classify(const Parsed& p) {
  const std::string &op = p.parts[0], &t = p.type();
  Instruction& o = p.out;
  auto any_of = [&](std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), op) != names.end();
  };
  const bool is_float = t[0] == 'f' || t.rfind("bf", 0) == 0;
  o.unit = Unit::kInteger;
  if (op == "ld" || op == "st" || op == "atom" || op == "red") {
    const bool loads = op == "ld";
    o.lane_bytes = static_cast<uint8_t>(type_bytes(t) * std::max<size_t>(1, o.list.size()));
    if (p.has("param")) {
      o.unit = Unit::kMove;
    } else if (p.has("shared") || p.has("shared::cta")) {
      o.unit = loads ? Unit::kSharedLoad : Unit::kSharedStore;
      o.memory = loads ? Memory::kSharedLoad : Memory::kSharedStore;
    } else {
      o.unit = loads ? Unit::kGlobalLoad : Unit::kGlobalStore;
      o.memory = loads ? Memory::kGlobalLoad : Memory::kGlobalStore;
    }
  } else if (op == "ldmatrix" || op == "stmatrix") {
    o.unit = Unit::kMatrix;
    o.memory = Memory::kMatrices;
  } else if (op == "cp" && (p.has("commit_group") || p.has("wait_group") || p.has("wait_all"))) {
    o.unit = Unit::kBarrier;
  } else if (op == "cp") {
    o.unit = Unit::kCopy;
    o.memory = p.has("prefetch") ? Memory::kPrefetch
               : p.has("tensor") ? Memory::kTensor
               : p.has("bulk")   ? Memory::kBulk
                                 : Memory::kCopyAsync;
  } else if (op == "mma" || (op == "wgmma" && p.has("mma_async"))) {
    o.unit = Unit::kProduct;
  } else if (any_of({"bar", "barrier", "mbarrier", "fence", "membar", "griddepcontrol", "wgmma"})) {
    o.unit = Unit::kBarrier;
  } else if (any_of({"bra", "ret", "exit", "trap"})) {
    o.unit = Unit::kBranch;
  } else if (any_of({"shfl", "vote", "redux", "activemask"})) {
    o.unit = Unit::kShuffle;
  } else if (any_of({"mov", "cvta"})) {
    o.unit = Unit::kMove;
  } else if (any_of({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}) || (op == "div" && is_float)) {
    o.unit = Unit::kSpecial;
  } else if ((is_float || (op == "cvt" && p.parts[p.parts.size() - 2][0] == 'f')) && op != "selp") {
    o.unit = Unit::kFloat;
  }
}

}  // namespace ptx
