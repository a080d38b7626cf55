// The work of one CTA of dual_attn: a unit (see dual_attn_schedule.cuh) of one kv head over a run of tiles that all
// warps share. A warp has 16 or 32 query rows, or four warps have the same 16 and a quarter of their output each.
#pragma once
#include "dual_attn_tile_sm90.cuh"
#include "dual_attn_variant.cuh"
#include "orthrus/launch.cuh"

namespace orthrus::cuda {

// Of a work item, in shared memory until it ends: there is no register for it. head: kv head; offset: its first (row, q
// head) in the unit; slot: of the partial results; next: the item that the CTA takes next.
struct Destination {
  int head, offset, slot, next;
};

template <typename V>
class Attention {
 public:
  __device__ Attention(const DualAttnLaunch& a, const uint8_t* smem) : a_(a), p_(a.p), smem_(shared_address(smem)) {}

  // Attends from (row, head) pair `offset` of the unit on, over prefix tiles [first_tile, last_tile) and, if
  // block_rows > 0, over the rows' own block. Without kFold these are the tiles of one split, or the own block alone.
  // Calls while_loading() while the first copies are in flight; `to` and the unit have to be valid from the barrier
  // before them on.
  template <typename WhileLoading>
  __device__ void run(int offset, const QueryUnit& unit, int head, int first_tile, int last_tile, int block_rows,
                      const Destination& to, const WhileLoading& while_loading) {
    unit_ = &unit;
    head_ = head;
    offset_ = offset;
    first_tile_ = first_tile;
    num_prefix_ = last_tile - first_tile;
    num_tiles_ = num_prefix_ + num_tiles(block_rows);
    if (num_prefix_ > 0) next_page_ = page_of(0);

    __syncthreads();  // the previous item's last tile has been read
#pragma unroll 1
    for (int t = 0; t < V::kStages; ++t) {
      load_tile(t);
      if (t == 0) load_queries();
      copy_commit();
    }
    while_loading();

    float mixed[V::kFrags][V::kColumns / 8][4], folded[V::kFold ? V::kFrags : 1][V::kFold ? V::kColumns / 8 : 1][4];
    float folded_top[V::kFrags][2], folded_total[V::kFrags][2];
    RowState state[V::kFrags];
#pragma unroll
    for (int f = 0; f < V::kFrags; ++f) {
      clear(mixed[f]);
      if constexpr (V::kFold) clear(folded[f]);
      folded_top[f][0] = folded_top[f][1] = -INFINITY;
      folded_total[f][0] = folded_total[f][1] = 0.f;
      state[f] = empty_state();
    }

    for (int t = 0; t < num_tiles_; ++t) {
      if (t == 0) {
        read_rows();  // while the first tiles are in flight
        copy_wait<V::kStages - 1>();
      } else {
        copy_wait<V::kStages - 2>();
      }
      if constexpr (V::kWgmma) sm90::fence_proxy_async_shared();
      __syncthreads();  // tile t has arrived, and all warps are done with tile t-1, whose stage is free
      bool ends_split = false;
      const auto look_ahead = [&] {
        if (V::kFold) ends_split = is_last_of_split(t);
        if (t == 0) return;
        load_tile(t + V::kStages - 1);
        copy_commit();
      };
      if constexpr (V::kWgmma) {
        attend_wgmma(t, mixed, state, look_ahead);
      } else {
        look_ahead();
        attend_mma(t, mixed, state);
      }

      if constexpr (V::kFold) {
        if (ends_split) {
#pragma unroll
          for (int f = 0; f < V::kFrags; ++f) {
            reduce_totals(state[f]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const Fold step =
                  fold_step(folded_top[f][i], folded_total[f][i], state[f].top[i], state[f].total[i]);
#pragma unroll
              for (int j = 0; j < V::kColumns / 8; ++j) {
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; ++e) folded[f][j][e] = fold(step, folded[f][j][e], mixed[f][j][e]);
              }
            }
            clear(mixed[f]);
            state[f] = empty_state();
          }
        }
      }
    }
    copy_wait<0>();

