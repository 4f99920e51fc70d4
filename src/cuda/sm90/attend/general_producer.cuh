// The producer warpgroup in general mode: bulk copies of Q and of the window slot, and the slots:
// who leaves, who enters, scores, copies.
//
// Keys are admitted to the next tile's slots between the copy of the diagonal tile's K and that of
// its V, when the consumers have not yet given back the place of V. What it shares with the
// backward's producer (addresses, barriers, taking a key, scores) is inherited.
#pragma once
#include "cuda/device/cp_async.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/producer.cuh"
#include "cuda/sm90/attend/schedule.cuh"

namespace sparsek::cuda::sm90 {

template <int kDim>
class GeneralProducer : Producer<kDim, Mode::kGeneral> {
  using Base = Producer<kDim, Mode::kGeneral>;
  using L = Layout<kDim, Mode::kGeneral>;
  static constexpr int kBlocks = L::kMaxBlocks;
  static constexpr int kScan = 2;  // loads in flight where a range starts in mid-head
  using Base::barrier, Base::batch_coordinate, Base::chunk_address, Base::chunk_row;
  using Base::copy_partial_block, Base::expiry_row, Base::gate_place, Base::load_block;
  using Base::expiry_, Base::fills_q_, Base::fills_slots_, Base::fills_window_, Base::fresh_;
  using Base::key_, Base::lane_, Base::next_expiry_, Base::p_, Base::score_;
  using Base::mbarrier_wait_empty, Base::prefetch, Base::releases_last, Base::score_at;
  using Base::smem_, Base::take_key, Base::tid_, Base::warp_;
  using Base::wait_empty_together, Base::write_slot_scores;

 public:
  using Base::Base;

  // Works through the range that starts at `cursor`, which is not empty.
  __device__ __forceinline__ void run(Cursor cursor) {
    bool fresh = true;     // whether the tile's first block has to be filled
    bool started = false;  // whether the slots hold this head's keys
    fill_q(cursor, fresh);
    for (;;) {
      int const t = cursor.t;
      int const first = t == 0 || cursor.g & 1 ? t : t - 1, last = 2 * t - 1 - first;
      bool const more = cursor.has_next(p_);
      // Whether the next tile is this head's next: then keys move into the slots.
      bool const moves = more && cursor.g + 1 == p_.group && t + 1 < cursor.tiles.end && t >= 1 &&
                         p_.num_blocks > 0;
      if (fresh) fill_window_keys(cursor, first), fill_window_values(cursor, first);
      if (!started) {
        start_slots(cursor);
        started = true;
      }
      // In the order in which the consumers give places back; what needs none of them in between.
      if (t > 0) fill_window_keys(cursor, last);
      if (moves) {
        admit(cursor, t + 1);
        prefetch(cursor, t + 2);
      }
      if (t > 0) fill_window_values(cursor, last);
      fresh = releases_last(cursor);

      if (!more) break;
      if (cursor.advance(p_)) started = false;
      fill_q(cursor, fresh);
      if (moves) copy_slots(cursor);
    }
  }

 private:
  template <typename T>  // a using-declaration would not say that it is a template
  __device__ __forceinline__ T* at(int offset) const {
    return Base::template at<T>(offset);
  }

