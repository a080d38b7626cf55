// Choice, acceptance, stop, commit and staging of one cycle; contract in orthrus/params.h.
//
// One launch, one CTA a slot, one warp a row where they suffice. Warps reduce the partial maxima; one thread walks the
// block in shared memory; all threads write the results. Integer arithmetic but for comparisons and the wagers of
// hypotheses.h, all in a fixed order, so deterministic; graph-safe: limits, stop ids and lengths are read on the
// device. Reads 8 bytes a partial (of a one-pass cycle's blocks, only of the one that hit); everything else is small.
#include "best.cuh"
#include "orthrus/hypotheses.h"
#include "orthrus/launch.cuh"
#include "orthrus/ops.h"
#include "orthrus/staging.h"

namespace orthrus::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kAhead = 8;  // partials of a row in flight per lane

// Calls take(partial) for this lane's partials of one row; the loads of 256 are in flight at once.
template <typename Take>
__device__ void for_each_partial(const float* values, const int32_t* ids, int num_partials, int lane, Take take) {
  for (int first = lane; first < num_partials; first += 32 * kAhead) {
    Best ahead[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + 32 * j < num_partials) ahead[j] = {values[first + 32 * j], ids[first + 32 * j]};
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) take(ahead[j]);
  }
}

// The largest partial of one row; the first id at -inf where none is above that. Warp-collective.
__device__ Best choose(const float* values, const int32_t* ids, int num_partials, int lane) {
  Best best;
  for_each_partial(values, ids, num_partials, lane, [&](const Best& other) {
    if (beats(other, best)) best = other;
  });
  best = warp_best<32>(best);
  return best.value > -INFINITY ? best : Best{-INFINITY, ids[0]};
}

// The largest partials of one row, and their softmax over all its partials; the same on every lane. Warp-collective.
__device__ void choose_candidates(const float* values, const int32_t* ids, int num_partials, int lane,
                                  int32_t (&id)[kCandidates], float (&prob)[kCandidates]) {
  Best mine[kCandidates];
  for_each_partial(values, ids, num_partials, lane, [&](Best other) {
    const bool likely = other.value > -INFINITY;
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      if (likely && beats(other, mine[i])) {
        const Best smaller = mine[i];
        mine[i] = other;
        other = smaller;
      }
    }
  });
  float value[kCandidates];
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const Best best = warp_best<32>(mine[0]);
    value[i] = best.value;
    id[i] = best.id == INT32_MAX ? ids[0] : best.id;
    if (mine[0].id == best.id && best.id != INT32_MAX) {  // this lane's: ids are distinct
#pragma unroll
      for (int j = 0; j + 1 < kCandidates; ++j) mine[j] = mine[j + 1];
      mine[kCandidates - 1] = Best{};
    }
  }
  float total = 0.f;
  for_each_partial(values, ids, num_partials, lane, [&](const Best& partial) {
    if (partial.value > -INFINITY) total += expf(partial.value - value[0]);
  });
  for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(~0u, total, mask);
  const bool finite = value[0] > -INFINITY && value[0] < INFINITY;
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) prob[i] = finite ? expf(value[i] - value[0]) / total : 0.f;
}

struct Slot {
  int32_t cached, limit, num_drafts, num_output;
  FinishReason finish;
  int32_t num_emitted, num_accepted;
  Hit hit;
  bool doubt;
};

// The walk of a verification: accepted prefix, then cut at the limit, at the first stop id and before a row without a
// choice, whose id accepts no draft.
__device__ void accept(Slot& slot, const int32_t* choices, const int32_t* drafts, const bool* is_stop,
                       const bool* is_none, int num_choices) {
  int accepted = 0;
  while (accepted < slot.num_drafts && accepted < num_choices && !is_none[accepted] &&
         drafts[accepted] == choices[accepted])
    ++accepted;
  int emitted = accepted + 1 < num_choices ? accepted + 1 : num_choices;
  const int room = slot.limit - 1 - slot.cached;
  if (emitted > room) emitted = room > 0 ? room : 0;
  slot.finish = slot.cached + 1 + emitted >= slot.limit ? FinishReason::kLength : FinishReason::kRunning;
  for (int i = 0; i < emitted; ++i) {
    if (is_none[i]) {  // only the last one can be
      emitted = i;
      slot.finish = FinishReason::kNoChoice;
    } else if (is_stop[i]) {
      emitted = i + 1;
      slot.finish = FinishReason::kStop;
    }
  }
  slot.num_accepted = accepted < emitted ? accepted : emitted;
  slot.num_emitted = emitted;
}