    head_ = to.head;
    offset_ = to.offset;
#pragma unroll
    for (int f = 0; f < V::kFrags; ++f) {
      if constexpr (!V::kFold) reduce_totals(state[f]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Place at = place(f, i);
        if (at.row < 0) continue;
        if constexpr (V::kFold) {
          write_output(folded[f], folded_total[f][i], at, i);
        } else if (keys_seen(f, i, 0, num_prefix_ == 0) > 0) {
          if (prefix_keys_[f][i] & 1) {
            write_output(mixed[f], state[f].total[i], at, i);
          } else {
            write_partial(mixed[f], state[f], at, i, to.slot);
          }
        }
      }
    }
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int first_row_of_warp() {
    if constexpr (V::kWgmma) return warp() / 4 * (64 * V::kFrags) + warp() % 4 * 16;
    return warp() / V::kShare * (16 * V::kFrags);
  }
  // The same in all lanes, which the compiler does not know of warp().
  __device__ static int warpgroup() { return V::kWarps == 4 ? 0 : __shfl_sync(~0u, warp() / 4, 0); }
  __device__ static int first_column() { return warp() % V::kShare * V::kColumns; }
  __device__ SharedAddress stage(int t) const {
    return smem_ + V::kQueryBytes + t % V::kStages * (2 * V::kTileBytes);
  }

  using Mixed = float[V::kFrags][V::kColumns / 8][4];

  // Each of the next two adds tile t, which is in shared memory, to what the warp's rows have seen of their split.
  __device__ void attend_mma(int t, Mixed& mixed, RowState (&state)[V::kFrags]) const {
    const SharedAddress k = stage(t), v = k + V::kTileBytes;
    int visible[V::kFrags][2];
    bool some[V::kFrags];
    see(t, visible, some);
    const bool needed = some[0] || some[V::kFrags - 1];
    uint32_t probs[V::kFrags][4][4];
    if (needed) {
      float scores[V::kFrags][8][4];
      score_tile<V::kTileM, V::kHeadDim>(scores, smem_, first_row_of_warp(), k, lane());
      const uint64_t keys = keys_of(t);
#pragma unroll
      for (int f = 0; f < V::kFrags; ++f) weigh(probs[f], scores[f], visible[f], keys, state[f], mixed[f]);
    }
    __syncwarp();  // else the compiler loads values while the scores still fill the registers
    if (needed) mix_tile<V::kColumns>(mixed, probs, v, first_column(), lane());
  }

  // The warps of a warpgroup multiply together, also those without rows. Calls look_ahead() while they do. Of two
  // fragments, the first's probabilities are computed while the second's scores are, and the second's while the first's
  // sums are.
  template <typename LookAhead>
  __device__ void attend_wgmma(int t, Mixed& mixed, RowState (&state)[V::kFrags], const LookAhead& look_ahead) {
    const SharedAddress k = stage(t), v = k + V::kTileBytes;
    const SharedAddress q = smem_ + warpgroup() * (64 * V::kFrags * 128);
    float scores[V::kFrags][8][4];
#pragma unroll
    for (int f = 0; f < V::kFrags; ++f) begin_scores<V::kTileM, V::kHeadDim>(scores[f], q + f * (64 * 128), k);
    look_ahead();
    int visible[V::kFrags][2];
    bool needed[V::kFrags];
    see(t, visible, needed);
    const uint64_t keys = keys_of(t);
    uint32_t probs[V::kFrags][4][4] = {};
#pragma unroll
    for (int f = 0; f < V::kFrags; ++f) {
      sm90::wgmma_wait<V::kFrags - 1>();
      sm90::pin(scores[f]);
      if (needed[f]) weigh(probs[f], scores[f], visible[f], keys, state[f], mixed[f]);
      begin_mix<V::kHeadDim>(mixed[f], probs[f], v);
    }
    sm90::wgmma_wait<0>();
#pragma unroll
    for (int f = 0; f < V::kFrags; ++f) {
      sm90::pin(mixed[f]);
      sm90::pin(probs[f]);
    }
  }

  // How many keys of tile t each of this thread's rows may see, and whether any of a fragment's rows sees one.
  __device__ void see(int t, int (&visible)[V::kFrags][2], bool (&some)[V::kFrags]) const {
#pragma unroll
    for (int f = 0; f < V::kFrags; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) visible[f][i] = keys_seen(f, i, t, t >= num_prefix_);
      some[f] = __any_sync(~0u, visible[f][0] > 0 || visible[f][1] > 0);
    }
  }

  __device__ bool is_last_of_split(int t) const {
    return t + 1 == num_tiles_ || t + 1 == num_prefix_ ||
           (t < num_prefix_ && split_of_tile(first_tile_ + t + 1) != split_of_tile(first_tile_ + t));
  }

  // From a fragment's scores to its probabilities.
  __device__ void weigh(uint32_t (&probs)[4][4], float (&scores)[8][4], const int (&visible)[2], uint64_t keys,
                        RowState& state, float (&mixed)[V::kColumns / 8][4]) const {
    if (~keys || hides(visible[0]) || hides(visible[1])) mask_tile(scores, visible, keys, lane());
    float decay[2];
    softmax_tile(probs, scores, state, decay, a_.scale_log2);
    decay_mixed<V::kColumns>(mixed, decay);
  }

