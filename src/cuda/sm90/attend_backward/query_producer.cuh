// The producer warpgroup of the query kernel: the forward's, but the rows of keys that enter the
// slots come K and V together. The consumers need both at once, and one after the other they would
// wait for two latencies.
#pragma once
#include "cuda/device/cp_async.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/sm90/attend/producer.cuh"

namespace sparsek::cuda::sm90::backward {

template <int kDim, Mode kMode>
class QueryProducer : Producer<kDim, kMode> {
  using Base = Producer<kDim, kMode>;
  using L = Layout<kDim, kMode>;
  static constexpr int kBlocks = L::kMaxBlocks;
  static constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
  using Base::admit, Base::barrier, Base::batch_coordinate, Base::fill_q, Base::fill_window;
  using Base::expiry_, Base::fills_slots_, Base::fresh_, Base::key_, Base::lane_, Base::p_;
  using Base::mbarrier_wait_empty, Base::prefetch, Base::releases_last, Base::start_slots;
  using Base::smem_, Base::warp_;
  using Base::write_gates, Base::write_slot_scores;

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

 private:
  // Gates and rows for the cursor's tile, as soon as the consumers are done with the tile before.
  __device__ __forceinline__ void fill_slots(Cursor const& c) {
    if (kMode == Mode::kAligned) write_gates(c);
    if (fills_slots_) {
      mbarrier_wait_empty(kEmptySlotK, fills_slots_);
      mbarrier_wait_empty(kEmptySlotV, fills_slots_);
    }
    if (kMode == Mode::kGeneral) write_slot_scores(c);
    copy_rows(c);
    device::mbarrier_arrive(barrier(kFullSlotK));
    device::mbarrier_arrive(barrier(kFullSlotV));  // last: the consumers wait for nothing else
    ++fills_slots_;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) fresh_[i] = false;
  }

  // Copies the rows that entered this warp's slots, 16 bytes a lane: as many lanes for V as for K.
  // Slots without a key are zeroed where a head starts, as in the forward.
  __device__ __forceinline__ void copy_rows(Cursor const& c) const {
    constexpr int kLanes = 2 * kChunks, kRows = 32 / kLanes;  // lanes a slot, slots at a time
    int const chunk = lane_ % kChunks;
    bool const is_value = lane_ / kChunks & 1, exists = chunk * 8 < p_.head_dim;
    std::int64_t const stride = is_value ? p_.stride_v_position : p_.stride_k_position;
    char const* first =
        is_value
            ? p_.v_rows + batch_coordinate(c) * p_.stride_v_batch + c.kv_head * p_.stride_v_head
            : p_.k_rows + batch_coordinate(c) * p_.stride_k_batch + c.kv_head * p_.stride_k_head;
    first += c.tiles.first_k * stride + (exists ? chunk * 16 : 0);
    asm volatile("" : "+l"(first));  // NOTE: else the compiler works it out anew for every row
    auto const bytes = static_cast<std::uint32_t>(stride);
    std::uint32_t const to = smem_ + (is_value ? L::kSlotV : L::kSlotK) +
                             (chunk >> 3) * L::kHalfBytes + warp_ * (32 * 128) + (chunk & 7) * 16;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      std::uint32_t mask = __ballot_sync(~0u, fresh_[i]);
      if (mask == 0) continue;
      int const key = expiry_[i] > c.t * kTile ? key_[i] : -1;
      do {
        int slot = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          int const next = r == 0 || mask ? __ffs(mask) - 1 : slot;
          mask &= mask - 1;
          if (r == 0 || lane_ / kLanes >= r) slot = next;
        }
        int const j = __shfl_sync(~0u, key, slot);
        std::uint32_t const row = max(j, 0);
        device::cp_async_16((to + i * L::kBlockBytes + slot * 128) ^ (slot & 7) << 4,
                            first + static_cast<std::uint64_t>(row) * bytes, exists && j >= 0);
      } while (mask);
    }
    device::cp_async_wait_all();
    device::fence_async_proxy();
  }
};

}  // namespace sparsek::cuda::sm90::backward