struct Warp {
  static constexpr int32_t kLanes = 32;
  int32_t lane;
  __device__ Hypothesis best(Hypothesis mine) const {
    for (int mask = 16; mask > 0; mask /= 2) {
      const Hypothesis other{__shfl_xor_sync(~0u, mine.gain, mask), __shfl_xor_sync(~0u, mine.accepted, mask),
                             __shfl_xor_sync(~0u, mine.rank, mask)};
      if (other.accepted >= 0 && (mine.accepted < 0 || better(other, mine))) mine = other;
    }
    return mine;
  }
};

struct Shared {
  int32_t choices[kMaxBlockLen];
  int32_t tokens[kMaxBlockLen];  // the slot's block: t0, then the drafts
  bool is_stop[kMaxBlockLen];
  bool is_none[kMaxBlockLen];  // the row has no choice
  float reach[kMaxBlockLen];
  uint32_t picked[kMaxBlockLen];
  Slot slot;
};

// Partials of one of the slot's choice rows.
struct Row {
  const float* values;
  const int32_t* ids;
};
__device__ Row choice_row(const ConsensusParams& p, int slot, int row) {
  const int64_t first = (static_cast<int64_t>(slot) * p.rows_per_slot + row) * p.num_partials;
  return {p.partial_value + first, p.partial_id + first};
}

// The choices of the first `count` rows, whether a row has none, and whether they are stop ids.
__device__ void read_choices(const ConsensusParams& p, Shared& sh, int count) {
  const int s = blockIdx.x, lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
    const Row row = choice_row(p, s, i);
    const Best choice = choose(row.values, row.ids, p.num_partials, lane);
    bool stop = false;
    for (int j = lane; j < p.state.max_stop_ids; j += 32) {
      const int id = p.state.stop_ids[static_cast<int64_t>(s) * p.state.max_stop_ids + j];
      stop |= id >= 0 && id == choice.id;
    }
    stop = __any_sync(~0u, stop);
    if (lane == 0) {
      sh.choices[i] = choice.id;
      sh.is_stop[i] = stop;
      sh.is_none[i] = !(choice.value > -INFINITY);
    }
  }
}

