// Bookkeeping of a few integers per slot: single-threaded, without variants.
#pragma once
#include "orthrus/params.h"

namespace orthrus::cpu {

void run_consensus(const ConsensusParams& p);
void run_count_tokens(const CountTokensParams& p);

}  // namespace orthrus::cpu
