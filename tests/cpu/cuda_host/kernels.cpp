// C interface to the CUDA kernels that are compiled for the host together with this file.
#include "orthrus/launch.cuh"
#include "orthrus/ops.h"

using cuda_host::kStream;

extern "C" {
void configure(int descending, int num_sms) {
  cuda_host::descending = descending;
  cuda_host::num_sms = num_sms;
  orthrus::cuda::read_environment();
}
int qkv_commit(const orthrus::QkvCommitParams* p) { return orthrus::cuda::qkv_commit(*p, kStream); }
int consensus(const orthrus::ConsensusParams* p) { return orthrus::cuda::consensus(*p, kStream); }
int dual_attn(const orthrus::DualAttnParams* p) { return orthrus::cuda::dual_attn(*p, kStream); }
int row_linear_f32(const orthrus::RowLinearParamsOf<float>* p) { return orthrus::cuda::row_linear(*p, kStream); }
int qkv_commit_f32(const orthrus::QkvCommitParamsOf<float>* p) { return orthrus::cuda::qkv_commit(*p, kStream); }
int dual_attn_f32(const orthrus::DualAttnParamsOf<float>* p) { return orthrus::cuda::dual_attn(*p, kStream); }
int64_t dual_attn_workspace(int max_rows, int num_heads_q, int head_dim, int max_seq_len) {
  return orthrus::cuda::dual_attn_workspace(max_rows, num_heads_q, head_dim, max_seq_len);
}
int64_t sizeof_RowLinearParams() { return sizeof(orthrus::RowLinearParams); }
int64_t sizeof_QkvCommitParams() { return sizeof(orthrus::QkvCommitParams); }
int64_t sizeof_ConsensusParams() { return sizeof(orthrus::ConsensusParams); }
int64_t sizeof_DualAttnParams() { return sizeof(orthrus::DualAttnParams); }
}
