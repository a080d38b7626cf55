// The one mask of this project: which keys a row sees. Every kernel and the oracle follow it.
#pragma once
#include "orthrus/host_device.h"
#include "orthrus/params.h"

namespace orthrus {

// A cached key at absolute position `kv` of the row's own sequence. AR rows have prefix_len = position + 1 (causal:
// their own key was written before attention); diffusion rows have prefix_len = their block's first position (the
// committed prefix only). Kernels that work on whole tiles of keys compare the index within the tile with
// prefix_len - first key.
ORTHRUS_HD bool sees_cached(int32_t kv, int32_t prefix_len) { return kv < prefix_len; }

// A key of the row's own diffusion block (same group), read from the scratch, never from the cache.
ORTHRUS_HD bool sees_block(int32_t key_position) { return key_position >= 0; }

ORTHRUS_HD bool row_is_valid(int32_t position) { return position >= 0; }

}  // namespace orthrus
