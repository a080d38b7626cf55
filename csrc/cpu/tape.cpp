#include "tape.h"

#include <stdexcept>

#include "float_mode.h"

namespace orthrus::cpu {
namespace {

thread_local Tape* current = nullptr;

}  // namespace

Tape* Tape::recording() { return current; }

void Tape::start() {
  if (current) throw std::runtime_error("Tape: another tape is recording on this thread");
  ops_.clear();
  current = this;
}

void Tape::stop() {
  if (current == this) current = nullptr;
}

void Tape::replay() const {
  if (current == this) throw std::runtime_error("Tape.replay: this tape is recording");
  if (current) {
    current->ops_.insert(current->ops_.end(), ops_.begin(), ops_.end());
    return;
  }
  const FloatMode mode;
  for (const auto& op : ops_) op();
}

}  // namespace orthrus::cpu
