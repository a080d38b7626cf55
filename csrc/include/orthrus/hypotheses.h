// Which blocks a one-pass cycle drafts while it verifies: a wager on how its own verification will end.
//
// A hypothesis (accepted, anchor) supposes that exactly `accepted` = j drafts are accepted. With anchor -1 its block
// starts at the last accepted token, at position n + j: the bonus token behind it is unseen, the block's row 0 guesses
// it and rows 1 ... give the next drafts. With a token as anchor, a runner-up for the rejected draft j + 1, the block
// starts at that position, n + j + 1: if the bonus token is this one, rows 0 ... are the very drafts that a draft pass
// of its own would have made. accepted -1: no hypothesis.
//
// They are picked greedily by expected gain: P(outcome) times the tokens that drafts for it add to the next pass, a
// block with the bonus unseen counting 1. P comes from the drafter's own probabilities p of its draft and runners-up:
// drafts 1 ... j accepted, then j + 1 rejected. Only speed depends on any of this, never a token.
// The constants are fitted: bench/bench_hypotheses.py.
#pragma once
#include "orthrus/host_device.h"
#include "orthrus/params.h"

namespace orthrus {

// Gain of drafting behind the true bonus token, over drafting with it unseen.
constexpr float kSeenGain = 1.6f;
// Factor on the probability of drafts that follow a wrong guess of the bonus token, or are kept from a rejected block.
constexpr float kDoubt = 0.5f;

struct Hypothesis {
  float gain;  // -1: none
  int32_t accepted;
  int32_t rank;  // 0: bonus unseen; else the runner-up that is the anchor
};

// Gain of (accepted, rank) given those already picked for the same `accepted`, a bit for each rank; -1: impossible.
// `reach` is the probability that `accepted` drafts are accepted at all, `prob` that of the next draft and runners-up.
ORTHRUS_HD float gain(float reach, const float* prob, bool last, int32_t rank, uint32_t picked) {
  if ((picked >> rank & 1) || (last && rank > 0)) return -1.f;
  if (rank > 0) return reach * prob[rank] * ((picked & 1) ? kSeenGain - 1.f : kSeenGain);
  float open = last ? 1.f : 1.f - prob[0];
  for (int32_t r = 1; r < kCandidates; ++r) {
    if (picked >> r & 1) open -= prob[r];
  }
  return reach * (open > 0.f ? open : 0.f);
}

// Picks `fan_out` hypotheses of one slot into `hypotheses`. Called by every lane of a `Team` (a warp, or the one lane
// of a CPU thread): team.lane, Team::kLanes and best(), of the lanes' offers that of the largest gain, of equal ones
// that with fewest accepted, then of lowest rank. `prob`, `runner_up`: of the slot's block, as SlotState has them.
// `reach` and `picked` are scratch of num_drafts + 1 elements, of which a lane touches only its own.
template <typename Team>
ORTHRUS_HD void pick_hypotheses(const Team& team, const float* __restrict__ prob, const int32_t* runner_up,
                                int32_t num_drafts, int32_t fan_out, float* __restrict__ reach,
                                uint32_t* __restrict__ picked, int32_t* hypotheses) {
  float product = 1.f;
  for (int32_t j = 0; j <= num_drafts; ++j) {
    if (j % Team::kLanes == team.lane) {
      reach[j] = product;
      picked[j] = 0;
    }
    if (j < num_drafts) product *= prob[(j + 1) * kCandidates];
  }
  for (int32_t f = 0; f < fan_out; ++f) {
    Hypothesis best{-1.f, -1, 0};
    for (int32_t j = team.lane; j <= num_drafts; j += Team::kLanes) {
      for (int32_t rank = 0; rank < kCandidates; ++rank) {
        const bool last = j == num_drafts;
        const float offer = gain(reach[j], last ? nullptr : prob + (j + 1) * kCandidates, last, rank, picked[j]);
        if (offer > best.gain) best = {offer, j, rank};
      }
    }
    best = team.best(best);
    if (best.accepted >= 0 && best.accepted % Team::kLanes == team.lane) picked[best.accepted] |= 1u << best.rank;
    if (team.lane == 0) {
      hypotheses[2 * f] = best.accepted;
      hypotheses[2 * f + 1] = best.rank == 0 ? -1 : runner_up[(best.accepted + 1) * (kCandidates - 1) + best.rank - 1];
    }
  }
}

// The block whose hypothesis came true, -1 if none did, and the first of its rows that drafts.
struct Hit {
  int32_t block;
  int32_t first_row;
};

ORTHRUS_HD Hit find_hit(const int32_t* hypotheses, int32_t fan_out, int32_t accepted, int32_t bonus) {
  Hit hit{-1, 0};
  for (int32_t f = 0; f < fan_out; ++f) {
    if (hypotheses[2 * f] != accepted) continue;
    if (hypotheses[2 * f + 1] == bonus) return {f, 0};
    if (hypotheses[2 * f + 1] < 0 && hit.block < 0) hit = {f, 1};
  }
  return hit;
}

}  // namespace orthrus
