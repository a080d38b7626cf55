// A recorded pass: the CPU ops called while recording, with their parameters, replayed in one go. The CPU's analogue
// of a CUDA graph: pointers and sizes are frozen, the data they point at is read anew.
#pragma once
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace orthrus::cpu {

class Tape {
 public:
  Tape() = default;
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;
  ~Tape() { stop(); }

  // From here to stop(), ops called on this thread are recorded instead of run, also by other tapes' replays.
  void start();
  void stop();  // does nothing if this tape is not recording on this thread
  void replay() const;
  int64_t size() const { return static_cast<int64_t>(ops_.size()); }

  void append(std::function<void()> op) { ops_.push_back(std::move(op)); }
  // The tape that is recording on this thread, or null.
  static Tape* recording();

 private:
  std::vector<std::function<void()>> ops_;
};

}  // namespace orthrus::cpu
