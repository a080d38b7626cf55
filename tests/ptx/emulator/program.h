// A PTX module as the emulator runs it: decoded instructions, whose operands are places in a warp's register file.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

struct Warp;
struct Instruction;
using Mask = uint32_t;  // of a warp's lanes
using Handler = void (*)(Warp&, const Instruction&, Mask);

// Which lanes or warps must have arrived before an instruction runs.
enum class Kind : uint8_t {
  kLanes,    // each lane by itself
  kBranch,
  kExit,
  kMembers,  // the lanes of its membermask (operand `mask`)
  kAligned,  // all lanes of the warp
  kBarrier,  // all lanes of the warp, then the warps that the barrier is for
  kTryWait,  // each lane, until the mbarrier's phase has completed
  kClusterWait,  // each warp, until all of its cluster have arrived
};

// The unit whose issue slots an instruction takes.
enum class Unit : uint8_t {
  kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore, kMatrix, kCopy, kProduct, kFloat, kSpecial, kInteger,
  kMove,  // and parameters: most of them are not SASS instructions
  kShuffle, kBarrier, kBranch
};
constexpr const char* kUnitNames[] = {
    "global_load", "global_store", "shared_load", "shared_store", "matrix", "copy", "product", "float", "special",
    "integer",     "move",         "shuffle",     "barrier",      "branch"};
constexpr int kNumUnits = sizeof(kUnitNames) / sizeof(*kUnitNames);
// What an instruction does to memory.
enum class Memory : uint8_t {
  kNone, kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore, kMatrices, kCopyAsync, kBulk, kTensor, kPrefetch
};

// Register files hold 32 lanes of 4 or 8 bytes per register. A place is an offset in bytes.
using Place = uint32_t;

struct Instruction {
  Handler run = nullptr;
  Kind kind = Kind::kLanes;
  Unit unit = Unit::kBranch;
  Memory memory = Memory::kNone;
  uint8_t lane_bytes = 0;        // bytes that a lane loads or stores
  Place d = 0, a = 0, b = 0, c = 0, mask = 0;
  Place guard = 0;               // 0: none
  bool guard_negated = false;
  bool is_leader = false;        // a label precedes it
  uint32_t target = 0;           // of a branch
  int64_t offset = 0;            // of a memory operand, or an immediate of the instruction
  int64_t offset2 = 0;
  std::vector<Place> list, list2;  // vectors
  int line = 0, loc_file = 0, loc_line = 0;
  std::string text;
};

// What a register holds before the first instruction.
enum class Preset : uint8_t { kValue, kParam, kTid, kCtaid, kNtid, kNctaid, kLane, kWarp };
struct Constant {
  Preset kind;
  int64_t value;  // or the dimension, or the offset in the parameters
  Place place;
  int bytes;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  std::vector<uint32_t> param_offsets;
  uint32_t param_bytes = 0;
  uint32_t file_bytes = 0;
  uint32_t first_constant = 0;  // place
  uint32_t static_shared = 0;   // bytes; dynamic shared memory follows at its alignment
  uint32_t dynamic_align = 1;
  uint32_t granule = 4;         // bytes of the smallest access of shared memory, 4 at most
  bool has_wgmma = false, has_pdl = false, has_atomics = false;
  int max_threads = 1024, required_threads = 0;
};

struct Module {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::map<int, std::string> files;
  int arch = 0;
};

Module parse(const std::string& text);

// Shared memory addresses of a kernel begin here: the driver reserves the first KiB.
constexpr uint32_t kSharedBegin = 1024;

}  // namespace ptx