  template <int kN>
  __device__ static void clear(float (&x)[kN][4]) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[j][e] = 0.f;
    }
  }

  __device__ int page_of(int t) const {
    return p_.kv.page_table[static_cast<int64_t>(unit_->seq) * p_.kv.max_pages + first_tile_ + t];
  }

  // A row of the unit: the row of the pass, -1 if there is none, and the q head.
  struct Place {
    int row, head_q;
  };
  __device__ Place place(int m) const {
    const int r = (offset_ + m) / a_.heads_per_kv, h = offset_ + m - r * a_.heads_per_kv;
    return {r < unit_->num_rows ? unit_->first_row + r : -1, head_ * a_.heads_per_kv + h};
  }
  // The row that this thread holds as number i of fragment f.
  __device__ Place place(int f, int i) const {
    return place(first_row_of_warp() + f * V::kRowsToNextFrag + lane() / 4 + 8 * i);
  }

  __device__ void read_rows() {
#pragma unroll
    for (int f = 0; f < V::kFrags; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = place(f, i).row, at = max(row, 0);  // no branch around a load, which would wait for it
        const int prefix = p_.rows.prefix_len[at], position = p_.rows.position[at];
        const bool valid = row >= 0 && row_is_valid(position);
        const int keys = prefix - first_tile_ * kTileKv;
        if constexpr (V::kFold) {
          prefix_keys_[f][i] = row < 0 ? kNoRow : keys;
          block_keys_[f][i] = valid ? kTileKv : 0;
        } else {
          const int seen = row < 0 ? kNoRow : num_prefix_ > 0 ? keys : valid ? -kNoRow - 1 : 0;
          prefix_keys_[f][i] = 2 * seen + (results_of(p_.rows, at, prefix, position).count() == 1);
        }
      }
    }
  }

  // For a row that does not exist: it sees nothing, but its scores are never read, so nothing has to be hidden from it.
  static constexpr int kNoRow = -(1 << 30);
  __device__ static bool hides(int visible) { return visible < kTileKv && visible > kNoRow / 2; }

  // How many keys of tile t, counted from its first, this row may see.
  __device__ int keys_seen(int f, int i, int t, bool own) const {
    if constexpr (V::kFold) return own ? block_keys_[f][i] : prefix_keys_[f][i] - t * kTileKv;
    return (prefix_keys_[f][i] >> 1) - t * kTileKv;
  }

  // Rows that do not exist become zeros, or with wgmma, which may multiply anything, keep what is there.
  __device__ void load_queries() const {
    constexpr int kChunks = V::kHeadDim / 8;
    const int first_row = unit_->first_row, exist = unit_->num_rows * a_.heads_per_kv - offset_;
    const int last = (V::kWgmma ? min(exist, V::kTileM) : V::kTileM) * kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll(V::kFrags == 1 ? 4 : 1)  // as registers allow
    for (int c = threadIdx.x; c < last; c += V::kThreads) {
      const int m = c / kChunks, r = m < exist ? (offset_ + m) / a_.heads_per_kv : 0;
      const int64_t head = static_cast<int64_t>(first_row + r) * p_.num_heads_q + head_ * a_.heads_per_kv +
                           (offset_ + m - r * a_.heads_per_kv);
      const SharedAddress dst = chunk_address(smem_, m, chunk) + chunk / 8 * (V::kTileM * 128);
      copy16(dst, p_.q + (m < exist ? head * V::kHeadDim + chunk * 8 : 0), m < exist);
    }
  }

  // Warp-collective: bit c is set if key c of tile t exists. Behind the longest prefix lies unused cache, which may
  // hold anything.
  __device__ uint64_t keys_of(int t) const {
    if (t < num_prefix_) {
      const int n = unit_->longest - (first_tile_ + t) * kTileKv;
      return n >= kTileKv ? ~0ull : n <= 0 ? 0ull : ~0ull >> (kTileKv - n);
    }
    uint64_t keys = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = (t - num_prefix_) * kTileKv + half * 32 + lane();
      const bool exists = key < unit_->num_rows && sees_block(p_.rows.position[unit_->first_row + key]);
      keys |= static_cast<uint64_t>(__ballot_sync(~0u, exists)) << (half * 32);
    }
    return keys;
  }

  // Starts the copies of tile t, if there is one; keys that do not exist become zeros.
  __device__ void load_tile(int t) {
    if (t >= num_tiles_) return;
    const uint64_t keys = keys_of(t);
    if (t < num_prefix_) {
      const int64_t base =
          (static_cast<int64_t>(next_page_) * p_.kv.num_heads_kv + head_) * (kTileKv * V::kHeadDim);
      load_rows(stage(t), p_.kv.k_pages + base, V::kHeadDim, keys);
      load_rows(stage(t) + V::kTileBytes, p_.kv.v_pages + base, V::kHeadDim, keys);
      if (t + 1 < num_prefix_) next_page_ = page_of(t + 1);
    } else {
      const int64_t key = unit_->first_row - p_.rows.num_rows_ar + (t - num_prefix_) * kTileKv;
      const int64_t base = (key * p_.kv.num_heads_kv + head_) * V::kHeadDim;
      const int64_t stride = static_cast<int64_t>(p_.kv.num_heads_kv) * V::kHeadDim;
      load_rows(stage(t), p_.scratch_k + base, stride, keys);
      load_rows(stage(t) + V::kTileBytes, p_.scratch_v + base, stride, keys);
    }
  }

  __device__ void load_rows(SharedAddress dst, const bf16_t* src, int64_t stride, uint64_t keys) const {
    if (~keys) {
      load_rows<false>(dst, src, stride, keys);
    } else {
      load_rows<true>(dst, src, stride, keys);
    }
  }

  template <bool kAll>
  __device__ void load_rows(SharedAddress dst, const bf16_t* src, int64_t stride, uint64_t keys) const {
    constexpr int kChunks = V::kHeadDim / 8, kRowsAtOnce = V::kThreads / kChunks;
    static_assert(kRowsAtOnce % 8 == 0);  // the swizzle repeats
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const SharedAddress first = chunk_address(dst, row, chunk) + chunk / 8 * (kTileKv * 128);
    src += row * stride + chunk * 8;
    // With folding, a prompt's other rows read the same keys in other CTAs. With splits, all rows of a sequence read
    // them at about the same time, and L2 should rather keep partial results and what qkv has prefetched of `o`.
    uint64_t once = 0;
    if constexpr (!V::kFold) once = evict_first_policy();  // again for every tile: there is no register to keep it in
#pragma unroll
    for (int i = 0; i < kTileKv; i += kRowsAtOnce) {
      const bool wanted = kAll || (keys >> (row + i) & 1);
      if constexpr (V::kFold) {
        copy16(first + i * 128, src + i * stride, wanted);
      } else {
        copy16(first + i * 128, src + i * stride, wanted, once);
      }
    }
  }

  template <int kN>
  __device__ void write_output(const float (&mixed)[kN][4], float total, const Place& at, int i) const {
    const int64_t head = static_cast<int64_t>(at.row) * p_.num_heads_q + at.head_q;
    uint32_t* out = reinterpret_cast<uint32_t*>(p_.out + head * V::kHeadDim + first_column()) + lane() % 4;
    const float inverse = inverse_total(total);
#pragma unroll
    for (int j = 0; j < kN; ++j)
      out[j * 4] = pack_bf16(__fmul_rn(mixed[j][2 * i], inverse), __fmul_rn(mixed[j][2 * i + 1], inverse));
  }

  template <int kN>
  __device__ void write_partial(const float (&mixed)[kN][4], const RowState& state, const Place& at, int i,
                                int slot) const {
    const int64_t head =
        (static_cast<int64_t>(slot) * p_.rows.num_rows + at.row) * p_.num_heads_q + at.head_q;
    float2* out = reinterpret_cast<float2*>(a_.partial + head * V::kHeadDim + first_column()) + lane() % 4;
#pragma unroll
    for (int j = 0; j < kN; ++j) out[j * 4] = float2{mixed[j][2 * i], mixed[j][2 * i + 1]};
    if (first_column() == 0 && lane() % 4 == 0) a_.partial_state[head] = float2{state.top[i], state.total[i]};
  }

  const DualAttnLaunch& a_;
  const DualAttnParams& p_;
  SharedAddress smem_;

  const QueryUnit* unit_;  // in shared memory
  int head_, offset_, first_tile_, num_prefix_, num_tiles_, next_page_;
  // For the two rows that this thread holds of each fragment: prefix keys from the first tile on, and with kFold what
  // the row sees of each tile of its own block; without it, twice the keys, plus 1 if the row has no other result.
  int prefix_keys_[V::kFrags][2], block_keys_[V::kFrags][2];
};

}  // namespace orthrus::cuda
