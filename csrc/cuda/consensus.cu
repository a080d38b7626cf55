// Choice, acceptance, stop, commit and staging of one cycle; contract in orthrus/params.h.
//
// One launch, one CTA a slot, one warp a row where they suffice. Warps reduce the partial maxima; one thread walks the
// block in shared memory; all threads write the results. Integers only beside the comparisons, so
// deterministic; graph-safe: limits, stop ids and lengths are read on the device. Reads 8 bytes a
// partial; everything else is small.
#include "orthrus/launch.cuh"
#include "orthrus/ops.h"

namespace orthrus::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxBlockLen = 256;

// The larger of two partials, ties to the lower id. NaN never wins.
struct Best {
  float value = -INFINITY;
  int id = INT32_MAX;
  __device__ void take(float other, int other_id) {
    if (other > value || (other == value && other_id < id)) {
      value = other;
      id = other_id;
    }
  }
};

// Id of the largest partial of one row. Warp-collective; all loads of 256 partials are in flight at once.
__device__ int choose(const float* values, const int32_t* ids, int num_partials, int lane) {
  constexpr int kAhead = 8;
  if (!values) return ids[0];
  Best best;
  for (int first = lane; first < num_partials; first += 32 * kAhead) {
    Best ahead[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + 32 * j < num_partials) ahead[j] = {values[first + 32 * j], ids[first + 32 * j]};
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) best.take(ahead[j].value, ahead[j].id);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const float value = __shfl_xor_sync(~0u, best.value, mask);
    best.take(value, __shfl_xor_sync(~0u, best.id, mask));
  }
  return best.id == INT32_MAX ? ids[0] : best.id;
}

struct Slot {
  int32_t cached, limit, finish, num_drafts, num_output;
  int32_t num_emitted;
};

// The walk of a verification: accepted prefix, then cut at the limit and at the first stop id.
__device__ void accept(Slot& slot, int32_t* num_accepted, const int32_t* choices, const int32_t* drafts,
                       const bool* is_stop, int num_choices) {
  int accepted = 0;
  while (accepted < slot.num_drafts && accepted < num_choices && drafts[accepted] == choices[accepted]) ++accepted;
  int emitted = accepted + 1 < num_choices ? accepted + 1 : num_choices;
  const int room = slot.limit - 1 - slot.cached;
  if (emitted > room) emitted = room > 0 ? room : 0;
  slot.finish = static_cast<int32_t>(slot.cached + 1 + emitted >= slot.limit ? FinishReason::kLength
                                                                              : FinishReason::kRunning);
  for (int i = 0; i < emitted; ++i) {
    if (is_stop[i]) {
      emitted = i + 1;
      slot.finish = static_cast<int32_t>(FinishReason::kStop);
    }
  }
  *num_accepted = accepted < emitted ? accepted : emitted;
  slot.num_drafts = 0;
  slot.num_emitted = emitted;
}

