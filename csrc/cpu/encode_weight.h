// Packs bf16 weights in 12 bits: see coded_weight.h.
#pragma once
#include <cstdint>

#include "orthrus/params.h"

namespace orthrus::cpu {

// `plain`: num_strips strips of num_steps steps each, an even number, as row_linear.h packs them.
int64_t coded_weight_bytes(const bf16_t* plain, int64_t num_strips, int64_t num_steps);
void encode_weight(const bf16_t* plain, int64_t num_strips, int64_t num_steps, char* out);

}  // namespace orthrus::cpu
