// Packs bf16 weights in 12 bits, or for drafts in 8: see coded_weight.h.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "orthrus/params.h"

namespace orthrus::cpu {

// Encodes `plain`, which must stay: num_strips strips of num_steps steps, an even number, packed as in row_linear.h.
// `bits` per element: 12, or 8 without the trailing parts.
class WeightEncoder {
 public:
  WeightEncoder(const bf16_t* plain, int64_t num_strips, int64_t num_steps, int bits);

  int64_t nbytes() const;
  // `out`: nbytes() bytes, aligned to a cache line.
  void write(char* out) const;

 private:
  struct Strip {
    std::array<uint8_t, 16> upper;  // bytes that have a code
    int64_t num_exceptions;
  };

  const bf16_t* plain_;
  int64_t num_steps_, leading_bytes_, trailing_bytes_;  // bytes of a strip
  std::vector<Strip> strips_;

  void write_strip(int64_t strip, char* out, char* trailing, char* exceptions) const;
};

}  // namespace orthrus::cpu
