// The rows that consensus stages for the next pass; NextPass in params.h lists them.
#pragma once
#include "orthrus/host_device.h"
#include "orthrus/params.h"

namespace orthrus {

// By default an invalid row.
struct StagedRow {
  int32_t token = 0, position = -1, prefix_len = 0;
};

ORTHRUS_HD void write_row(const ConsensusParams& p, int64_t row, int32_t slot, const StagedRow& staged) {
  p.next_token[row] = staged.token;
  p.next_position[row] = staged.position;
  p.next_seq[row] = slot;
  p.next_prefix_len[row] = staged.prefix_len;
}

ORTHRUS_HD bool verifies(NextPass next) { return next == NextPass::kVerify || next == NextPass::kOnePass; }

// Row i of a block of diffusion rows that starts at position `start` with the token `first`.
ORTHRUS_HD StagedRow diffusion_row(const ConsensusParams& p, int32_t first, int32_t start, int32_t limit, int32_t i) {
  if (start + i >= limit) return {};
  return {i > 0 ? p.mask_token_id : first, start + i, start};
}

// Row i of a slot's own block: t0, then masks (kDraft) or drafts.
ORTHRUS_HD StagedRow own_row(const ConsensusParams& p, const int32_t* block_tokens, int32_t cached, int32_t limit,
                             int32_t num_drafts, int32_t i) {
  if (p.next_pass == NextPass::kDraft) return diffusion_row(p, block_tokens[0], cached, limit, i);
  if (cached + i >= limit || (verifies(p.next_pass) && i > num_drafts)) return {};
  return {block_tokens[i], cached + i, cached + i + 1};
}

// Row i of the block of a hypothesis (see hypotheses.h).
ORTHRUS_HD StagedRow block_row(const ConsensusParams& p, const int32_t* hypothesis, const int32_t* block_tokens,
                               int32_t cached, int32_t limit, int32_t i) {
  const int32_t accepted = hypothesis[0], anchor = hypothesis[1];
  if (accepted < 0) return {};
  if (anchor >= 0) return diffusion_row(p, anchor, cached + accepted + 1, limit, i);
  return diffusion_row(p, block_tokens[accepted], cached + accepted, limit, i);
}

}  // namespace orthrus
