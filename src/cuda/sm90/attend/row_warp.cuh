// The producer warps that copy the slots' rows: one for K, one for V.
#pragma once
#include "cuda/sm90/attend/role.cuh"

namespace sparsek::cuda::sm90 {

template <int kDim>
class RowWarp : Role<kDim> {
  using Base = Role<kDim>;
  using Base::batch_coordinate, Base::enters_early, Base::has_early_tile, Base::wait_empty;
  using Base::kLanes, Base::kRows, Base::load_tile, Base::load_values, Base::tile_of;
  using Base::p_, Base::smem_, Base::early_tiles_, Base::lane, Base::arrive, Base::barrier;
  using typename Base::L;

 public:
  // The third producer warp takes K, the fourth V. NOTE: the same code for both, not two
  // instantiations: the instructions of all roles and the consumers' have to fit their cache.
  __device__ __forceinline__ RowWarp(Params const& p, std::uint32_t smem, char* generic)
      : Base(p, smem, generic) {
    is_values_ = __shfl_sync(~0u, threadIdx.x >> 5, 0) == 3;
    full_ = is_values_ ? kFullSlotV : kFullSlotK;
    empty_ = is_values_ ? kEmptySlotV : kEmptySlotK;
    full_head_ = is_values_ ? kFullHeadV : kFullHeadK;
    base_ = is_values_ ? L::kValues : L::kKeys;
    chunk_base_ = smem + base_ + lane() % kLanes / 8 * L::kHalfBytes;
    chunk_exists_ = lane() % kLanes * 8 < p.head_dim;
    stride_ = is_values_ ? p.stride_v_position : p.stride_k_position;
  }

  __device__ __forceinline__ void run(Cursor cursor) {
    if (p_.num_blocks == 0) return;
    bool new_head = true, early = false, filled = false;
    do {
      if (new_head) {
        early = enters_early(cursor), filled = false;
        find_rows(cursor);
        if (early) start_head(cursor);
      }
      if (cursor.t >= 2) {
        int const list = fills_ & 1;
        device::mbarrier_wait(barrier(kFullRows + list), fills_ >> 1 & 1);
        wait_empty(empty_, uses_);
        if (filled || early)
          copy_entering(cursor.t, list);
        else
          copy_start();
        device::cp_async_wait_all();
        device::fence_async_proxy();
        if (!filled && early) wait_for_tiles();
        filled = true;
        __syncwarp();
        if (lane() == 0) {
          device::mbarrier_arrive(barrier(full_));
          device::mbarrier_arrive(barrier(kEmptyRows + list));
        }
        ++fills_, ++uses_;
      }
      if (!cursor.advance_keys(p_, new_head)) return;
      // A head of one or two tiles used the blocks of slots, too.
      if (new_head && !filled) ++uses_;
    } while (true);
  }

 private:
  // The head's rows, this lane's 16 bytes.
  __device__ __forceinline__ void find_rows(Cursor const& c) {
    int const b = batch_coordinate(c);
    rows_ = (is_values_ ? p_.v_rows + b * p_.stride_v_batch + c.kv_head * p_.stride_v_head
                        : p_.k_rows + b * p_.stride_k_batch + c.kv_head * p_.stride_k_head) +
            c.tiles.first_k * stride_ + (chunk_exists_ ? lane() % kLanes * 16 : 0);
  }
  // A head entered early: its first tiles, as far as the range has them; zeros in the other blocks
  // (what the head before left there must not meet this one's weights of 0).
  __device__ __forceinline__ void start_head(Cursor const& c) {
    wait_empty(empty_, uses_);
    loaded_ = 0;
#pragma unroll 1
    for (int tile = 0; tile < early_tiles_; ++tile) {
      if (!has_early_tile(c, tile)) break;
      loaded_ |= 1 << tile, phases_ ^= 1 << tile;
      int const base = base_ + tile * L::kBlockBytes;
      if (is_values_) {
        load_values(full_head_ + tile, base, tile_of(c, tile));
      } else if (lane() == 0) {
        load_tile(&p_.k, full_head_ + tile, base, tile_of(c, tile));
      }
    }
#pragma unroll 1
    for (int slot = early_tiles_ * kTile; slot < p_.num_blocks * kTile; slot += kRows) {
      copy_chunk(slot + lane() / kLanes, -1);
    }
    __syncwarp();
  }
  // Until they are there.
  __device__ __forceinline__ void wait_for_tiles() const {
#pragma unroll 1
    for (int tile = 0; tile < early_tiles_; ++tile) {
      if (loaded_ >> tile & 1) {
        device::mbarrier_wait(barrier(full_head_ + tile), phases_ >> tile & 1 ^ 1);
      }
    }
  }

  // A lane's 16 bytes of a row to a slot; zeros for key -1.
  __device__ __forceinline__ void copy_chunk(int slot, int key) const {
    std::uint32_t const target = chunk_base_ + (slot >> 7) * L::kBlockBytes + (slot & 127) * 128 +
                                 ((lane() % kLanes ^ slot) % 8 << 4);
    bool const valid = chunk_exists_ && key >= 0;
    device::cp_async_16(target, valid ? rows_ + key * stride_ : rows_, valid);
  }
  __device__ __forceinline__ void copy_entering(int t, int list) const {
    std::uint16_t const* const entries =
        Base::template at<std::uint16_t>(L::kRowList) + list * kTile;
    int const count = Base::template at<int>(L::kRowCount)[list];
#pragma unroll 1
    for (int i = lane() / kLanes; i < count; i += kRows) {
      int const entry = entries[i];
      copy_chunk(entry >> 7, (t - 2) * kTile + (entry & 127));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void copy_start() const {
    int const* const keys = Base::template at<int>(L::kStart);
#pragma unroll 2
    for (int slot = lane() / kLanes; slot < p_.num_blocks * kTile; slot += kRows) {
      copy_chunk(slot, keys[slot]);
    }
  }

  bool is_values_;
  int full_, empty_, full_head_, base_;
  std::uint32_t chunk_base_;
  bool chunk_exists_;  // beyond head_dim lie zeros
  std::int64_t stride_;
  char const* rows_ = nullptr;
  int fills_ = 0;
  int uses_ = 0;    // of the blocks of slots: fills, and heads without a fill
  int loaded_ = 0;  // early tiles (bits) of this head that were loaded
  int phases_ = 0;  // parity of the number of times that each was
};

}  // namespace sparsek::cuda::sm90
