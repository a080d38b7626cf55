#include "tape.h"

#include <stdexcept>

#include "orthrus/ops.h"

namespace orthrus::cpu {
namespace {

thread_local Tape* current = nullptr;

template <typename T>
void run(const RowLinearParamsOf<T>& p) { row_linear(p); }
template <typename T>
void run(const QkvCommitParamsOf<T>& p) { qkv_commit(p); }
template <typename T>
void run(const DualAttnParamsOf<T>& p) { dual_attn(p); }
template <typename T>
void run(const RmsNormParamsOf<T>& p) { rms_norm(p); }
template <typename T>
void run(const EmbedParamsOf<T>& p) { embed(p); }
void run(const ConsensusParams& p) { consensus(p); }
void run(const ProcessLogitsParams& p) { process_logits(p); }
void run(const CountTokensParams& p) { count_tokens(p); }

}  // namespace

Tape* Tape::recording() { return current; }

void Tape::start() {
  if (current) throw std::runtime_error("Tape.record: another tape is recording on this thread");
  ops_.clear();
  current = this;
}

void Tape::stop() { current = nullptr; }

void Tape::replay() const {
  if (current == this) throw std::runtime_error("Tape.replay: this tape is recording");
  if (current) {
    current->ops_.insert(current->ops_.end(), ops_.begin(), ops_.end());
    return;
  }
  for (const Op& op : ops_) std::visit([](const auto& p) { run(p); }, op);
}

}  // namespace orthrus::cpu
