// C interface to the plain CUDA kernels, compiled for the host beside this file.
#include "cuda_runtime.h"
#include "orthrus/ops.h"

extern "C" {
int qkv_commit(const orthrus::QkvCommitParams* p, int descending) {
  cuda_host::descending = descending;
  return orthrus::cuda::qkv_commit(*p, nullptr);
}
int consensus(const orthrus::ConsensusParams* p, int descending) {
  cuda_host::descending = descending;
  return orthrus::cuda::consensus(*p, nullptr);
}
int64_t sizeof_QkvCommitParams() { return sizeof(orthrus::QkvCommitParams); }
int64_t sizeof_ConsensusParams() { return sizeof(orthrus::ConsensusParams); }
}