__global__ void __launch_bounds__(kMaxThreads) consensus_kernel(const __grid_constant__ ConsensusParams p) {
  __shared__ int32_t choices[kMaxBlockLen];
  __shared__ int32_t tokens[kMaxBlockLen];  // the slot's block: t0, then the drafts
  __shared__ bool is_stop[kMaxBlockLen];
  __shared__ Slot slot;
  pdl_wait();
  pdl_launch_dependents();
  const SlotState& state = p.state;
  const int s = blockIdx.x, thread = threadIdx.x, num_threads = blockDim.x, block_len = state.block_len;
  int32_t* const block_tokens = state.block_tokens + static_cast<int64_t>(s) * block_len;

  for (int i = thread; i < block_len; i += num_threads) tokens[i] = block_tokens[i];
  if (thread == 0) {
    slot = {state.cache_seqlens[s], state.limit[s], state.finish[s], state.num_drafts[s], state.num_output[s], 0};
  }
  for (int i = thread / 32; i < p.rows_per_slot; i += num_threads / 32) {
    const int64_t first = (static_cast<int64_t>(s) * p.rows_per_slot + i) * p.num_partials;
    const float* values = p.partial_value ? p.partial_value + first : nullptr;
    const int choice = choose(values, p.partial_id + first, p.num_partials, thread % 32);
    bool stop = false;
    for (int j = thread % 32; j < state.max_stop_ids; j += 32) {
      const int id = state.stop_ids[static_cast<int64_t>(s) * state.max_stop_ids + j];
      stop |= id >= 0 && id == choice;
    }
    stop = __any_sync(~0u, stop);
    if (thread % 32 == 0) {
      choices[i] = choice;
      is_stop[i] = stop;
    }
  }
  __syncthreads();

  const bool takes = slot.finish == static_cast<int32_t>(FinishReason::kRunning) &&
                     p.step != static_cast<int32_t>(ConsensusStep::kStage);
  const bool verify = p.step == static_cast<int32_t>(ConsensusStep::kVerify);
  __syncthreads();  // before the walk changes slot.finish
  if (takes && thread == 0) {
    if (verify) {
      accept(slot, &state.num_accepted[s], choices, tokens + 1, is_stop, p.rows_per_slot);
      if (slot.num_emitted > 0) tokens[0] = choices[slot.num_emitted - 1];
      state.cache_seqlens[s] = slot.cached += slot.num_emitted;
      state.num_output[s] = slot.num_output + slot.num_emitted;
      state.finish[s] = slot.finish;
      block_tokens[0] = tokens[0];
    } else {
      const int room = slot.limit - 1 - slot.cached;
      slot.num_drafts = room < p.rows_per_slot ? (room > 0 ? room : 0) : p.rows_per_slot;
    }
    state.num_drafts[s] = slot.num_drafts;
  }
  __syncthreads();
  if (takes && verify) {
    int32_t* const output = state.output + static_cast<int64_t>(s) * state.output_capacity;
    for (int i = thread; i < slot.num_emitted; i += num_threads)
      output[(slot.num_output + i) % state.output_capacity] = choices[i];
  } else if (takes) {
    for (int i = thread; i < slot.num_drafts; i += num_threads) tokens[1 + i] = block_tokens[1 + i] = choices[i];
  }
  if (p.next_pass == static_cast<int32_t>(NextPass::kNone)) return;
  __syncthreads();

  const bool running = slot.finish == static_cast<int32_t>(FinishReason::kRunning);
  const bool draft = p.next_pass == static_cast<int32_t>(NextPass::kDraft);
  const int count = p.next_pass == static_cast<int32_t>(NextPass::kAr) ? 1 : block_len;
  for (int i = thread; i < count; i += num_threads) {
    const int64_t row = static_cast<int64_t>(s) * count + i;
    bool valid = running && slot.cached + i < slot.limit;
    if (p.next_pass == static_cast<int32_t>(NextPass::kVerify)) valid = valid && i <= slot.num_drafts;
    const int token = draft && i > 0 ? p.mask_token_id : tokens[i];
    p.next_token[row] = valid ? token : 0;
    p.next_position[row] = valid ? slot.cached + i : -1;
    p.next_seq[row] = s;
    p.next_prefix_len[row] = !valid ? 0 : draft ? slot.cached : slot.cached + i + 1;
  }
}

}  // namespace

int consensus(const ConsensusParams& p, void* stream) {
  if (p.state.num_slots == 0) return cudaSuccess;
  if (p.rows_per_slot > kMaxBlockLen || p.state.block_len > kMaxBlockLen) return cudaErrorInvalidValue;
  const int warps = p.rows_per_slot < 4 ? 4 : p.rows_per_slot < kMaxThreads / 32 ? p.rows_per_slot : kMaxThreads / 32;
  return launch(consensus_kernel, p, dim3(p.state.num_slots), 32 * warps, 0, stream, device_info());
}

}  // namespace orthrus::cuda
