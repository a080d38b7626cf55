// Launchers of the native ops, which know neither torch nor Python. CUDA launchers allocate nothing and do not
// synchronise; CPU ops keep scratch per thread, which only grows (cpu/pool.h).
#pragma once
#include "orthrus/params.h"

namespace orthrus::cpu {

// ISA variant in use (cpu/dispatch.cpp lists them), the best one unless ORTHRUS_CPU_ISA names another.
const char* isa();
// Changes it for tests and measurements. Throws std::runtime_error where the machine does not offer the variant.
void set_isa(const char* name);
// Whether bf16 weights should be coded for this variant: see cpu/coded_weight.h.
bool takes_coded_weights();
// Threads of the pool that runs every CPU op. Takes effect with the next op, which throws std::runtime_error if the
// system does not start that many.
void set_num_threads(int32_t num_threads);
// Requests huge pages for memory that is about to be filled; does nothing where the system has none.
void advise_huge_pages(void* data, int64_t num_bytes);

// T: bf16_t or float.
template <typename T>
void row_linear(const RowLinearParamsOf<T>& p);
template <typename T>
void qkv_commit(const QkvCommitParamsOf<T>& p);
template <typename T>
void dual_attn(const DualAttnParamsOf<T>& p);
template <typename T>
void rms_norm(const RmsNormParamsOf<T>& p);
template <typename T>
void embed(const EmbedParamsOf<T>& p);
void consensus(const ConsensusParams& p);
void process_logits(const ProcessLogitsParams& p);
void count_tokens(const CountTokensParams& p);

}  // namespace orthrus::cpu

namespace orthrus::cuda {

// Every launcher enqueues on `stream` (a cudaStream_t) alone and returns a cudaError_t as int.
int row_linear(const RowLinearParams& p, void* stream);
int row_linear(const RowLinearParamsOf<float>& p, void* stream);
int qkv_commit(const QkvCommitParams& p, void* stream);
int qkv_commit(const QkvCommitParamsOf<float>& p, void* stream);
int dual_attn(const DualAttnParams& p, void* stream);
int dual_attn(const DualAttnParamsOf<float>& p, void* stream);
int consensus(const ConsensusParams& p, void* stream);

// Bytes of workspace for bf16 (float needs none), reusable by every later call on the same stream. The caller
// zero-initialises the workspace of row_linear once: each launch leaves its counters at zero.
int64_t row_linear_workspace(int32_t max_rows, int32_t in_features, int32_t out_features);
int64_t dual_attn_workspace(int32_t max_rows, int32_t num_heads_q, int32_t head_dim, int32_t max_seq_len);
// Partial maxima per row that kArgmax writes for a vocabulary of out_features ids, in bf16 (float: one per 128 ids).
int32_t row_linear_num_partials(int32_t in_features, int32_t out_features);

// The instructions that row_linear and dual_attn multiply with on the current device: "sm90a" (wgmma), "sm80"
// (mma.sync, also where ORTHRUS_CUDA_ISA asks for it) or "none". The two round alike but sum in different orders.
const char* isa();
// Reads ORTHRUS_CUDA_ISA; launches do not read it. Must not run while the environment may change.
void read_environment();
const char* error_string(int error);
int new_stream(void** stream);  // on the current device; never destroyed, waits for no other stream

}  // namespace orthrus::cuda
