// Choice, acceptance, stop, commit and staging of one cycle; contract in orthrus/params.h.
//
// One launch, one CTA per slot, one warp per row where they suffice. Warps reduce the partial maxima; one of them walks
// the block and picks hypotheses, in shared memory; all threads write the results. Integer arithmetic except for
// comparisons and the wagers of hypotheses.h, all in a fixed order, so deterministic. Graph-safe: limits, stop ids and
// lengths are read on the device. MUTATED: the slots' state, their output, and all staged rows. No slots: nothing is
// launched. Reads 8 bytes per partial (of a one-pass cycle's blocks, only the one that hit); everything else is small.
#include "best.cuh"
#include "orthrus/hypotheses.h"
#include "orthrus/launch.cuh"
#include "orthrus/ops.h"
#include "orthrus/staging.h"

namespace orthrus::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kAhead = 8;  // partials of a row in flight per lane

// Calls take(partial) for this lane's partials of one row; the loads of 256 partials are in flight at once.
template <typename Take>
__device__ void for_each_partial(const float* values, const int32_t* ids, int num_partials, int lane, Take take) {
  for (int base = 0; base < num_partials; base += 32 * kAhead) {
    const int first = base + lane;
    Best ahead[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + 32 * j < num_partials) ahead[j] = {values[first + 32 * j], ids[first + 32 * j]};
    }
    __syncwarp();  // else the compiler uses the first before it loads the last
#pragma unroll
    for (int j = 0; j < kAhead; ++j) take(ahead[j]);
  }
}

// The largest partial of one row, or the first id at -inf if none is above that. Warp-collective.
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

// The first of `count` numbers for which is_it(), or `count` if there is none. Warp-collective.
template <typename IsIt>
__device__ int first_where(int count, int lane, IsIt is_it) {
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    if (const unsigned found = __ballot_sync(~0u, i < count && is_it(i))) return base + __ffs(found) - 1;
  }
  return count;
}

// The walk of a verification: the accepted prefix, cut at the limit, at the first stop id, and before a row without a
// choice, whose id accepts no draft. Warp-collective.
__device__ void accept(Slot& slot, const int32_t* choices, const int32_t* drafts, const bool* is_stop,
                       const bool* is_none, int num_choices, int lane) {
  const int accepted = first_where(min(slot.num_drafts, num_choices), lane,
                                   [&](int i) { return is_none[i] || drafts[i] != choices[i]; });
  const int room = max(slot.limit - 1 - slot.cached, 0), most = min(min(accepted + 1, num_choices), room);
  const int end = first_where(most, lane, [&](int i) { return is_none[i] || is_stop[i]; });
  const bool ends = end < most, none = ends && is_none[end];
  const int emitted = ends && !none ? end + 1 : end;
  __syncwarp();  // all lanes have read the slot
  if (lane > 0) return;
  const bool full = slot.cached + 1 + emitted >= slot.limit;
  slot.finish = none   ? FinishReason::kNoChoice
                : ends ? FinishReason::kStop
                : full ? FinishReason::kLength
                       : FinishReason::kRunning;
  slot.num_accepted = min(accepted, emitted);
  slot.num_emitted = emitted;
}

struct Warp {
  static constexpr int32_t kLanes = 32;
  int32_t lane;
  // Gains are not negative, so their bits have the same order.
  __device__ Hypothesis best(const Hypothesis& mine) const {
    const bool offers = mine.gain >= 0.f;
    const unsigned gain = offers ? __float_as_uint(mine.gain) : 0u, most = __reduce_max_sync(~0u, gain);
    const unsigned number = offers && gain == most ? mine.accepted * kCandidates + mine.rank : ~0u;
    const unsigned first = __reduce_min_sync(~0u, number);
    if (first == ~0u) return {-1.f, -1, 0};
    const auto accepted = static_cast<int32_t>(first / kCandidates);
    return {__uint_as_float(most), accepted, static_cast<int32_t>(first) - accepted * kCandidates};
  }
};

constexpr int kMaxHypotheses = kCandidates * (kMaxBlockLen - 1) + 1;

