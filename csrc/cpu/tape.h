// A recorded pass: the parameters of the CPU ops called while recording, replayed in one go. The CPU's analogue of a
// CUDA graph: pointers and sizes are frozen, the data they point at is read anew.
#pragma once
#include <variant>
#include <vector>

#include "orthrus/params.h"

namespace orthrus::cpu {

class Tape {
 public:
  // From here to stop(), ops called on this thread are recorded instead of run, also by other tapes' replays.
  void start();
  void stop();
  void replay() const;
  int64_t size() const { return static_cast<int64_t>(ops_.size()); }

  template <typename Params>
  void append(const Params& p) {
    ops_.emplace_back(p);
  }
  // The tape that is recording on this thread, or null.
  static Tape* recording();

 private:
  using Op = std::variant<
      RowLinearParamsOf<bf16_t>, QkvCommitParamsOf<bf16_t>, DualAttnParamsOf<bf16_t>, RmsNormParamsOf<bf16_t>,
      EmbedParamsOf<bf16_t>, RowLinearParamsOf<float>, QkvCommitParamsOf<float>, DualAttnParamsOf<float>,
      RmsNormParamsOf<float>, EmbedParamsOf<float>, ConsensusParams, ProcessLogitsParams, CountTokensParams>;
  std::vector<Op> ops_;
};

}  // namespace orthrus::cpu
