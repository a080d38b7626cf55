// Adds emitted tokens to the counts that penalties read; contract in orthrus/params.h. One read and write of a count
// per new token.
#include "slot_ops.h"

#include <algorithm>

namespace orthrus::cpu {

void run_count_tokens(const CountTokensParams& p) {
  const SlotState& s = p.state;
  for (int64_t slot = 0; slot < s.num_slots; ++slot) {
    const int32_t* ring = s.output + slot * s.output_capacity;
    const int32_t total = s.num_output[slot], first = std::max(p.num_counted[slot], total - s.output_capacity);
    for (int32_t i = first; i < total; ++i) {
      const int32_t token = ring[i % s.output_capacity];
      if (token < 0 || token >= p.vocab_size) continue;
      int32_t& count = p.token_counts[slot * p.vocab_size + token];
      count = std::max(count, 0) + 1;
    }
    p.num_counted[slot] = total;
  }
}

}  // namespace orthrus::cpu
