// The producer warpgroup of the backward's query kernel, in both modes: bulk copies of Q and of the
// window slot, and the slots: who leaves, who enters, gates, copies. The forward's producer of the
// general mode is built on it.
#pragma once
#include "cuda/device/cp_async.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/schedule.cuh"

namespace sparsek::cuda::sm90 {

inline constexpr int kProducerBarrier = 5;  // named barrier of the producer warpgroup

template <int kDim, Mode kMode>
class Producer {
  using L = Layout<kDim, kMode>;
  static constexpr int kBlocks = L::kMaxBlocks;

 public:
  __device__ __forceinline__ Producer(Params const& p, std::uint32_t smem, char* generic)
      : p_(p),
        smem_(smem),
        generic_(generic),
        tid_(threadIdx.x & 127),
        lane_(threadIdx.x & 31),
        warp_((threadIdx.x & 127) >> 5) {}

  // Works through the range that starts at `cursor`, which is not empty.
  __device__ __forceinline__ void run(Cursor cursor) {
    bool fresh = true;     // whether the tile's first block has to be filled
    bool started = false;  // whether the slots hold this head's keys
    fill_q(cursor, fresh);
    for (;;) {
      int const t = cursor.t;
      int const first = t == 0 || cursor.g & 1 ? t : t - 1, last = 2 * t - 1 - first;
      if (fresh) fill_window(cursor, first);
      if (!started) {
        start_slots(cursor);
        started = true;
      }
      if (t > 0) fill_window(cursor, last);
      fresh = releases_last(cursor);

      if (!cursor.has_next(p_)) break;
      bool const new_head = cursor.advance(p_);
      fill_q(cursor, fresh);
      if (new_head) {
        started = false;
      } else if (cursor.t != t && p_.num_blocks > 0) {
        if (cursor.t >= 2) {
          admit(cursor);
          fill_slots(cursor);
        }
        prefetch(cursor, cursor.t + 1);
      }
    }
  }