// The drafts of the next pass: those of the block whose hypothesis came true, or those behind the rejected one.
__device__ void renew_drafts(const ConsensusParams& p, Shared& sh) {
  const SlotState& state = p.state;
  const int s = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t first = static_cast<int64_t>(s) * state.max_block_len;
  int32_t* const tokens = state.block_tokens + first;
  int32_t* const runner_up = state.runner_up + first * (kCandidates - 1);
  float* const prob = state.draft_prob + first * kCandidates;
  Slot& slot = sh.slot;
  if (thread == 0) {
    slot.hit = find_hit(state.hypotheses + static_cast<int64_t>(s) * state.max_fan_out * 2, p.fan_out,
                        slot.num_accepted, sh.tokens[0]);
  }
  __syncthreads();
  const int block_row = p.block_len * (1 + slot.hit.block);
  if (slot.hit.block >= 0) {
    if (warp == 0) {
      const Row row = choice_row(p, s, block_row);
      const int guess = choose(row.values, row.ids, p.num_partials, lane).id;
      if (lane == 0) {
        slot.doubt = slot.hit.first_row == 1 && guess != sh.tokens[0];
        const int room = slot.limit - 1 - slot.cached;
        slot.num_drafts = room < p.block_len - 1 ? room : p.block_len - 1;
      }
    }
    __syncthreads();
    for (int i = 1 + warp; i <= slot.num_drafts; i += blockDim.x / 32) {
      const Row row = choice_row(p, s, block_row + slot.hit.first_row + i - 1);
      int32_t id[kCandidates];
      float likely[kCandidates];
      choose_candidates(row.values, row.ids, p.num_partials, lane, id, likely);
      if (lane == 0) {
        tokens[i] = sh.tokens[i] = id[0];
        for (int j = 1; j < kCandidates; ++j) runner_up[i * (kCandidates - 1) + j - 1] = id[j];
        for (int j = 0; j < kCandidates; ++j) prob[i * kCandidates + j] = likely[j];
        if (slot.doubt) prob[i * kCandidates] *= kDoubt;
      }
    }
  } else {
    // The drafts behind the rejected one move up, all at once: read, then written.
    const int shift = slot.num_accepted + 1, left = slot.num_drafts > shift ? slot.num_drafts - shift : 0;
    const int i = 1 + thread, from = i + shift;
    int32_t token = 0, others[kCandidates - 1] = {};
    float likely[kCandidates] = {};
    if (i <= left) {
      token = sh.tokens[from];
      for (int j = 0; j + 1 < kCandidates; ++j) others[j] = runner_up[from * (kCandidates - 1) + j];
      for (int j = 0; j < kCandidates; ++j) likely[j] = prob[from * kCandidates + j];
    }
    __syncthreads();
    if (thread == 0) slot.num_drafts = left;
    if (i <= left) {
      tokens[i] = sh.tokens[i] = token;
      for (int j = 0; j + 1 < kCandidates; ++j) runner_up[i * (kCandidates - 1) + j] = others[j];
      for (int j = 0; j < kCandidates; ++j) prob[i * kCandidates + j] = j == 0 ? likely[0] * kDoubt : likely[j];
    }
  }
  if (thread == 0) state.num_drafts[s] = slot.num_drafts;  // which this thread wrote
}

// Accept, commit and emit; the slot's drafts are spent, or renewed by the pass that verified them.
__device__ void verify(const ConsensusParams& p, Shared& sh) {
  const SlotState& state = p.state;
  const int s = blockIdx.x, thread = threadIdx.x;
  const bool drafts_too = p.step == ConsensusStep::kVerifyAndDraft;
  Slot& slot = sh.slot;
  if (thread == 0) {
    accept(slot, sh.choices, sh.tokens + 1, sh.is_stop, sh.is_none, drafts_too ? p.block_len : p.rows_per_slot);
    if (slot.num_emitted > 0) sh.tokens[0] = sh.choices[slot.num_emitted - 1];
    state.block_tokens[static_cast<int64_t>(s) * state.max_block_len] = sh.tokens[0];
    state.cache_seqlens[s] = slot.cached += slot.num_emitted;
    state.num_output[s] = slot.num_output + slot.num_emitted;
    state.num_accepted[s] = slot.num_accepted;
    state.num_verified[s] = slot.num_drafts;
    state.finish[s] = slot.finish;
  }
  __syncthreads();
  int32_t* const output = state.output + static_cast<int64_t>(s) * state.output_capacity;
  for (int i = thread; i < slot.num_emitted; i += blockDim.x)
    output[(slot.num_output + i) % state.output_capacity] = sh.choices[i];
  if (drafts_too && slot.finish == FinishReason::kRunning) {
    renew_drafts(p, sh);
  } else if (thread == 0) {
    state.num_drafts[s] = slot.num_drafts = 0;
  }
}

__device__ void take_drafts(const ConsensusParams& p, Shared& sh) {
  const int s = blockIdx.x, thread = threadIdx.x;
  Slot& slot = sh.slot;
  if (thread == 0) {
    const int room = slot.limit - 1 - slot.cached;
    slot.num_drafts = room < p.rows_per_slot ? (room > 0 ? room : 0) : p.rows_per_slot;
    p.state.num_drafts[s] = slot.num_drafts;
  }
  __syncthreads();
  int32_t* const tokens = p.state.block_tokens + static_cast<int64_t>(s) * p.state.max_block_len;
  for (int i = thread; i < slot.num_drafts; i += blockDim.x) tokens[1 + i] = sh.tokens[1 + i] = sh.choices[i];
}

