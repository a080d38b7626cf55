#include "variant.h"

bool orthrus::cpu::amx_bf16::tiles_offered() { return true; }