 protected:
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return smem_ + L::kBarriers + i * 8;
  }
  template <typename T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(generic_ + offset);
  }
  __device__ __forceinline__ std::int64_t expiry_row(Cursor const& c) const {
    return c.sequence * p_.stride_expiry_batch + c.kv_head * p_.stride_expiry_head +
           c.tiles.first_k;
  }
  __device__ __forceinline__ std::int64_t score_at(Cursor const& c, int key) const {
    return c.sequence * p_.stride_scores_batch + c.kv_head * p_.stride_scores_head +
           (c.tiles.first_k + key) * p_.stride_scores_position;
  }
  __device__ __forceinline__ std::int64_t chunk_row(Cursor const& c) const {
    std::int64_t const first = p_.cu_seqlens_k ? c.tiles.first_k / p_.chunk_size + c.sequence : 0;
    return c.sequence * p_.stride_chunk_batch + c.kv_head * p_.stride_chunk_head + first;
  }
  __device__ __forceinline__ int batch_coordinate(Cursor const& c) const {
    return p_.cu_seqlens_k ? 0 : c.sequence;
  }

  // Whether what follows the cursor's tile needs something else in the window slot than this tile's
  // last block.
  __device__ __forceinline__ bool releases_last(Cursor const& c) const {
    bool const more = c.has_next(p_);
    bool const last_is_diagonal = c.t == 0 || (c.g & 1) == 0;
    return !(more && (c.g + 1 < p_.group || (c.t + 1 < c.tiles.end && last_is_diagonal)));
  }

  // --- Q and the plan ----------------------------------------------------------------------------
  __device__ __forceinline__ void fill_q(Cursor const& c, bool first_is_fresh) {
    if (tid_ == 0) {
      bool const more = c.has_next(p_);
      bool const swap =
          fills_q_ & 1;  // the lower half has less diagonal work, so the warpgroups take turns
      int const begin = max(0, c.tiles.q_offset - c.t * kTile);
      int const position = c.tiles.first_q + c.t * kTile - c.tiles.q_offset;
      int const q_head = c.kv_head * p_.group + c.g;
      if (fills_q_) {
        for (int wg = 0; wg < 2; ++wg) mbarrier_wait_empty(kEmptyQ + wg, fills_q_);
      }
      TilePlan& plan = at<TilePlan>(L::kPlans)[fills_q_ & 1];
      plan.tile = c.t;
      plan.num_blocks = slot_blocks(c.t, p_.num_blocks);
      plan.q_position = position;
      plan.q_head = q_head;
      plan.batch = batch_coordinate(c);
      plan.row_begin = begin;
      plan.row_end = min(kTile, c.tiles.valid - c.t * kTile);
      plan.flags = (swap ? kSwapHalves : 0) | (c.t == 0 ? kSingle : 0) |
                   (c.t == 0 || c.g & 1 ? kDiagonalFirst : 0) |
                   (first_is_fresh ? kFirstIsFresh : 0) | (releases_last(c) ? kReleaseLast : 0) |
                   (!more || c.g + 1 == p_.group ? kReleaseSlots : 0) | (more ? kMore : 0);
      plan.lse_offset = plan.batch * p_.stride_lse_batch + q_head * p_.stride_lse_head +
                        position * p_.stride_lse_position;
      plan.chunk_offset = chunk_row(c);
      for (int wg = 0; wg < 2; ++wg) {
        std::uint32_t const full = barrier(kFullQ + wg);
        device::mbarrier_arrive_expect(full, L::kQBytes);
        for (int half = 0; half < kDim / 64; ++half) {
          device::tma_load(smem_ + L::kQ + wg * L::kQBytes + half * (L::kQBytes * 64 / kDim), &p_.q,
                           full, half * 64, position + 64 * (wg ^ static_cast<int>(swap)), q_head,
                           plan.batch);
        }
      }
    }
    ++fills_q_;
    __syncwarp();
  }

  // --- the window slot ---------------------------------------------------------------------------
  __device__ __forceinline__ void fill_window(Cursor const& c, int tile) {
    // Beyond the sequence lie other sequences' keys, or memory that must not be used: such rows are
    // zeroed (weights of 0 are multiplied with them, and 0 * NaN is not 0). Beyond the tensor the
    // copy engine does that itself.
    bool const partial = (p_.lengths || p_.cu_seqlens_k) && (tile + 1) * kTile > c.tiles.valid;
    int const position = c.tiles.first_k + tile * kTile;
    if (partial) {
      wait_empty_together(kEmptyWindowK);
      copy_partial_block(L::kWindowK, p_.k_rows, p_.stride_k_batch, p_.stride_k_head,
                         p_.stride_k_position, tile, c);
      device::named_barrier_sync(kProducerBarrier, 128);
      if (tid_ == 0) device::mbarrier_arrive(barrier(kFullWindowK));
    } else if (tid_ == 0) {
      if (fills_window_) mbarrier_wait_empty(kEmptyWindowK, fills_window_);
      load_block(&p_.k, kFullWindowK, L::kWindowK, position, c);
    }
    if (kMode == Mode::kGeneral || partial) {
      float score = 0.f;
      int seen_until = 0;
      if (kMode == Mode::kGeneral && tile * kTile + tid_ < c.tiles.valid) {
        seen_until = p_.expiry[expiry_row(c) + tile * kTile + tid_];
        if (p_.gated) score = p_.scores[score_at(c, tile * kTile + tid_)];
      }
      wait_empty_together(kEmptyWindowV);
      if (kMode == Mode::kGeneral) {
        int const place = gate_place(tid_);
        at<float>(L::kWindowScore)[place] = score;
        at<std::uint16_t>(L::kWindowExpiry)[place] =
            static_cast<std::uint16_t>(min(max(seen_until - tile * kTile, 0), 2 * kTile));
      }
      if (partial) {
        copy_partial_block(L::kWindowV, p_.v_rows, p_.stride_v_batch, p_.stride_v_head,
                           p_.stride_v_position, tile, c);
      }
      device::named_barrier_sync(kProducerBarrier, 128);
      if (tid_ == 0) {
        if (partial)
          device::mbarrier_arrive(barrier(kFullWindowV));
        else
          load_block(&p_.v, kFullWindowV, L::kWindowV, position, c);
      }
    } else if (tid_ == 0) {
      if (fills_window_) mbarrier_wait_empty(kEmptyWindowV, fills_window_);
      load_block(&p_.v, kFullWindowV, L::kWindowV, position, c);
    }
    ++fills_window_;
    __syncwarp();
  }

  // A tile of K or V row by row, zeros where the sequence has no key.
  __device__ __forceinline__ void copy_partial_block(int base, char const* rows,
                                                     std::int64_t stride_batch,
                                                     std::int64_t stride_head,
                                                     std::int64_t stride_position, int tile,
                                                     Cursor const& c) const {
    constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
    rows += batch_coordinate(c) * stride_batch + c.kv_head * stride_head +
            (c.tiles.first_k + tile * kTile) * stride_position;
    for (int i = tid_; i < kTile * kChunks; i += 128) {
      int const r = i / kChunks, chunk = i % kChunks;
      bool const valid = tile * kTile + r < c.tiles.valid && chunk * 8 < p_.head_dim;
      device::cp_async_16(chunk_address(base, r, chunk),
                          valid ? rows + r * stride_position + chunk * 16 : rows, valid);
    }
    device::cp_async_wait_all();
    device::fence_async_proxy();
  }

  __device__ __forceinline__ void load_block(CUtensorMap const* map, int full, int base,
                                             int position, Cursor const& c) {
    device::mbarrier_arrive_expect(barrier(full), L::kBlockBytes);
    for (int half = 0; half < kDim / 64; ++half) {
      device::tma_load(smem_ + base + half * L::kHalfBytes, map, barrier(full), half * 64, position,
                       c.kv_head, batch_coordinate(c));
    }
  }

  // The `fills`-th fill waits for the release of the one before.
  __device__ __forceinline__ void mbarrier_wait_empty(int empty, int fills) {
    device::mbarrier_wait(barrier(empty), (fills - 1) & 1);
  }

  // The same for the window slot, before all threads write to it. NOTE: one thread waits, the one
  // that waits at every fill. Another could be fills ahead of it, where a parity means another
  // phase.
  __device__ __forceinline__ void wait_empty_together(int empty) {
    if (fills_window_ == 0) return;
    if (tid_ == 0) mbarrier_wait_empty(empty, fills_window_);
    device::named_barrier_sync(kProducerBarrier, 128);
  }

  // Shared address of 16 bytes of a row of a block at `base`: halves of 64 columns, 128-byte
  // swizzle.
  __device__ __forceinline__ std::uint32_t chunk_address(int base, int row, int chunk) const {
    return smem_ + base + (chunk >> 3) * L::kHalfBytes + row * 128 +
           (((chunk & 7) ^ (row & 7)) << 4);
  }

  // A consumer thread reads what belongs to its columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of 16 at
  // once.
  __device__ __forceinline__ static int gate_place(int slot) {
    return (slot & ~15) | (slot & 6) << 1 | (slot & 8) >> 2 | (slot & 1);
  }

  // --- the slots ---------------------------------------------------------------------------------
  // Every thread owns one slot of each block: its key, until when it is seen, its score, and
  // whether the row is still to be copied.

  // A new head, perhaps in its middle: finds the keys before the window tile that are alive at the
  // cursor's tile.
  __device__ __forceinline__ void start_slots(Cursor const& c) {
    if (p_.num_blocks == 0) return;
    int const t = c.t;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) expiry_[i] = 0, fresh_[i] = i < p_.num_blocks;
    if (t >= 2) {
      // The list goes where the gates will be, once nobody reads them any more.
      if (fills_slots_) mbarrier_wait_empty(kEmptySlotV, fills_slots_);
      int* const list = at<int>(L::kGate);
      std::int32_t const* const row = p_.expiry + expiry_row(c);
      int const end = (t - 1) * kTile, capacity = p_.num_blocks * kTile;
      int count = 0;
#pragma unroll 8
      for (int j = tid_; j < end; j += kTile) count += row[j] > t * kTile;
      int inclusive = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        int const other = __shfl_up_sync(~0u, inclusive, step);
        if (lane_ >= step) inclusive += other;
      }
      auto* const counts = at<int volatile>(L::kCounts);
      if (lane_ == 31) counts[warp_] = inclusive;
      device::named_barrier_sync(kProducerBarrier, 128);
      int place = inclusive - count, total = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (w < warp_) place += counts[w];
        total += counts[w];
      }
