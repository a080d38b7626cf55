// row_linear in float32: plain fused multiply-adds. Models are run in it to compare results, not for speed.
//
// Contract (shapes in params.h). Weights stay [out_features, in_features]; for kSiluMul all gates come first, then all
// ups. No workspace, no alignment beyond a float's. MUTATED: out or the partial maxima, all rows. No rows: nothing is
// launched. A sum is one chain of fused multiply-adds over ascending k, whatever shares the call: row-invariant,
// deterministic, graph-safe; nothing is rounded. kArgmax: partial p covers ids [128 p, 128 p + 128). Ties go to the
// lowest id and NaN never wins; a tile of nothing but NaN gives -inf and its first id.
// Bytes: each view's weight once per 16 rows, from L2 except the first time. FLOP: 2 * num_rows * in * out_features.
#include <cmath>

#include "best.cuh"
#include "orthrus/host_device.h"
#include "orthrus/launch.cuh"
#include "orthrus/ops.h"

namespace orthrus::cuda {
namespace {

constexpr int kOutputs = 128;  // per tile: 4 per lane, 32 apart
constexpr int kRows = 16;      // per tile: 2 per warp
constexpr int kInputs = 32;    // per step
constexpr int kThreads = 256;
constexpr int kLaneOutputs = kOutputs / 32, kWarpRows = kRows / (kThreads / 32);

struct Args {
  RowLinearParamsOf<float> p;
  int32_t row_tiles_ar;  // the AR view's row tiles come first; no tile holds both views
  int32_t row_tiles;
};

struct Tile {
  const float* weight;
  int row_begin, row_end;
  int first;  // first output, or for kSiluMul first column
};

__device__ Tile tile_of(const Args& args, int block) {
  const int row_tile = block % args.row_tiles, tile = block / args.row_tiles;
  const bool diff = row_tile >= args.row_tiles_ar;
  const bool silu = args.p.epilogue == Epilogue::kSiluMul;
  return {static_cast<const float*>(diff ? args.p.weight_diff : args.p.weight),
          diff ? args.p.num_rows_ar + (row_tile - args.row_tiles_ar) * kRows : row_tile * kRows,
          diff ? args.p.num_rows : args.p.num_rows_ar, tile * (silu ? kOutputs / 2 : kOutputs)};
}

// The weight's row for output `o` of the tile, or -1 beyond its edge. kSiluMul: 64 gates, then their ups.
__device__ int weight_row(const RowLinearParamsOf<float>& p, int first, int o) {
  if (p.epilogue != Epilogue::kSiluMul) return first + o < p.out_features ? first + o : -1;
  const int width = p.out_features / 2, column = first + o % (kOutputs / 2);
  return column < width ? column + (o < kOutputs / 2 ? 0 : width) : -1;
}

__device__ void write_best(const RowLinearParamsOf<float>& p, const float (&acc)[kLaneOutputs], int row, int first,
                           int lane) {
  Best best{-INFINITY, first};
  for (int j = 0; j < kLaneOutputs; ++j) {
    const int feature = first + lane + 32 * j;
    if (feature < p.out_features && acc[j] > best.value) best = {acc[j], feature};
  }
  best = warp_best<32>(best);
  if (lane == 0 && row >= 0) {
    const int64_t slot = static_cast<int64_t>(row) * p.num_partials + first / kOutputs;
    p.partial_value[slot] = best.value;
    p.partial_id[slot] = best.id;
  }
}

__device__ void write_row(const RowLinearParamsOf<float>& p, const float (&acc)[kLaneOutputs], int row, int first,
                          int lane) {
  float* out = static_cast<float*>(p.out);
  if (p.epilogue == Epilogue::kSiluMul) {
    const int width = p.out_features / 2;
    for (int j = 0; j < kLaneOutputs / 2; ++j) {
      const int column = first + lane + 32 * j;
      const float gate = acc[j], up = acc[j + kLaneOutputs / 2];
      const float product = __fmul_rn(gate / __fadd_rn(1.f, expf(-gate)), up);
      if (column < width) out[static_cast<int64_t>(row) * width + column] = product;
    }
    return;
  }
  for (int j = 0; j < kLaneOutputs; ++j) {
    const int feature = first + lane + 32 * j;
    if (feature >= p.out_features) continue;
    const int64_t at = static_cast<int64_t>(row) * p.out_features + feature;
    out[at] = p.epilogue == Epilogue::kResidual ? acc[j] + p.residual[at] : acc[j];
  }
}

__global__ void __launch_bounds__(kThreads) row_linear_f32_kernel(const __grid_constant__ Args args) {
  __shared__ float w[kInputs][kOutputs + 1];  // a warp stores 32 inputs of one output: 32 banks
  __shared__ float x[kRows][kInputs];
  const RowLinearParamsOf<float>& p = args.p;
  const Tile tile = tile_of(args, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float acc[kWarpRows][kLaneOutputs] = {};
  pdl_wait();
  pdl_launch_dependents();
  for (int k0 = 0; k0 < p.in_features; k0 += kInputs) {
    const int k = k0 + lane;
    const bool inside = k < p.in_features;
    for (int o = warp; o < kOutputs; o += kThreads / 32) {
      const int row = weight_row(p, tile.first, o);
      w[lane][o] = inside && row >= 0 ? tile.weight[static_cast<int64_t>(row) * p.in_features + k] : 0.f;
    }
    for (int r = warp; r < kRows; r += kThreads / 32) {
      const int row = tile.row_begin + r;
      x[r][lane] = inside && row < tile.row_end ? p.x[static_cast<int64_t>(row) * p.in_features + k] : 0.f;
    }
    __syncthreads();
    const int steps = p.in_features - k0 < kInputs ? p.in_features - k0 : kInputs;
    for (int i = 0; i < steps; ++i) {
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int j = 0; j < kLaneOutputs; ++j) {
          acc[r][j] = __fmaf_rn(x[warp * kWarpRows + r][i], w[i][lane + 32 * j], acc[r][j]);
        }
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = tile.row_begin + warp * kWarpRows + r;
    const bool mine = row < tile.row_end;
    if (p.epilogue == Epilogue::kArgmax) {
      write_best(p, acc[r], mine ? row : -1, tile.first, lane);
    } else if (mine) {
      write_row(p, acc[r], row, tile.first, lane);
    }
  }
}

}  // namespace

int row_linear(const RowLinearParamsOf<float>& params, void* stream) {
  if (params.num_rows == 0 || params.out_features == 0) return cudaSuccess;
  const bool argmax = params.epilogue == Epilogue::kArgmax;
  if (params.num_rows_ar < 0 || params.num_rows_ar > params.num_rows ||
      (argmax && params.num_partials != div_up(params.out_features, kOutputs)))
    return cudaErrorInvalidValue;
  Args args{params, 0, 0};
  if (!params.weight_diff) args.p.num_rows_ar = params.num_rows;
  args.row_tiles_ar = div_up(args.p.num_rows_ar, kRows);
  args.row_tiles = args.row_tiles_ar + div_up(params.num_rows - args.p.num_rows_ar, kRows);
  const bool silu = params.epilogue == Epilogue::kSiluMul;
  const int width = silu ? params.out_features / 2 : params.out_features, per_tile = silu ? kOutputs / 2 : kOutputs;
  const int64_t blocks = static_cast<int64_t>(div_up(width, per_tile)) * args.row_tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(row_linear_f32_kernel, args, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, device_info());
}

}  // namespace orthrus::cuda
