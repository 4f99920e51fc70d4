// The producer warp that runs the copy engine: queries, outputs and the window slot; and the plan of
// every tile.
#pragma once
#include "cuda/sm90/attend/role.cuh"

namespace sparsek::cuda::sm90 {

template <int kDim>
class BulkWarp : Role<kDim> {
  using Base = Role<kDim>;
  using Base::load_tile, Base::load_values, Base::tile_of;
  using Base::p_, Base::smem_, Base::early_tiles_, Base::lane, Base::barrier;
  using Base::wait_empty, Base::batch_coordinate, Base::enters_early, Base::has_early_tile;
  using typename Base::L;
  static constexpr int kNone = -1;

 public:
  __device__ __forceinline__ BulkWarp(Params const& p, std::uint32_t smem, char* generic)
      : Base(p, smem, generic) {}

  // Works through the range that starts at `cursor`.
  __device__ __forceinline__ void run(Cursor cursor) {
    // In the order in which the consumers free things, so that no wait holds up another: keys for a
    // tile, queries for the next one, values for this one.
    WindowLoad loads[2] = {};
    bool new_head = true, more = true;
    for (;;) {
      if (more) {
        if (new_head) enter_head(cursor);
        start_tile(cursor);
      }
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        if (loads[0].exists) load_window_values(loads[0]);
        loads[0] = loads[1];
      }
      if (!more) break;
      Blocks const b = blocks_of(cursor.t, cursor.g);
      int tile = b.first, place = b.first_place;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        WindowLoad const w = {tile_of(cursor, tile), place == L::kWindow && held_ != tile};
        if (w.exists) {
          load_window_keys(w);
          held_ = tile;
        }
        loads[0] = loads[1], loads[1] = w;
        tile = b.last, place = b.last_place;
      }
      more = cursor.has_next(p_);
      if (more) new_head = cursor.advance(p_);
    }
    finish();
  }

 private:
  struct WindowLoad {
    typename Base::KeyTile tile;
    bool exists;
  };
  // A tile's first and last block, in tiles of keys and in places.
  struct Blocks {
    int first, last, first_place, last_place;
  };
  __device__ __forceinline__ int place_of(int tile) const {
    return early_ && tile < early_tiles_ ? tile : L::kWindow;
  }
  __device__ __forceinline__ Blocks blocks_of(int t, int g) const {
    int const first = t == 0 || (g & 1) ? t : t - 1, last = t == 0 ? 0 : 2 * t - 1 - first;
    return {first, last, place_of(first), place_of(last)};
  }

  __device__ __forceinline__ void enter_head(Cursor const& c) {
    early_ = enters_early(c);
    held_ = kNone;
    unseen_ = 0;
    for (int tile = 0; tile < early_tiles_; ++tile) {
      if (early_ && has_early_tile(c, tile)) unseen_ |= 1 << tile, head_phases_ ^= 1 << tile;
    }
  }

  // The queries of the cursor's tile, where the output of the tile before the last has been, and the
  // plan.
  __device__ __forceinline__ void start_tile(Cursor const& c) {
    Blocks const b = blocks_of(c.t, c.g);
    bool const single = c.t == 0;
    bool const first_in = b.first_place == L::kWindow;
    bool const last_in = b.last_place == L::kWindow && !single;
    int flags = 0, fills = window_keys_;
    if (first_in ? held_ != b.first : unseen_ >> b.first_place & 1) {
      int const phase = first_in ? fills++ : head_phases_ >> b.first_place ^ 1;
      flags |= kFirstIsFresh | (phase & 1 ? kFirstPhase : 0);
      if (!first_in) unseen_ &= ~(1 << b.first_place);
    }
    if (!single &&
        (last_in ? (first_in ? b.first : held_) != b.last : unseen_ >> b.last_place & 1)) {
      int const phase = last_in ? fills : head_phases_ >> b.last_place ^ 1;
      flags |= kLastIsFresh | (phase & 1 ? kLastPhase : 0);
      if (!last_in) unseen_ &= ~(1 << b.last_place);
    }
    // What the window slot is used for next, in the same head.
    bool const more = c.has_next(p_), last_of_group = c.g + 1 == p_.group;
    bool const ends_head = !more || (last_of_group && c.t + 1 == c.tiles.end);
    int later = kNone;
    if (!ends_head) {
      Blocks const n = last_of_group ? blocks_of(c.t + 1, 0) : blocks_of(c.t, c.g + 1);
      later = n.first_place == L::kWindow ? n.first : n.last_place == L::kWindow ? n.last : kNone;
    }
    if (first_in && (last_in ? b.last : later) != b.first) flags |= kReleaseFirst;
    if (single ? first_in && later != b.first : last_in && later != b.last) flags |= kReleaseLast;

    int const blocks = slot_blocks(c.t, p_.num_blocks);
    int const begin = max(0, c.tiles.q_offset - c.t * kTile);
    int const end = min(kTile, c.tiles.valid - c.t * kTile);
    flags |= (tiles_ & 1 ? kSwapHalves : 0) | (single ? kSingle : 0) |
             (b.first == c.t ? kDiagonalFirst : 0) | (more ? kMore : 0) |
             (ends_head || (last_of_group && blocks > 0) ? kReleaseSlots : 0) |
             (blocks == 0 || !last_in ? kReleaseLate : 0) |
             (blocks > 0 && (tiles_ == 0 || c.g == 0) ? kSlotsFresh : 0) |
             (begin == 0 && end >= 64 ? kLowerWhole : 0) |
             (begin <= 64 && end == kTile ? kUpperWhole : 0) | blocks << kBlocksShift |
             b.first_place << kFirstPlaceShift | b.last_place << kLastPlaceShift;
    if (lane() == 0) {
      exchange_outputs();
      int const position = c.tiles.first_q + c.t * kTile - c.tiles.q_offset;
      int const q_head = c.kv_head * p_.group + c.g;
      TilePlan& plan = Base::template at<TilePlan>(L::kPlans)[tiles_ & 1];
      plan.tile = c.t, plan.num_blocks = blocks, plan.flags = flags;
      plan.batch = batch_coordinate(c), plan.q_head = q_head, plan.q_position = position;
      plan.row_begin = begin, plan.row_end = end;
      plan.lse_offset = plan.batch * p_.stride_lse_batch + q_head * p_.stride_lse_head +
                        position * p_.stride_lse_position;
#pragma unroll 1
      for (int wg = 0; wg < 2; ++wg) {
        std::uint32_t const full = barrier(kFullQ + wg);
        device::mbarrier_arrive_expect(full, L::kQBytes);
#pragma unroll 1
        for (int half = 0; half < kDim / 64; ++half) {
          device::tma_load_once(smem_ + L::kQ + wg * L::kQBytes + half * (64 * 128), &p_.q, full,
                                half * 64, position + 64 * (wg ^ (tiles_ & 1)), q_head, plan.batch,
                                device::evict_first_policy());
        }
      }
    }
    __syncwarp();
    ++tiles_;
  }

  // Takes back the queries' buffers. With them come, from the second time on, outputs of the tile
  // before the one whose queries were there.
  __device__ __forceinline__ void exchange_outputs() const {
    if (tiles_ == 0) return;
    TilePlan const& old = Base::template at<TilePlan>(L::kPlans)[tiles_ & 1];
#pragma unroll 1
    for (int wg = 0; wg < 2; ++wg) {
      wait_empty(kEmptyQ + wg, tiles_);
      if (tiles_ > 1) store_output(old, wg);
    }
    if (tiles_ > 1) {
      device::tma_store_commit();
      device::tma_store_wait_read();
    }
  }
  // A warpgroup's 64 rows, if they all exist; else it has stored them itself.
  __device__ __forceinline__ void store_output(TilePlan const& old, int wg) const {
    int const upper = wg ^ (old.flags & kSwapHalves ? 1 : 0);
    if (!(old.flags & (upper ? kUpperWhole : kLowerWhole))) return;
#pragma unroll 1
    for (int half = 0; half < kDim / 64; ++half) {
      device::tma_store_once(&p_.out, smem_ + L::kQ + wg * L::kQBytes + half * (64 * 128),
                             half * 64, old.q_position + 64 * upper, old.q_head, old.batch,
                             device::evict_first_policy());
    }
  }
  // The last two tiles' outputs.
  __device__ __forceinline__ void finish() {
    if (lane() == 0) {
      exchange_outputs();
      for (int wg = 0; wg < 2; ++wg) device::mbarrier_arrive(barrier(kFullQ + wg));
      TilePlan const& last = Base::template at<TilePlan>(L::kPlans)[(tiles_ - 1) & 1];
      for (int wg = 0; wg < 2; ++wg) {
        wait_empty(kEmptyQ + wg, tiles_ + 1);
        store_output(last, wg);
      }
      device::tma_store_commit();
      device::tma_store_wait();
    }
  }

  __device__ __forceinline__ void load_window_keys(WindowLoad const& w) {
    if (lane() == 0) {
      wait_empty(kEmptyWindowK, window_keys_);
      load_tile(&p_.k, kFullWindowK, L::kKeys + L::kWindow * L::kBlockBytes, w.tile);
    }
    ++window_keys_;
    __syncwarp();
  }
  __device__ __forceinline__ void load_window_values(WindowLoad const& w) {
    wait_empty(kEmptyWindowV, window_values_);
    load_values(kFullWindowV, L::kValues + L::kWindow * L::kBlockBytes, w.tile);
    ++window_values_;
  }

  bool early_ = false;
  int held_ = kNone;     // the tile that the window slot holds, or will
  int unseen_ = 0;       // early tiles (bits) that no plan has named yet
  int head_phases_ = 0;  // parity of the number of times that each early tile was loaded
  int tiles_ = 0, window_keys_ = 0, window_values_ = 0;
};

}  // namespace sparsek::cuda::sm90
