// Plain-old-data parameters of every native op, shared by the CPU and CUDA implementations.
//
// Pointers are device pointers for CUDA and host pointers for the CPU. Shapes are in the comments, row-major and
// contiguous. The caller allocates and owns everything.
//
// `T` is the element type of weights, activations and cache: bf16_t (a raw 16-bit word, so that this header needs
// neither CUDA nor torch) or float. "round" means rounding to T; where T is float, nothing is rounded.
#pragma once
#include <cstdint>

namespace orthrus {

using bf16_t = uint16_t;

// One pass = a list of rows (see rows.h for the mask they define). All arrays are int32.
// Rows [0, num_rows_ar) use the AR view's weights, the rest the diffusion view's.
// A group is a run of consecutive rows that share a sequence and, for diffusion rows, a block:
// group g holds rows [group_start[g], group_start[g+1]); the first num_groups_ar groups are AR.
struct Rows {
  const int32_t* token;        // [num_rows]
  const int32_t* position;     // [num_rows] absolute position; -1 marks an invalid (padding) row
  const int32_t* seq;          // [num_rows] slot: the row of page_table it reads
  const int32_t* prefix_len;   // [num_rows] visible cache entries 0 ... prefix_len-1; 0 if invalid
  const int32_t* group_start;  // [num_groups + 1]
  int32_t num_rows;
  int32_t num_rows_ar;
  int32_t num_groups;
  int32_t num_groups_ar;
  int32_t max_group_rows;      // no group has more rows than this
  int32_t blocks_per_seq;      // runs of this many consecutive diffusion groups, each of max_group_rows rows, share a
                               // sequence; 1: nothing is known
};

// Positions per page.
constexpr int kPageSize = 64;

// One layer's paged KV: page p, head h, position t in it and dim d lie at
// ((p*num_heads_kv + h)*kPageSize + t)*head_dim + d.
// Page 0, the sink, is never read: the torch reference writes invalid rows there, native code does not write them.
template <typename T>
struct PagedKvOf {
  T* k_pages;                  // [num_pages, num_heads_kv, kPageSize, head_dim]
  T* v_pages;                  // same shape
  const int32_t* page_table;   // [num_slots, max_pages] page of positions [i*kPageSize, (i+1)*kPageSize)
  int32_t max_pages;           // columns of page_table
  int32_t num_heads_kv;
  int32_t head_dim;
};

enum class Epilogue : int32_t {
  kNone = 0,      // out[T]    = round(acc)
  kResidual = 1,  // out[T]    = round(acc + residual)
  kSiluMul = 2,   // out[T]    = round(silu(acc_gate) * acc_up), out_features/2 columns
  kLogits = 3,    // out[fp32]  = acc, not rounded
  kArgmax = 4,    // partial_value/partial_id: per row and vocabulary tile, ties to the lowest id
};

// Bits per element of coded bf16 weights (cpu/coded_weight.h, cuda/coded_block.cuh): without loss, and for drafts.
constexpr int kCodedBits = 12, kDraftBits = 8;
// Static: nothing here may be merged across variants of the CPU (cpu/variant.h).
static constexpr bool is_coded(int bits) { return bits == kCodedBits || bits == kDraftBits; }

// y[r, n] = sum_k x[r, k] * W(r)[n, k], W(r) = weight for r < num_rows_ar, else weight_diff.
template <typename T>
struct RowLinearParamsOf {
  const T* x;                  // [num_rows, in_features]
  const void* weight;          // packed by the implementation's own layout
  const void* weight_diff;     // packed likewise; null: all rows use `weight`
  int32_t weight_bits;         // per element: kCodedBits, kDraftBits, or those of T
  int32_t weight_diff_bits;
  int32_t leading_only;        // of kCodedBits the leading parts, kDraftBits, suffice: the pass only drafts
  const T* residual;           // [num_rows, out_features] (kResidual), may alias out
  void* out;                   // see Epilogue
  float* partial_value;        // [num_rows, num_partials] (kArgmax)
  int32_t* partial_id;         // [num_rows, num_partials] (kArgmax)
  void* workspace;             // of the implementation's size, zero-initialised once by the caller
  int64_t workspace_bytes;
  int32_t num_rows;
  int32_t num_rows_ar;
  int32_t in_features;
  int32_t out_features;        // of the weight: 2 * intermediate size for kSiluMul
  int32_t num_partials;
  Epilogue epilogue;
  const void* next_weight;     // weight of the next row_linear, packed likewise, or null; only a hint
  int32_t next_in_features;
  int32_t next_out_features;
  int32_t next_weight_bits;
};
using RowLinearParams = RowLinearParamsOf<bf16_t>;

// QK RMSNorm (optional) + RoPE (half-split) + write. q goes to q_out; k and v of an AR row go to the page of its
// `position`, those of a diffusion row to the scratch at row - num_rows_ar. fp32 inside, one rounding. A non-finite
// element of a value is written as 0, and the same element of its key as NaN. This spoils the rows that see the key and
// no others: attention multiplies whole tiles, and 0 * NaN is NaN. CUDA reads pairs: all pointers except those of rows
// and page table are aligned to two elements. The norm weights must be complete before the preceding kernels of the
// stream start, because they are read while those kernels run.
template <typename T>
struct QkvCommitParamsOf {
  const T* qkv;                // [num_rows, (num_heads_q + 2*num_heads_kv) * head_dim]: q | k | v heads
  const float* cos_sin;        // [positions, head_dim]: cos of the half-dims, then sin
  const float* q_norm;         // [head_dim], or null if k_norm is (Llama family has none)
  const float* k_norm;         // [head_dim]
  const float* q_norm_diff;    // [head_dim], or null if k_norm_diff is
  const float* k_norm_diff;    // [head_dim]
  T* q_out;                    // [num_rows, num_heads_q, head_dim]
  T* scratch_k;                // [num_rows - num_rows_ar, num_heads_kv, head_dim]
  T* scratch_v;                // same shape
  Rows rows;
  PagedKvOf<T> kv;
  int32_t num_heads_q;
  float eps;
};
using QkvCommitParams = QkvCommitParamsOf<bf16_t>;

// Softmax attention of each row over the keys that rows.h makes visible to it. A row that sees nothing yields zeros.
// Rounding points: the weights e^(score - maximum) before they are multiplied by the values (on the CPU also before
// they are summed), and the output; everything else is fp32.
template <typename T>
struct DualAttnParamsOf {
  const T* q;                  // [num_rows, num_heads_q, head_dim]
  const T* scratch_k;          // [num_rows - num_rows_ar, num_heads_kv, head_dim]
  const T* scratch_v;          // same shape
  T* out;                      // [num_rows, num_heads_q, head_dim]
  void* workspace;             // of the implementation's size, 16-byte aligned
  int64_t workspace_bytes;
  Rows rows;
  PagedKvOf<T> kv;
  int32_t num_heads_q;
  int32_t max_seq_len;         // no prefix_len exceeds this
  float softmax_scale;
};
using DualAttnParams = DualAttnParamsOf<bf16_t>;

template <typename T>
struct RmsNormParamsOf {
  const T* x;                  // [num_rows_in, hidden]
  const float* weight;         // [hidden]
  const int32_t* row_index;    // [num_rows] input row of each output row; null: identity
  T* out;                      // [num_rows, hidden] = round(x * rsqrt(mean(x^2) + eps) * weight)
  int32_t num_rows;
  int32_t hidden;
  float eps;
};

template <typename T>
struct EmbedParamsOf {
  const int32_t* token;        // [num_rows]
  const T* table;              // [vocab_size, hidden]
  T* out;                      // [num_rows, hidden]
  int32_t num_rows;
  int32_t hidden;
  int32_t vocab_size;
};

// kNoChoice: the row that chooses the next token has no logit above -inf, as all are NaN or masked.
enum class FinishReason : int32_t { kEmpty = -1, kRunning = 0, kStop = 1, kLength = 2, kNoChoice = 3 };

// Which rows the choices of this call belong to.
enum class ConsensusStep : int32_t {
  kDraft = 0,   // choices of diffusion rows 0 ... block_len-2 of each slot become its drafts
  kVerify = 1,  // choices of AR rows 0 ... rows_per_slot-1 decide what is accepted
  kStage = 2,   // no choices (rows_per_slot 0): only stage the next pass from the state as it is
  kVerifyAndDraft = 3,  // choices of the rows of kOnePass, slot by slot: block_len AR rows, which decide what is
                        // accepted, then fan_out blocks of block_len diffusion rows, one of which may give the next
                        // drafts
};

// What to stage for the next pass.
enum class NextPass : int32_t {
  kNone = 0,
  kDraft = 1,   // block_len diffusion rows per slot: [t0, MASK, ...]
  kVerify = 2,  // block_len AR rows per slot: [t0, d1, ...], rows past num_drafts invalid
  kAr = 3,      // 1 AR row per slot: [t0]
  kOnePass = 4, // the rows of kVerify of all slots, then fan_out blocks of block_len diffusion rows per slot
};

constexpr int32_t kMaxBlockLen = 256;

// Choices kept for each draft's row: the draft itself and the second and third likeliest tokens.
constexpr int32_t kCandidates = 3;

// Per-slot decode state, MUTATED by consensus. Entry i of a block belongs to the token at position cache_seqlens + i.
struct SlotState {
  int32_t* cache_seqlens;      // [num_slots] committed tokens, whose AR keys/values are in the cache
  int32_t* block_tokens;       // [num_slots, max_block_len] t0 (known, not yet cached), then the drafts
  int32_t* num_drafts;         // [num_slots] drafts to verify, < block_len
  int32_t* num_verified;       // [num_slots] drafts that the last verification checked
  int32_t* num_accepted;       // [num_slots] accepted drafts of the last verification
  int32_t* limit;              // [num_slots] total tokens the sequence may have
  int32_t* stop_ids;           // [num_slots, max_stop_ids], padded with -1
  FinishReason* finish;        // [num_slots]
  int32_t* output;             // [num_slots, output_capacity] ring of emitted tokens
  int32_t* num_output;         // [num_slots] tokens emitted so far (ring index = num_output % capacity)
  int32_t* runner_up;          // [num_slots, max_block_len, kCandidates - 1] the next likeliest tokens for each draft
  float* draft_prob;           // [num_slots, max_block_len, kCandidates] probabilities of the draft and its runners-up
  int32_t* hypotheses;         // [num_slots, max_fan_out, 2] hypothesis of each block of this pass: see hypotheses.h
  int32_t num_slots;
  int32_t max_block_len;
  int32_t max_fan_out;
  int32_t max_stop_ids;
  int32_t output_capacity;
};

struct ConsensusParams {
  const float* partial_value;  // [num_slots * rows_per_slot, num_partials]; NaN counts as -inf, and a row with all
                               // values at -inf has no choice
  const int32_t* partial_id;   // same shape
  SlotState state;
  int32_t* next_token;         // rows of the next pass, in the order given at NextPass; MUTATED, all rows
  int32_t* next_position;
  int32_t* next_seq;
  int32_t* next_prefix_len;
  int32_t rows_per_slot;       // choice rows per slot: block_len-1 (kDraft), block_len or 1 (kVerify),
                               // block_len * (1 + fan_out) (kVerifyAndDraft)
  int32_t block_len;           // K of this cycle, <= state.max_block_len
  int32_t fan_out;             // F of kOnePass and kVerifyAndDraft, <= state.max_fan_out
  int32_t num_partials;
  int32_t mask_token_id;
  ConsensusStep step;
  NextPass next_pass;
};

// Edits of a slot's logits, applied before any filter. All pointers are null if no slot has edits. Ids outside the
// vocabulary have no effect.
struct SlotEdits {
  const float* penalties;      // [num_slots, 3] repetition, presence, frequency; 1, 0, 0 changes nothing
  const int32_t* token_counts; // [num_slots, vocab_size] times generated; -1: only in the prompt
  const int32_t* bias_ids;     // [num_slots, max_bias], padded with -1
  const float* bias_values;    // same shape
  const int32_t* stop_ids;     // [num_slots, max_stop_ids], padded with -1
  const int32_t* min_position; // [num_slots] stop ids cannot be chosen for positions below this
  int32_t max_bias;
  int32_t max_stop_ids;
};

// Counts the tokens that the output ring has received since the last call. For each slot and ring entry num_counted ...
// num_output-1, of which only the last output_capacity are there, token_counts[slot][token] = max(itself, 0) + 1; then
// num_counted = num_output.
struct CountTokensParams {
  int32_t* token_counts;       // [num_slots or more, vocab_size], MUTATED
  int32_t* num_counted;        // [num_slots or more], MUTATED
  SlotState state;             // num_output, output and the sizes are read
  int32_t vocab_size;
};

// Ids per partial maximum of process_logits.
constexpr int kScoreTile = 128;

// Row i of the logits belongs to row r = logit_rows[i] of the pass. It uses the parameters of that row's slot and
// chooses the token for position[r] + 1, the one with the largest score. orthrus_rt/ops.py defines the scores.
struct ProcessLogitsParams {
  float* logits;                // [num_rows, vocab_size], MUTATED: scaled logits
  const int32_t* logit_rows;    // [num_rows]
  const int32_t* cache_seqlens; // [num_slots]
  const float* temperature;     // [num_slots]; 0: greedy
  const int32_t* top_k;         // [num_slots]; 0: all
  const float* top_p;           // [num_slots]
  const float* min_p;           // [num_slots]
  const int64_t* seed;          // [num_slots]
  float* partial_value;         // [num_rows, ceil(vocab_size / kScoreTile)], MUTATED
  int32_t* partial_id;          // same shape, MUTATED
  float* log_probs;             // [num_rows, vocab_size], MUTATED; null: not wanted
  SlotEdits edits;
  Rows rows;
  int32_t num_rows;
  int32_t vocab_size;
  int32_t purpose;
};

}  // namespace orthrus
