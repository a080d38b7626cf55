// Coupled choice, accepted prefix, stop conditions, commit and staging, slot by slot.
//
// Contract (shapes in params.h): MUTATED: the slots' state, their output, and all staged rows. No slots: nothing is
// done. Deterministic. Bytes: 4 per partial of the rows up to the first that differs from its draft; of a one-pass
// cycle's blocks, only of the one that hit.
#include "slot_ops.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "orthrus/hypotheses.h"
#include "orthrus/staging.h"

namespace orthrus::cpu {
namespace {

// `none`: no partial maximum is above -inf, and the id is merely that of the first one.
struct Choice {
  int32_t id;
  bool none;
};

// Best of a row's partial maxima: ties go to the earlier vocabulary tile, hence to the lowest id; NaN never wins.
Choice choose(const ConsensusParams& p, int64_t row) {
  const int32_t* id = p.partial_id + row * p.num_partials;
  const float* value = p.partial_value + row * p.num_partials;
  float best = -INFINITY;
  int32_t at = 0;
  for (int32_t i = 0; i < p.num_partials; ++i) {
    if (value[i] > best) {
      best = value[i];
      at = i;
    }
  }
  return {id[at], !(best > -INFINITY)};
}

// The likeliest tokens of a draft row, one per vocabulary tile, and their softmax over all tiles' maxima.
struct Candidates {
  std::array<int32_t, kCandidates> id;
  std::array<float, kCandidates> prob;
};

Candidates candidates(const ConsensusParams& p, int64_t row) {
  const float* value = p.partial_value + row * p.num_partials;
  const int32_t* id = p.partial_id + row * p.num_partials;
  Candidates top;
  top.id.fill(id[0]);
  top.prob.fill(-INFINITY);
  for (int32_t i = 0; i < p.num_partials; ++i) {
    if (!(value[i] > top.prob.back())) continue;
    int32_t at = kCandidates - 1;
    for (; at > 0 && value[i] > top.prob[at - 1]; --at) {
      top.prob[at] = top.prob[at - 1];
      top.id[at] = top.id[at - 1];
    }
    top.prob[at] = value[i];
    top.id[at] = id[i];
  }
  const float best = top.prob[0];
  if (!std::isfinite(best)) {
    top.prob.fill(0.f);
    return top;
  }
  float total = 0.f;
  for (int32_t i = 0; i < p.num_partials; ++i) {
    if (value[i] > -INFINITY) total += std::exp(value[i] - best);
  }
  for (float& prob : top.prob) prob = std::exp(prob - best) / total;
  return top;
}

void take_drafts(const ConsensusParams& p, int32_t slot) {
  const SlotState& s = p.state;
  const int32_t room = s.limit[slot] - 1 - s.cache_seqlens[slot];
  const int32_t count = std::max(0, std::min(p.rows_per_slot, room));
  int32_t* drafts = s.block_tokens + int64_t{slot} * s.max_block_len + 1;
  for (int32_t i = 0; i < count; ++i) drafts[i] = choose(p, int64_t{slot} * p.rows_per_slot + i).id;
  s.num_drafts[slot] = count;
}

bool is_stop(const SlotState& s, int32_t slot, int32_t token) {
  const int32_t* ids = s.stop_ids + int64_t{slot} * s.max_stop_ids;
  return token >= 0 && std::find(ids, ids + s.max_stop_ids, token) != ids + s.max_stop_ids;
}

// The drafts behind the rejected one were made for the same positions: they stay, with kDoubt on their probabilities.
void keep_tail(const SlotState& s, int32_t slot, int32_t num_drafts, int32_t accepted) {
  int32_t* block = s.block_tokens + int64_t{slot} * s.max_block_len;
  int32_t* runner_up = s.runner_up + int64_t{slot} * s.max_block_len * (kCandidates - 1);
  float* prob = s.draft_prob + int64_t{slot} * s.max_block_len * kCandidates;
  const int32_t count = std::max(0, num_drafts - accepted - 1);
  for (int32_t i = 1; i <= count; ++i) {
    const int32_t from = i + accepted + 1;
    block[i] = block[from];
    std::copy_n(runner_up + from * (kCandidates - 1), kCandidates - 1, runner_up + i * (kCandidates - 1));
    std::copy_n(prob + from * kCandidates, kCandidates, prob + i * kCandidates);
    prob[i * kCandidates] *= kDoubt;
  }
  s.num_drafts[slot] = count;
}

// The next drafts, from the block whose hypothesis came true.
void take_block(const ConsensusParams& p, int32_t slot, const Hit& hit, int32_t bonus) {
  const SlotState& s = p.state;
  const int64_t rows = int64_t{slot} * p.rows_per_slot + p.block_len * (1 + hit.block);
  const bool doubt = hit.first_row == 1 && choose(p, rows).id != bonus;
  int32_t* block = s.block_tokens + int64_t{slot} * s.max_block_len;
  int32_t* runner_up = s.runner_up + int64_t{slot} * s.max_block_len * (kCandidates - 1);
  float* prob = s.draft_prob + int64_t{slot} * s.max_block_len * kCandidates;
  const int32_t count = std::min(p.block_len - 1, s.limit[slot] - 1 - s.cache_seqlens[slot]);
  for (int32_t i = 1; i <= count; ++i) {
    const Candidates top = candidates(p, rows + hit.first_row + i - 1);
    block[i] = top.id[0];
    std::copy_n(top.id.begin() + 1, kCandidates - 1, runner_up + i * (kCandidates - 1));
    std::copy_n(top.prob.begin(), kCandidates, prob + i * kCandidates);
    if (doubt) prob[i * kCandidates] *= kDoubt;
  }
  s.num_drafts[slot] = count;
}

void accept(const ConsensusParams& p, int32_t slot) {
  const SlotState& s = p.state;
  int32_t* block = s.block_tokens + int64_t{slot} * s.max_block_len;
  const int64_t first_row = int64_t{slot} * p.rows_per_slot;
  const int32_t n = s.cache_seqlens[slot];
  const int32_t num_choices = p.step == ConsensusStep::kVerifyAndDraft ? p.block_len : p.rows_per_slot;
  const int32_t room = std::min(num_choices, s.limit[slot] - 1 - n);
  const int32_t num_drafts = s.num_drafts[slot];

  int32_t accepted = 0, emitted = 0, last = 0;
  bool stopped = false, matching = true, no_choice = false;
  while (matching && !stopped && emitted < room) {
    const Choice chosen = choose(p, first_row + emitted);
    no_choice = chosen.none;
    if (no_choice) break;
    last = chosen.id;
    matching = emitted < num_drafts && block[1 + emitted] == last;
    accepted += matching;
    stopped = is_stop(s, slot, last);
    s.output[int64_t{slot} * s.output_capacity + s.num_output[slot] % s.output_capacity] = last;
    ++s.num_output[slot];
    ++emitted;
  }
  if (emitted > 0) block[0] = last;
  s.cache_seqlens[slot] = n + emitted;
  s.num_verified[slot] = num_drafts;
  s.num_accepted[slot] = accepted;
  s.num_drafts[slot] = 0;
  const bool full = n + 1 + emitted >= s.limit[slot];
  s.finish[slot] = no_choice ? FinishReason::kNoChoice
                   : stopped ? FinishReason::kStop
                   : full    ? FinishReason::kLength
                             : FinishReason::kRunning;
  if (s.finish[slot] != FinishReason::kRunning || p.step != ConsensusStep::kVerifyAndDraft) return;
  const Hit hit = find_hit(s.hypotheses + int64_t{slot} * s.max_fan_out * 2, p.fan_out, accepted, last);
  if (hit.block >= 0) {
    take_block(p, slot, hit, last);
  } else {
    keep_tail(s, slot, num_drafts, accepted);
  }
}

struct OneLane {
  static constexpr int32_t kLanes = 1;
  int32_t lane = 0;
  Hypothesis best(const Hypothesis& mine) const { return mine; }
};

void stage(const ConsensusParams& p, int32_t slot) {
  const SlotState& s = p.state;
  const bool running = s.finish[slot] == FinishReason::kRunning;
  const int32_t count = p.next_pass == NextPass::kAr ? 1 : p.block_len;
  const int32_t n = s.cache_seqlens[slot];
  const int32_t* block = s.block_tokens + int64_t{slot} * s.max_block_len;
  if (p.step == ConsensusStep::kStage) {
    s.num_drafts[slot] = verifies(p.next_pass) ? std::min(s.num_drafts[slot], count - 1) : 0;
  }
  for (int32_t i = 0; i < count; ++i) {
    write_row(p, int64_t{slot} * count + i, slot,
              running ? own_row(p, block, n, s.limit[slot], s.num_drafts[slot], i) : StagedRow{});
  }
  if (p.next_pass != NextPass::kOnePass) return;
  int32_t* hypotheses = s.hypotheses + int64_t{slot} * s.max_fan_out * 2;
  if (running) {
    std::array<float, kMaxBlockLen> reach;
    std::array<uint32_t, kMaxBlockLen> picked;
    const float* prob = s.draft_prob + int64_t{slot} * s.max_block_len * kCandidates;
    const int32_t* runner_up = s.runner_up + int64_t{slot} * s.max_block_len * (kCandidates - 1);
    pick_hypotheses(OneLane{}, prob, runner_up, s.num_drafts[slot], p.fan_out, reach.data(), picked.data(), hypotheses);
  }
  for (int32_t f = 0; f < p.fan_out; ++f) {
    for (int32_t i = 0; i < count; ++i) {
      const int64_t r = int64_t{s.num_slots} * count + (int64_t{slot} * p.fan_out + f) * count + i;
      write_row(p, r, slot, running ? block_row(p, hypotheses + 2 * f, block, n, s.limit[slot], i) : StagedRow{});
    }
  }
}

}  // namespace

void run_consensus(const ConsensusParams& p) {
  for (int32_t slot = 0; slot < p.state.num_slots; ++slot) {
    if (p.state.finish[slot] == FinishReason::kRunning) {
      if (p.step == ConsensusStep::kDraft) {
        take_drafts(p, slot);
      } else if (p.step != ConsensusStep::kStage) {
        accept(p, slot);
      }
    }
    if (p.next_pass != NextPass::kNone) stage(p, slot);
  }
}

}  // namespace orthrus::cpu
