#pragma once
#include "orthrus/params.h"

namespace orthrus::cpu {

void run_consensus(const ConsensusParams& p);

}  // namespace orthrus::cpu