  // --- Q and the plan ----------------------------------------------------------------------------
  __device__ __forceinline__ void fill_q(Cursor const& c, bool first_is_fresh) {
    // Another warp than the window slot's, so that neither waits for the other's places.
    if (tid_ == 32) {
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
                   (!more || c.g + 1 == p_.group ? kReleaseSlots : 0) | (more ? kMore : 0) |
                   (begin == 0 && plan.row_end >= 64 ? kLowerWhole : 0) |
                   (begin <= 64 && plan.row_end >= 128 ? kUpperWhole : 0) |
                   plan.num_blocks << kBlocksShift;
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
  // Beyond the sequence lie other sequences' keys, or memory that must not be used: such rows of V
  // are zeroed (their weight is 0, and 0 * NaN is not). Beyond the tensor the copy engine does that
  // itself. Rows of K need no care in the forward: their scores are masked.
  __device__ __forceinline__ bool is_partial(Cursor const& c, int tile) const {
    return (p_.lengths || p_.cu_seqlens_k) && (tile + 1) * kTile > c.tiles.valid;
  }
  __device__ __forceinline__ void fill_window_keys(Cursor const& c, int tile) {
    if (tid_ == 0) {
      if (fills_window_) mbarrier_wait_empty(kEmptyWindowK, fills_window_);
      load_block(&p_.k, kFullWindowK, L::kWindowK, c.tiles.first_k + tile * kTile, c);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void fill_window_values(Cursor const& c, int tile) {
    bool const partial = is_partial(c, tile);
    float score = 0.f;
    int seen_until = 0;
    if (tile * kTile + tid_ < c.tiles.valid) {
      seen_until = p_.expiry[expiry_row(c) + tile * kTile + tid_];
      if (p_.gated) score = p_.scores[score_at(c, tile * kTile + tid_)];
    }
    wait_empty_together(kEmptyWindowV);
    int const place = gate_place(tid_);
    at<float>(L::kWindowScore)[place] = score;
    at<std::uint16_t>(L::kWindowExpiry)[place] =
        static_cast<std::uint16_t>(min(max(seen_until - tile * kTile, 0), 2 * kTile));
    if (partial) {
      copy_partial_block(L::kWindowV, p_.v_rows, p_.stride_v_batch, p_.stride_v_head,
                         p_.stride_v_position, tile, c);
    }
    device::named_barrier_sync(kProducerBarrier, 128);
    if (tid_ == 0) {
      if (partial) {
        device::mbarrier_arrive(barrier(kFullWindowV));
      } else {
        if (fills_window_) mbarrier_wait_empty(kEmptyWindowV, fills_window_);
        load_block(&p_.v, kFullWindowV, L::kWindowV, c.tiles.first_k + tile * kTile, c);
      }
    }
    ++fills_window_;
    __syncwarp();
  }

  // A new head, perhaps in its middle: finds the keys before the window tile that are alive at the
  // cursor's tile.
  __device__ __forceinline__ void start_slots(Cursor const& c) {
    if (p_.num_blocks == 0) return;
    int const t = c.t;
    // NOTE: all of the state, so that the scan has its registers.
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      expiry_[i] = key_[i] = 0, score_[i] = 0.f;
      fresh_[i] = i < p_.num_blocks;
    }
    if (t >= 2) {
      // The lists, one for each warp, go where K will be, once nobody reads it any more.
      if (fills_slots_) mbarrier_wait_empty(kEmptySlotK, fills_slots_);
      int const* const lists = at<int>(L::kSlotK);
      auto* const counts = at<int volatile>(L::kCounts);
      int const found = list_alive(p_.expiry + expiry_row(c), (t - 1) * kTile, t * kTile,
                                   at<int>(L::kSlotK) + warp_ * L::kSlots);
      if (lane_ == 0) counts[warp_] = found;
      device::named_barrier_sync(kProducerBarrier, 128);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        if (i >= p_.num_blocks) break;
        int from = 0, place = i * kTile + tid_;
        while (from < 4 && place >= counts[from]) place -= counts[from++];
        if (from < 4) take_key(c, i, lists[from * L::kSlots + place]);
      }
      device::named_barrier_sync(kProducerBarrier, 128);
      copy_slots(c);
    }
    prefetch(c, max(t + 1, 2));
  }

  // This warp's quarter of the keys before `end` that expire after `now`: lists them, returns how
  // many there are (at most what fits).
  __device__ __forceinline__ int list_alive(std::int32_t const* row, int end, int now,
                                            int* list) const {
    int count = 0;
    auto const append = [&](int key, bool alive) {
      std::uint32_t const mask = __ballot_sync(~0u, alive);
      int const place = count + __popc(mask & ((1u << lane_) - 1));
      if (alive && place < L::kSlots) list[place] = key;
      count = min(count + __popc(mask), L::kSlots);
    };
    // Four keys at a time where a load can be aligned; a few keys at both ends remain.
    int const lead = min(static_cast<int>(-reinterpret_cast<std::uintptr_t>(row) >> 2 & 3), end);
    int const groups = (end - lead) >> 2, tail = lead + 4 * groups;
    int const edge = lane_ < lead ? lane_ : tail + lane_ - lead;
    bool const at_edge = warp_ == 0 && edge < end && (lane_ < lead || lane_ - lead < 4);
    append(edge, at_edge && row[at_edge ? edge : 0] > now);
    auto const* const quads = reinterpret_cast<int4 const*>(row + lead);
    int const first = groups * warp_ / 4, last = groups * (warp_ + 1) / 4;
#pragma unroll 1
    for (int at = first; at < last; at += 32 * kScan) {
      int4 e[kScan];
#pragma unroll
      for (int i = 0; i < kScan; ++i) {
        int const n = at + 32 * i + lane_;
        e[i] = n < last ? quads[n] : make_int4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kScan; ++i) {
        int const key = lead + 4 * (at + 32 * i + lane_);
        if (!__any_sync(~0u, max(max(e[i].x, e[i].y), max(e[i].z, e[i].w)) > now)) continue;
        append(key, e[i].x > now), append(key + 1, e[i].y > now);
        append(key + 2, e[i].z > now), append(key + 3, e[i].w > now);
      }
    }
    __syncwarp();
    return count;
  }

  // The prefetched keys that `tile` sees take the place of keys that it no longer sees.
  __device__ __forceinline__ void admit(Cursor const& c, int tile) {
    std::uint32_t const lower = (1u << lane_) - 1;
    int const now = tile * kTile;
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
        take_key(c, i, (tile - 2) * kTile + queue[rank]);
      }
      rank_base += static_cast<int>(total >> (8 * i + 8) & 255);
    }
  }

