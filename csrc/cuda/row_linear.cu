// row_linear's host side: the plan for a weight's shape, the workspace, and the choice of kernel.
//
// Contract (shapes in params.h). x, weights and workspace are 16-byte aligned, as are out and residual where
// out_features is a multiple of 4; in_features is a multiple of 64. MUTATED: out or the partial maxima, all rows, and
// the workspace. No rows: nothing is launched. fp32 accumulation; one rounding, in the epilogue (none for kLogits and
// kArgmax).
// Deterministic, row-invariant, graph-safe: each launch leaves the workspace's counters at zero. One launch per call.
// The weights must be complete before the preceding kernels of the stream start: they are prefetched while those run.
// kArgmax: partial p covers the p-th of num_partials runs of whole tiles. Ties go to the lowest id and NaN never wins;
// a run of nothing but NaN gives -inf and its first id.
// next_weight: if this call's rows are so few that the next launch has few too, sm_90a prefetches the beginning of
// that weight into L2 while this launch ends, in the order for an epilogue that may cut tiles and for a launch with the
// same leading_only. No result depends on it.
// Coded weights (coded_block.cuh; both views' or neither's) in 12 bits give the same bits as plain ones unless
// leading_only is set, which plain ones ignore; in 8 bits they always give those of drafts.
// Bytes: each view's packed weight once, with leading_only of one in 12 bits the leading parts (kArgmax: once per tile
// of rows), plus x once per tile from L2 or, with many rows on sm_90a, once per two tiles.
// FLOP: 2 * num_rows * in * out_features.
#include "isa.h"
#include "orthrus/aligned.h"
#include "orthrus/ops.h"
#include "row_linear_plan.h"

namespace orthrus::cuda {
namespace {

bool needs_whole_tiles(Epilogue epilogue) {
  // Materialised logits and partial maxima must come from the same bits, and a CTA must see whole sums.
  return epilogue == Epilogue::kLogits || epilogue == Epilogue::kArgmax;
}

int rows_per_tile(int rows, const RowTiles& tiles) {
  for (int tile_rows : {16, 32, 64, 96, 112, 128})
    if (rows <= tile_rows && tile_rows < tiles.widest) return tile_rows;
  return tiles.widest;
}

// For kArgmax, where each tile reads the weight again: the wider tile if there are fewer tiles then. `rows`: of the
// larger view, but no vocabulary has two.
int rows_per_tile_of_argmax(int rows, const RowTiles& tiles) {
  const auto count = [&](int tile_rows) { return div_up(rows, tile_rows); };
  return count(tiles.widest_argmax) < count(tiles.widest) ? tiles.widest_argmax : rows_per_tile(rows, tiles);
}

// For a call with many rows. In one step, a CTA loads 64 inputs of two blocks of weights and of its share of tile_rows
// rows of x. Multiplying them takes as long as loading 5/4 tile_rows, at 700 TFLOP/s and 6.8 TB/s from L2: estimated.
int rows_per_tile_of_many(int rows_ar, int rows_diff, const RowTiles& tiles, int blocks, int num_sms) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (const int tile_rows : tiles.many_rows) {
    const int row_tiles = div_up(rows_ar, tile_rows) + div_up(rows_diff, tile_rows);
    const int64_t items = int64_t{items_of_many(blocks, tiles.cluster)} * row_tiles;
    const int clusters = clusters_of_many(num_sms, tiles.cluster);
    const int step = max(2 * kBlock + tile_rows / tiles.cluster, tile_rows * 5 / 4);
    const int64_t time = div_up(items, clusters) * step;
    if (time < least) least = time, best = tile_rows;
  }
  return best;
}

int steps_ahead(const RowLinearPlan& plan, BlockBytes bytes) {
  return kPrefetchBytes / (plan.blocks_per_tile * bytes.read);
}

int64_t workspace_bytes(const RowLinearPlan& plan, int views, int tile_rows) {
  return plan.split ? partial_offset(plan, views, 0, 0, 0, tile_rows) * 4 : 0;
}

}  // namespace

