// Which blocks a one-pass cycle drafts while it verifies: a wager on the outcome of its own verification.
//
// A hypothesis (accepted, anchor) supposes that exactly `accepted` = j drafts are accepted; accepted -1: no hypothesis.
// With anchor -1 its block starts at the last accepted token, at position n + j. The bonus token after it is unseen:
// row 0 of the block guesses it, and rows 1 ... give the next drafts. With a token as anchor, a runner-up for the
// rejected draft j + 1, the block starts at that draft's position, n + j + 1. If the bonus token is the anchor,
// rows 0 ... are the drafts that a separate draft pass would have made, if it read as much of each weight.
//
// They are picked greedily by expected gain: P(outcome) times the tokens that drafts for it add to the next pass, where
// a block with the bonus token unseen counts 1. P is computed from the drafter's own probabilities p of its drafts and
// runners-up: drafts 1 ... j accepted, then j + 1 rejected. All of this affects only speed, never a token. The
// constants are fitted: bench/bench_hypotheses.py.
#pragma once
#include "orthrus/host_device.h"
#include "orthrus/params.h"

namespace orthrus {

// Gain of drafting behind the true bonus token, relative to drafting with it unseen.
constexpr float kSeenGain = 1.6f;
// Factor on the probability of drafts that follow a wrong guess of the bonus token or are kept from a rejected block.
constexpr float kDoubt = 0.5f;

struct Hypothesis {
  float gain;  // -1: none
  int32_t accepted;
  int32_t rank;  // 0: bonus unseen; else the runner-up that is the anchor
};

// Gain of (accepted, rank); -1: impossible. `picked` has a bit for each rank already picked for the same `accepted`.
// `reach` is the probability that `accepted` drafts are accepted at all, `prob`: of the next draft and its runners-up.
ORTHRUS_HD float gain(float reach, const float* prob, bool last, int32_t rank, uint32_t picked) {
  if ((picked >> rank & 1) || (last && rank > 0)) return -1.f;
  if (rank > 0) return reach * prob[rank] * ((picked & 1) ? kSeenGain - 1.f : kSeenGain);
  float open = last ? 1.f : 1.f - prob[0];
  for (int32_t r = 1; r < kCandidates; ++r) {
    if (picked >> r & 1) open -= prob[r];
  }
  return reach * (open > 0.f ? open : 0.f);
}

// Picks `fan_out` hypotheses of one slot into `hypotheses`. Called by every lane of a `Team` (a warp, or a CPU thread
// as the only lane) with team.lane, Team::kLanes and best(), which returns the lanes' offer with the largest gain; ties
// go to the fewest accepted, then to the lowest rank. `prob` and `runner_up` are those of the slot's block, laid out as
// in SlotState. `reach` and `picked` are scratch of num_drafts + 1 elements; a lane touches only its own.
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

// The block whose hypothesis came true, or -1 if none did, and the first of its rows that drafts.
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