__device__ void stage(const ConsensusParams& p, Shared& sh) {
  const SlotState& state = p.state;
  const int s = blockIdx.x, thread = threadIdx.x;
  Slot& slot = sh.slot;
  const bool running = slot.finish == FinishReason::kRunning;
  const int count = p.next_pass == NextPass::kAr ? 1 : p.block_len;
  if (thread == 0 && p.step == ConsensusStep::kStage) {
    slot.num_drafts = !verifies(p.next_pass) ? 0 : slot.num_drafts < count - 1 ? slot.num_drafts : count - 1;
    state.num_drafts[s] = slot.num_drafts;
  }
  __syncthreads();
  for (int i = thread; i < count; i += blockDim.x) {
    write_row(p, static_cast<int64_t>(s) * count + i, s,
              running ? own_row(p, sh.tokens, slot.cached, slot.limit, slot.num_drafts, i) : StagedRow{});
  }
  if (p.next_pass != NextPass::kOnePass) return;
  if (running && thread < 32) pick_hypotheses(Warp{thread}, state, s, slot.num_drafts, p.fan_out, sh.reach, sh.picked);
  __syncthreads();
  const int32_t* const hypotheses = state.hypotheses + static_cast<int64_t>(s) * state.max_fan_out * 2;
  for (int i = thread; i < p.fan_out * count; i += blockDim.x) {
    const int64_t row = static_cast<int64_t>(state.num_slots) * count + static_cast<int64_t>(s) * p.fan_out * count + i;
    const int32_t* const hypothesis = hypotheses + i / count * 2;
    write_row(p, row, s,
              running ? block_row(p, hypothesis, sh.tokens, slot.cached, slot.limit, i % count) : StagedRow{});
  }
}

__global__ void __launch_bounds__(kMaxThreads) consensus_kernel(const __grid_constant__ ConsensusParams p) {
  __shared__ Shared sh;
  pdl_launch_dependents();
  pdl_wait();
  const SlotState& state = p.state;
  const int s = blockIdx.x, thread = threadIdx.x;
  const int32_t* const block_tokens = state.block_tokens + static_cast<int64_t>(s) * state.max_block_len;
  for (int i = thread; i < p.block_len; i += blockDim.x) sh.tokens[i] = block_tokens[i];
  if (thread == 0) {
    Slot& slot = sh.slot;
    slot.cached = state.cache_seqlens[s];
    slot.limit = state.limit[s];
    slot.finish = state.finish[s];
    slot.num_drafts = state.num_drafts[s];
    slot.num_output = state.num_output[s];
  }
  if (p.step != ConsensusStep::kStage)
    read_choices(p, sh, p.step == ConsensusStep::kVerifyAndDraft ? p.block_len : p.rows_per_slot);
  __syncthreads();
  const bool running = sh.slot.finish == FinishReason::kRunning;
  __syncthreads();  // before a verification changes it
  if (running && p.step == ConsensusStep::kDraft) take_drafts(p, sh);
  if (running && (p.step == ConsensusStep::kVerify || p.step == ConsensusStep::kVerifyAndDraft)) verify(p, sh);
  if (p.next_pass != NextPass::kNone) stage(p, sh);
}

}  // namespace

int consensus(const ConsensusParams& p, void* stream) {
  if (p.state.num_slots == 0) return cudaSuccess;
  if (p.block_len > kMaxBlockLen) return cudaErrorInvalidValue;
  const int rows = p.block_len < p.rows_per_slot ? p.block_len : p.rows_per_slot;
  const int warps = rows < 4 ? 4 : rows < kMaxThreads / 32 ? rows : kMaxThreads / 32;  // a thread for each draft
  return launch(consensus_kernel, p, dim3(p.state.num_slots), 32 * warps, 0, stream, device_info());
}

}  // namespace orthrus::cuda