  // Rows for the cursor's tile, as soon as the consumers are done with the tile before.
  __device__ __forceinline__ void copy_slots(Cursor const& c) {
    if (fills_slots_) mbarrier_wait_empty(kEmptySlotK, fills_slots_);
    copy_rows(c, L::kSlotK, p_.k_rows, p_.stride_k_batch, p_.stride_k_head, p_.stride_k_position);
    device::mbarrier_arrive(barrier(kFullSlotK));
    if (fills_slots_) mbarrier_wait_empty(kEmptySlotV, fills_slots_);
    write_slot_scores(c);
    copy_rows(c, L::kSlotV, p_.v_rows, p_.stride_v_batch, p_.stride_v_head, p_.stride_v_position);
    device::mbarrier_arrive(barrier(kFullSlotV));
    ++fills_slots_;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) fresh_[i] &= i >= slot_blocks(c.t, p_.num_blocks);
  }

  // Copies the fresh rows of this warp's slots. Where a head starts, slots without a key are
  // zeroed: what the head before left there must not meet this one's weights of 0.
  __device__ __forceinline__ void copy_rows(Cursor const& c, int base, char const* rows,
                                            std::int64_t stride_batch, std::int64_t stride_head,
                                            std::int64_t stride_position) {
    // Four lanes a row: a load fetches 64 bytes each of up to 8 rows.
    rows += batch_coordinate(c) * stride_batch + c.kv_head * stride_head +
            c.tiles.first_k * stride_position;
    int const quad = lane_ & 3;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i >= slot_blocks(c.t, p_.num_blocks)) break;  // the others wait until they are in use
      std::uint32_t const fresh = __ballot_sync(~0u, fresh_[i]);
      int const key = expiry_[i] > c.t * kTile ? key_[i] : -1;
#pragma unroll 1
      for (int first = 0; first < 32; first += 8) {
        if (!(fresh >> first & 255)) continue;
        int const from = first + (lane_ >> 2);
        int const j = __shfl_sync(~0u, key, from);
        if (!(fresh >> from & 1)) continue;
        char const* const source = j >= 0 ? rows + j * stride_position + quad * 16 : rows;
        std::uint32_t const to = chunk_address(base + i * L::kBlockBytes, warp_ * 32 + from, quad);
#pragma unroll
        for (int k = 0; k < kDim / 32; ++k) {
          bool const valid = j >= 0 && (quad + 4 * k) * 8 < p_.head_dim;
          device::cp_async_16((to ^ (k & 1) * 64) + (k >> 1) * L::kHalfBytes,
                              valid ? source + k * 64 : rows, valid);
        }
      }
    }
    device::cp_async_wait_all();
    device::fence_async_proxy();
  }
};

}  // namespace sparsek::cuda::sm90