struct Shared {
  int32_t choices[kMaxBlockLen];
  int32_t tokens[kMaxBlockLen];  // the slot's block: t0, then the drafts
  bool is_stop[kMaxBlockLen];
  bool is_none[kMaxBlockLen];  // the row has no choice
  // For one-pass cycles, the slot's, laid out as in SlotState:
  int32_t runner_up[kMaxBlockLen * (kCandidates - 1)];
  float prob[kMaxBlockLen * kCandidates];
  int32_t hypotheses[2 * kMaxHypotheses];
  float reach[kMaxBlockLen];
  uint32_t picked[kMaxBlockLen];
  Slot slot;
};

// Copies by all threads, starting with those of warp `first_warp`, below 4: several short copies then take one trip.
template <typename T>
__device__ void copy(T* to, const T* from, int count, int first_warp = 0) {
  const int threads = blockDim.x, thread = static_cast<int>(threadIdx.x) - 32 * first_warp;
  for (int i = thread < 0 ? thread + threads : thread; i < count; i += threads) to[i] = from[i];
}

// Partials of one of the slot's choice rows.
struct Row {
  const float* values;
  const int32_t* ids;
};
__device__ Row choice_row(const ConsensusParams& p, int slot, int row) {
  const int64_t first = (static_cast<int64_t>(slot) * p.rows_per_slot + row) * p.num_partials;
  return {p.partial_value + first, p.partial_id + first};
}

// Reads the choices of the first `count` rows, whether a row has none, and whether they are stop ids.
__device__ void read_choices(const ConsensusParams& p, Shared& sh, int count) {
  const int s = blockIdx.x, lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
    const Row row = choice_row(p, s, i);
    const int32_t* const stop_ids = p.state.stop_ids + static_cast<int64_t>(s) * p.state.max_stop_ids;
    const int first_stop = lane < p.state.max_stop_ids ? stop_ids[lane] : -1;  // in flight with the partials
    const Best choice = choose(row.values, row.ids, p.num_partials, lane);
    bool stop = first_stop >= 0 && first_stop == choice.id;
    for (int j = 32 + lane; j < p.state.max_stop_ids; j += 32) stop |= stop_ids[j] >= 0 && stop_ids[j] == choice.id;
    stop = __any_sync(~0u, stop);
    if (lane == 0) {
      sh.choices[i] = choice.id;
      sh.is_stop[i] = stop;
      sh.is_none[i] = !(choice.value > -INFINITY);
    }
  }
}

// The drafts of the next pass, from the block whose hypothesis came true or from behind the rejected draft, with their
// runners-up and probabilities.
__device__ void renew_drafts(const ConsensusParams& p, Shared& sh) {
  const SlotState& state = p.state;
  const int s = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  Slot& slot = sh.slot;
  if (thread == 0) slot.hit = find_hit(sh.hypotheses, p.fan_out, slot.num_accepted, sh.tokens[0]);
  __syncthreads();
  const int block_row = p.block_len * (1 + slot.hit.block);
  const bool hit = slot.hit.block >= 0;
  // Those behind the rejected draft move up, all at once: read, then written.
  const int shift = slot.num_accepted + 1, room = slot.limit - 1 - slot.cached;
  const int num_drafts = hit ? min(room, p.block_len - 1) : max(slot.num_drafts - shift, 0);
  const int moved = 1 + thread, from = moved + shift;
  int32_t token = 0, others[kCandidates - 1] = {};
  float likely[kCandidates] = {};
  if (!hit && moved <= num_drafts) {
    token = sh.tokens[from];
    for (int j = 0; j + 1 < kCandidates; ++j) others[j] = sh.runner_up[from * (kCandidates - 1) + j];
    for (int j = 0; j < kCandidates; ++j) likely[j] = sh.prob[from * kCandidates + j];
  }
  __syncthreads();
  auto keep = [&](int i) {
    sh.tokens[i] = token;
    for (int j = 0; j + 1 < kCandidates; ++j) sh.runner_up[i * (kCandidates - 1) + j] = others[j];
    for (int j = 0; j < kCandidates; ++j) sh.prob[i * kCandidates + j] = likely[j];
  };
  if (!hit && moved <= num_drafts) keep(moved);
  // The guess of the bonus token, if the block was drafted with it unseen, is a row like the drafts'.
  for (int i = slot.hit.first_row == 1 ? warp : 1 + warp; hit && i <= num_drafts; i += blockDim.x / 32) {
    const Row row = choice_row(p, s, block_row + slot.hit.first_row + i - 1);
    if (i == 0) {
      const int guess = choose(row.values, row.ids, p.num_partials, lane).id;
      if (lane == 0) slot.doubt = guess != sh.tokens[0];
      continue;
    }
    int32_t id[kCandidates];
    choose_candidates(row.values, row.ids, p.num_partials, lane, id, likely);
    token = id[0];
    for (int j = 1; j < kCandidates; ++j) others[j - 1] = id[j];
    if (lane == 0) keep(i);
  }
  __syncthreads();
  if (!hit || (slot.hit.first_row == 1 && slot.doubt)) {
    for (int i = 1 + thread; i <= num_drafts; i += blockDim.x) sh.prob[i * kCandidates] *= kDoubt;
  }
  if (thread == 0) state.num_drafts[s] = slot.num_drafts = num_drafts;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(s) * state.max_block_len + 1;
  copy(state.block_tokens + first, sh.tokens + 1, num_drafts);
  copy(state.runner_up + first * (kCandidates - 1), sh.runner_up + (kCandidates - 1), num_drafts * (kCandidates - 1));
  copy(state.draft_prob + first * kCandidates, sh.prob + kCandidates, num_drafts * kCandidates);
}