#pragma unroll 8
      for (int j = tid_; j < end; j += kTile) {
        if (row[j] > t * kTile) {
          if (place < capacity) list[place] = j;
          ++place;
        }
      }
      device::named_barrier_sync(kProducerBarrier, 128);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        int const slot = i * kTile + tid_;
        if (slot < min(total, capacity)) take_key(c, i, list[slot]);
      }
      device::named_barrier_sync(kProducerBarrier, 128);
      next_tau_ = p_.gated ? threshold_of(c, t) : 0.f;
      fill_slots(c);
    }
    prefetch(c, t + 1);
  }

  __device__ __forceinline__ void take_key(Cursor const& c, int i, int key) {
    key_[i] = key;
    expiry_[i] = p_.expiry[expiry_row(c) + key];
    score_[i] = p_.gated ? p_.scores[score_at(c, key)] : 0.f;
    fresh_[i] = true;
  }

  __device__ __forceinline__ float threshold_of(Cursor const& c, int tile) const {
    return p_.threshold[chunk_row(c) + tile * kTile / p_.chunk_size];
  }

  // Loads ahead what admission to `tile` needs: keys of the tile that was the window of the tile
  // before.
  __device__ __forceinline__ void prefetch(Cursor const& c, int tile) {
    if (tile < 2 || tile >= c.tiles.end) return;
    next_expiry_ = p_.expiry[expiry_row(c) + (tile - 2) * kTile + tid_];
    if (kMode == Mode::kAligned && p_.gated) next_tau_ = threshold_of(c, tile);
  }

  // The prefetched keys that the cursor's tile sees take the place of keys that it no longer sees.
  __device__ __forceinline__ void admit(Cursor const& c) {
    std::uint32_t const lower = (1u << lane_) - 1;
    int const now = c.t * kTile;
    bool const enters = next_expiry_ > now;
    std::uint32_t const enter_mask = __ballot_sync(~0u, enters);
    std::uint32_t free_mask[kBlocks];
    std::uint64_t mine = __popc(enter_mask);  // eight bits each: entering, free in block 0, 1, ...
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      free_mask[i] = __ballot_sync(~0u, i < p_.num_blocks && expiry_[i] <= now);
      mine |= static_cast<std::uint64_t>(__popc(free_mask[i])) << (8 * i + 8);
    }
    auto* const counts = at<std::uint64_t volatile>(L::kCounts);
    if (lane_ == 0) counts[warp_] = mine;
    device::named_barrier_sync(kProducerBarrier, 128);
    std::uint64_t before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w < warp_) before += counts[w];
      total += counts[w];
    }
    auto* const queue = at<std::uint8_t volatile>(L::kQueue);
    if (enters)
      queue[(before & 255) + __popc(enter_mask & lower)] = static_cast<std::uint8_t>(tid_);
    device::named_barrier_sync(kProducerBarrier, 128);
    int const entering = static_cast<int>(total & 255);
    int rank_base = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      int const rank =
          rank_base + static_cast<int>(before >> (8 * i + 8) & 255) + __popc(free_mask[i] & lower);
      if ((free_mask[i] >> lane_ & 1) && rank < entering) {
        take_key(c, i, (c.t - 2) * kTile + queue[rank]);
      }
      rank_base += static_cast<int>(total >> (8 * i + 8) & 255);
    }
  }

  // Gates and rows for the cursor's tile, as soon as the consumers are done with the tile before.
  __device__ __forceinline__ void fill_slots(Cursor const& c) {
    if (kMode == Mode::kAligned) write_gates(c);
    if (fills_slots_) mbarrier_wait_empty(kEmptySlotK, fills_slots_);
    copy_rows(c, L::kSlotK, p_.k_rows, p_.stride_k_batch, p_.stride_k_head, p_.stride_k_position);
    device::mbarrier_arrive(barrier(kFullSlotK));
    if (fills_slots_) mbarrier_wait_empty(kEmptySlotV, fills_slots_);
    if (kMode == Mode::kGeneral) write_slot_scores(c);
    copy_rows(c, L::kSlotV, p_.v_rows, p_.stride_v_batch, p_.stride_v_head, p_.stride_v_position);
    device::mbarrier_arrive(barrier(kFullSlotV));
    ++fills_slots_;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) fresh_[i] = false;
  }

  // Aligned: log2 of the gates in units of the score accumulators, -inf for slots without a live
  // key.
  __device__ __forceinline__ void write_gates(Cursor const& c) {
    int const now = c.t * kTile;
    int const pool_end = now / p_.chunk_size * p_.chunk_size - p_.window;
    float const inverse_scale = 1.f / p_.scale_log2;
    float* const gates = at<float>(L::kGate + (fills_slots_ & 1) * L::kGateBytes);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i >= p_.num_blocks) break;
      float m = expiry_[i] > now ? 1.f : 0.f;
      if (p_.gated && expiry_[i] > now && key_[i] < pool_end)
        m = __saturatef(score_[i] - next_tau_);
      gates[i * kTile + gate_place(tid_)] = __log2f(m) * inverse_scale;
    }
    device::mbarrier_arrive(barrier(kFullGate + (fills_slots_ & 1)));
  }

  // General: scores, and for how many rows of this tile each slot is seen.
  __device__ __forceinline__ void write_slot_scores(Cursor const& c) {
    int const now = c.t * kTile;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i >= p_.num_blocks) break;
      int const place = i * kTile + gate_place(tid_);
      at<float>(L::kSlotScore)[place] = score_[i];
      at<std::uint16_t>(L::kSlotExpiry)[place] =
          static_cast<std::uint16_t>(min(max(expiry_[i] - now, 0), kTile));
    }
    device::mbarrier_arrive(barrier(kFullGate));
  }

  // Copies the fresh rows of this warp's slots. Where a head starts, slots without a key are
  // zeroed: what the head before left there must not meet this one's weights of 0.
  __device__ __forceinline__ void copy_rows(Cursor const& c, int base, char const* rows,
                                            std::int64_t stride_batch, std::int64_t stride_head,
                                            std::int64_t stride_position) {
    constexpr int kLanes = kDim / 8;    // lanes a row, 16 bytes each
    constexpr int kRows = 32 / kLanes;  // rows at a time
    rows += batch_coordinate(c) * stride_batch + c.kv_head * stride_head +
            c.tiles.first_k * stride_position;
    int const chunk = lane_ % kLanes;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      int const key = expiry_[i] > c.t * kTile ? key_[i] : -1;
      std::uint32_t mask = __ballot_sync(~0u, fresh_[i]);
      while (mask) {
        int from = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          int const next = mask ? __ffs(mask) - 1 : from;
          mask &= mask - 1;
          if (r == 0 || lane_ / kLanes >= r) from = next;
        }
        int const j = __shfl_sync(~0u, key, from);
        bool const valid = j >= 0 && chunk * 8 < p_.head_dim;
        device::cp_async_16(chunk_address(base + i * L::kBlockBytes, warp_ * 32 + from, chunk),
                            valid ? rows + j * stride_position + chunk * 16 : rows, valid);
      }
    }
    device::cp_async_wait_all();
    device::fence_async_proxy();
  }

  Params const& p_;
  std::uint32_t const smem_;
  char* const generic_;
  int const tid_, lane_, warp_;
  int fills_q_ = 0, fills_window_ = 0, fills_slots_ = 0;
  int expiry_[kBlocks] = {}, key_[kBlocks] = {};
  float score_[kBlocks] = {};
  bool fresh_[kBlocks] = {};
  int next_expiry_ = 0;
  float next_tau_ = 0.f;
};

}  // namespace sparsek::cuda::sm90
