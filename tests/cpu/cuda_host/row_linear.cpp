// C interface to row_linear, compiled for the host beside this file, on a Hopper device of any number of SMs.
#include "orthrus/ops.h"
#include "orthrus/sm80.cuh"

extern "C" {
int row_linear(const orthrus::RowLinearParams* p, int descending, int num_sms) {
  cuda_host::descending = descending;
  cuda_host::num_sms = num_sms;
  return orthrus::cuda::row_linear(*p, nullptr);
}
int64_t row_linear_workspace(int rows, int in_features, int out_features, int num_sms) {
  cuda_host::num_sms = num_sms;
  return orthrus::cuda::row_linear_workspace(rows, in_features, out_features);
}
int row_linear_num_partials(int in_features, int out_features, int num_sms) {
  cuda_host::num_sms = num_sms;
  return orthrus::cuda::row_linear_num_partials(in_features, out_features);
}
int64_t sizeof_RowLinearParams() { return sizeof(orthrus::RowLinearParams); }
}