// Accepts, commits and emits; the slot's drafts are used up, or renewed by the pass that verified them.
__device__ void verify(const ConsensusParams& p, Shared& sh) {
  const SlotState& state = p.state;
  const int s = blockIdx.x, thread = threadIdx.x;
  const bool drafts_too = p.step == ConsensusStep::kVerifyAndDraft;
  Slot& slot = sh.slot;
  if (thread < 32) {
    const int num_choices = drafts_too ? p.block_len : p.rows_per_slot;
    accept(slot, sh.choices, sh.tokens + 1, sh.is_stop, sh.is_none, num_choices, thread);
  }
  if (thread == 0) {
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
  if (running && thread < 32)
    pick_hypotheses(Warp{thread}, sh.prob, sh.runner_up, slot.num_drafts, p.fan_out, sh.reach, sh.picked,
                    sh.hypotheses);
  __syncthreads();
  if (running) copy(state.hypotheses + static_cast<int64_t>(s) * state.max_fan_out * 2, sh.hypotheses, 2 * p.fan_out);
  for (int i = thread; i < p.fan_out * count; i += blockDim.x) {
    const int64_t row = static_cast<int64_t>(state.num_slots) * count + static_cast<int64_t>(s) * p.fan_out * count + i;
    const int32_t* const hypothesis = sh.hypotheses + i / count * 2;
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
  const int64_t block = static_cast<int64_t>(s) * state.max_block_len;
  const Slot before{state.cache_seqlens[s], state.limit[s], state.num_drafts[s], state.num_output[s], state.finish[s]};
  copy(sh.tokens, state.block_tokens + block, p.block_len);
  if (p.next_pass == NextPass::kOnePass || p.step == ConsensusStep::kVerifyAndDraft) {
    copy(sh.runner_up, state.runner_up + block * (kCandidates - 1), p.block_len * (kCandidates - 1), 1);
    copy(sh.prob, state.draft_prob + block * kCandidates, p.block_len * kCandidates, 2);
    copy(sh.hypotheses, state.hypotheses + static_cast<int64_t>(s) * state.max_fan_out * 2, 2 * p.fan_out, 3);
  }
  if (thread == 0) sh.slot = before;
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
  if (p.block_len > kMaxBlockLen || p.fan_out > kMaxHypotheses) return cudaErrorInvalidValue;
  const int rows = p.block_len < p.rows_per_slot ? p.block_len : p.rows_per_slot;
  const int warps = rows < 4 ? 4 : rows < kMaxThreads / 32 ? rows : kMaxThreads / 32;  // a thread for each draft
  return launch(consensus_kernel, p, dim3(p.state.num_slots), 32 * warps, 0, stream, device_info());
}

}  // namespace orthrus::cuda