int64_t row_linear_workspace(int32_t max_rows, int32_t in_features, int32_t out_features) {
  read_environment();
  const DeviceInfo device = device_info();
  if (device.error) return 0;
  return workspace_bytes(make_plan(in_features, out_features, false, device.num_sms), 2,
                         rows_per_tile(max_rows, runs_wgmma(device) ? kRowTilesSm90 : kRowTilesMma));
}

int32_t row_linear_num_partials(int32_t in_features, int32_t out_features) {
  const DeviceInfo device = device_info();
  return device.error ? 0 : make_plan(in_features, out_features, true, device.num_sms).grid;
}

int row_linear(const RowLinearParams& params, void* stream) {
  if (params.num_rows == 0 || params.out_features == 0) return cudaSuccess;
  if (params.in_features <= 0 || params.in_features % kBlock || params.num_rows_ar < 0 ||
      params.num_rows_ar > params.num_rows)
    return cudaErrorInvalidValue;
  if (!aligned(16, params.x, params.weight, params.weight_diff, params.workspace, params.next_weight))
    return cudaErrorMisalignedAddress;
  const bool wide_rows = params.out_features % 4 == 0;  // these are read and written 16 bytes at a time
  if (wide_rows && !aligned(16, params.residual, params.out)) return cudaErrorMisalignedAddress;
  const DeviceInfo device = device_info();
  if (device.error) return device.error;

  RowLinearArgs args{};
  args.p = params;
  if (!params.weight_diff) args.p.num_rows_ar = params.num_rows;
  const bool coded = is_coded(params.weight_bits);
  if (params.weight_diff && coded != is_coded(params.weight_diff_bits)) return cudaErrorInvalidValue;
  args.plan = make_plan(params.in_features, params.out_features, needs_whole_tiles(params.epilogue), device.num_sms);
  args.block_bytes = block_bytes(params.weight_bits, params.leading_only);
  args.block_bytes_diff = block_bytes(params.weight_diff_bits, params.leading_only);
  args.steps_ahead = steps_ahead(args.plan, args.block_bytes);
  const bool argmax = params.epilogue == Epilogue::kArgmax;
  if (argmax && params.num_partials != args.plan.grid) return cudaErrorInvalidValue;

  const int rows_ar = args.p.num_rows_ar, rows_diff = params.num_rows - rows_ar;
  const int most_rows = rows_ar > rows_diff ? rows_ar : rows_diff;
  const bool wgmma = runs_wgmma(device);
  const RowTiles& tiles = !wgmma ? kRowTilesMma : coded ? kRowTilesSm90Coded : kRowTilesSm90;
  const bool many_rows = most_rows > tiles.widest && !argmax;
  if (params.num_rows > tiles.widest) args.p.next_weight = nullptr;  // the next launch may have many rows of one view
  if (args.p.next_weight) {
    args.next = make_plan(params.next_in_features, params.next_out_features, false, device.num_sms);
    args.next_block_bytes = block_bytes(params.next_weight_bits, params.leading_only);
    args.next_steps_ahead = steps_ahead(args.next, args.next_block_bytes);
  }
  const int tile_rows = argmax ? rows_per_tile_of_argmax(most_rows, tiles)
                        : many_rows
                            ? rows_per_tile_of_many(rows_ar, rows_diff, tiles, args.plan.blocks, device.num_sms)
                            : rows_per_tile(most_rows, tiles);
  args.row_tiles_ar = div_up(rows_ar, tile_rows);
  args.row_tiles = args.row_tiles_ar + div_up(rows_diff, tile_rows);
  if (!many_rows && params.workspace_bytes < workspace_bytes(args.plan, rows_diff ? 2 : 1, tile_rows))
    return cudaErrorInvalidValue;
  const auto launch = wgmma ? coded ? launch_row_linear_sm90_coded : launch_row_linear_sm90
                            : coded ? launch_row_linear_mma_coded : launch_row_linear_mma;
  return launch(args, tile_rows, many_rows, stream, device);
}

}  // namespace orthrus::cuda
