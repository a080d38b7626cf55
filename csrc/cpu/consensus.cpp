// Coupled choice, accepted prefix, stop conditions, commit and staging, slot by slot.
#include "consensus.h"

#include <algorithm>

namespace orthrus::cpu {
namespace {

// Best of a row's partial maxima: ties go to the earlier vocabulary tile, hence to the lowest id.
int32_t choice(const ConsensusParams& p, int64_t row) {
  const int32_t* id = p.partial_id + row * p.num_partials;
  if (!p.partial_value) return id[0];
  const float* value = p.partial_value + row * p.num_partials;
  int32_t best = 0;
  for (int32_t i = 1; i < p.num_partials; ++i) {
    if (value[i] > value[best]) best = i;
  }
  return id[best];
}

void take_drafts(const ConsensusParams& p, int32_t slot) {
  const SlotState& s = p.state;
  const int32_t room = s.limit[slot] - 1 - s.cache_seqlens[slot];
  const int32_t count = std::max(0, std::min(p.rows_per_slot, room));
  int32_t* drafts = s.block_tokens + int64_t{slot} * s.block_len + 1;
  for (int32_t i = 0; i < count; ++i) drafts[i] = choice(p, int64_t{slot} * p.rows_per_slot + i);
  s.num_drafts[slot] = count;
}

bool is_stop(const SlotState& s, int32_t slot, int32_t token) {
  const int32_t* ids = s.stop_ids + int64_t{slot} * s.max_stop_ids;
  return token >= 0 && std::find(ids, ids + s.max_stop_ids, token) != ids + s.max_stop_ids;
}

void accept(const ConsensusParams& p, int32_t slot) {
  const SlotState& s = p.state;
  int32_t* block = s.block_tokens + int64_t{slot} * s.block_len;
  const int64_t first_row = int64_t{slot} * p.rows_per_slot;
  const int32_t n = s.cache_seqlens[slot];
  const int32_t room = s.limit[slot] - 1 - n;

  int32_t accepted = 0, emitted = 0, last = 0;
  bool stopped = false, matching = true;
  while (matching && !stopped && emitted < room) {
    last = choice(p, first_row + emitted);
    matching = emitted < s.num_drafts[slot] && block[1 + emitted] == last;
    accepted += matching;
    stopped = is_stop(s, slot, last);
    s.output[int64_t{slot} * s.output_capacity + s.num_output[slot] % s.output_capacity] = last;
    ++s.num_output[slot];
    ++emitted;
  }
  if (emitted > 0) block[0] = last;
  s.cache_seqlens[slot] = n + emitted;
  s.num_accepted[slot] = accepted;
  s.num_drafts[slot] = 0;
  const bool full = n + 1 + emitted >= s.limit[slot];
  const auto unless_stopped = full ? FinishReason::kLength : FinishReason::kRunning;
  s.finish[slot] = static_cast<int32_t>(stopped ? FinishReason::kStop : unless_stopped);
}

void stage(const ConsensusParams& p, int32_t slot) {
  const SlotState& s = p.state;
  const bool running = s.finish[slot] == static_cast<int32_t>(FinishReason::kRunning);
  const auto next = static_cast<NextPass>(p.next_pass);
  const int32_t count = next == NextPass::kAr ? 1 : s.block_len;
  const int32_t n = s.cache_seqlens[slot];
  const int32_t* block = s.block_tokens + int64_t{slot} * s.block_len;
  for (int32_t i = 0; i < count; ++i) {
    const int64_t r = int64_t{slot} * count + i;
    bool valid = running && n + i < s.limit[slot];
    if (next == NextPass::kVerify) valid = valid && i <= s.num_drafts[slot];
    const int32_t token = next == NextPass::kDraft && i > 0 ? p.mask_token_id : block[i];
    p.next_token[r] = valid ? token : 0;
    p.next_position[r] = valid ? n + i : -1;
    p.next_seq[r] = slot;
    p.next_prefix_len[r] = !valid ? 0 : next == NextPass::kDraft ? n : n + i + 1;
  }
}

}  // namespace

void run_consensus(const ConsensusParams& p) {
  for (int32_t slot = 0; slot < p.state.num_slots; ++slot) {
    if (p.state.finish[slot] == static_cast<int32_t>(FinishReason::kRunning)) {
      const auto step = static_cast<ConsensusStep>(p.step);
      if (step == ConsensusStep::kDraft) take_drafts(p, slot);
      if (step == ConsensusStep::kVerify) accept(p, slot);
    }
    if (p.next_pass != static_cast<int32_t>(NextPass::kNone)) stage(p, slot);
  }
}

}  // namespace orthrus::cpu
