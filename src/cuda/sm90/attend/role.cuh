// What the producer warps of the aligned mode have in common. Each has one job and walks the
// range's tiles by itself:
//   bulk_warp.cuh   queries, outputs and the window slot, by the copy engine
//   slot_warp.cuh   who is in the slots, and the gates
//   row_warp.cuh    the slots' rows, one warp for K and one for V
#pragma once
#include "cuda/device/cp_async.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/schedule.cuh"

namespace sparsek::cuda::sm90 {

// A head that is entered at one of its first tiles has tiles 0 ... early_tiles - 1 in the slots'
// blocks, where their keys stay while they live. Entered later, its slots come from a list.
__device__ __forceinline__ int early_tiles(Params const& p) { return min(2, p.num_blocks); }
__device__ __forceinline__ int last_early_tile(Params const& p) { return early_tiles(p) + 1; }

template <int kDim>
class Role {
 protected:
  using L = AlignedLayout<kDim>;

  __device__ __forceinline__ Role(Params const& p, std::uint32_t smem, char* generic)
      : p_(p), smem_(smem), generic_(generic), early_tiles_(early_tiles(p)) {}

  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return smem_ + L::kBarriers + i * 8;
  }
  template <typename T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(generic_ + offset);
  }
  __device__ __forceinline__ void arrive(int i) const {
    __syncwarp();
    if (lane() == 0) device::mbarrier_arrive(barrier(i));
  }
  // Before fill number `fills` (from 0) of what `empty` guards. NOTE: every role waits at every fill
  // that it makes, in order, so a parity never means another phase.
  __device__ __forceinline__ void wait_empty(int empty, int fills) const {
    if (fills) device::mbarrier_wait(barrier(empty), (fills - 1) & 1);
  }

  __device__ __forceinline__ int batch_coordinate(Cursor const& c) const {
    return p_.cu_seqlens_k ? 0 : c.sequence;
  }
  __device__ __forceinline__ bool enters_early(Cursor const& c) const {
    return c.t <= last_early_tile(p_);
  }
  // Of those tiles, whether one is in the range of a head that is entered at `c`.
  __device__ __forceinline__ bool has_early_tile(Cursor const& c, int tile) const {
    if (tile <= c.t) return true;
    // Only tile 1 can lie ahead, of a cursor at tile 0.
    return tile < c.tiles.end && c.left > tile_cost(0, p_.num_blocks) * (p_.group - c.g);
  }

  // Shared address of 16 bytes of a row at `base`: halves of 64 columns, 128-byte swizzle.
  __device__ __forceinline__ std::uint32_t chunk_address(int base, int row, int chunk) const {
    return smem_ + base + (chunk >> 3) * L::kHalfBytes + row * 128 +
           (((chunk & 7) ^ (row & 7)) << 4);
  }
  static constexpr int kLanes = kDim / 8;    // lanes a row, 16 bytes each
  static constexpr int kRows = 32 / kLanes;  // rows at a time

  // A tile of keys as the copies see it. Where other sequences' keys, or memory that must not be
  // used, follow in the tile, `valid` is less than kTile; those rows of V are zeroed: their weight is
  // 0, and 0 * NaN is not. Beyond the tensor the copy engine does that itself. Rows of K need no
  // care: their scores are masked.
  struct KeyTile {
    int position, valid, kv_head, batch;
  };
  __device__ __forceinline__ KeyTile tile_of(Cursor const& c, int tile) const {
    bool const differ = p_.lengths || p_.cu_seqlens_k;
    return {c.tiles.first_k + tile * kTile,
            differ ? min(kTile, c.tiles.valid - tile * kTile) : kTile, c.kv_head,
            batch_coordinate(c)};
  }
  // By the copy engine; one lane.
  __device__ __forceinline__ void load_tile(CUtensorMap const* map, int full, int base,
                                            KeyTile const& tile) const {
    device::mbarrier_arrive_expect(barrier(full), L::kBlockBytes);
#pragma unroll 1
    for (int half = 0; half < kDim / 64; ++half) {
      device::tma_load(smem_ + base + half * L::kHalfBytes, map, barrier(full), half * 64,
                       tile.position, tile.kv_head, tile.batch);
    }
  }
  // V of any tile, by the whole warp.
  __device__ __forceinline__ void load_values(int full, int base, KeyTile const& tile) const {
    if (tile.valid == kTile) {
      if (lane() == 0) load_tile(&p_.v, full, base, tile);
      __syncwarp();
      return;
    }
    char const* const rows = p_.v_rows + tile.batch * p_.stride_v_batch +
                             tile.kv_head * p_.stride_v_head + tile.position * p_.stride_v_position;
    int const chunk = lane() % kLanes;
#pragma unroll 1
    for (int r = lane() / kLanes; r < kTile; r += kRows) {
      bool const valid = r < tile.valid && chunk * 8 < p_.head_dim;
      device::cp_async_16(chunk_address(base, r, chunk),
                          valid ? rows + r * p_.stride_v_position + chunk * 16 : rows, valid);
    }
    device::cp_async_wait_all();
    device::fence_async_proxy();
    arrive(full);
  }

  Params const& p_;
  std::uint32_t const smem_;
  char* const generic_;
  int const early_tiles_;
};

// Keys of the slots where a head is entered late: all that lie in tiles before the cursor's window
// tile and are alive at its first query, then -1. By all threads of the block where a range begins,
// by one warp where a later head does. `tid`: among kNumThreads.
template <int kDim, int kNumThreads>
__device__ __forceinline__ void find_start_keys(Params const& p, char* generic, Cursor const& c,
                                                int tid) {
  using L = AlignedLayout<kDim>;
  constexpr int kWarps = kNumThreads / 32;
  int* const list = reinterpret_cast<int*>(generic + L::kStart);
  std::int32_t const* const row = p.expiry + c.sequence * p.stride_expiry_batch +
                                  c.kv_head * p.stride_expiry_head + c.tiles.first_k;
  int const end = (c.t - 1) * kTile, now = c.t * kTile, capacity = p.num_blocks * kTile;
  int const lane = tid & 31, warp = tid >> 5;
  int count = 0;
#pragma unroll 16
  for (int j = tid; j < end; j += kNumThreads) count += row[j] > now;
  int inclusive = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int const other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  int place = inclusive - count, total = 0;
  if constexpr (kWarps == 1) {
    total = __shfl_sync(~0u, inclusive, 31);
  } else {
    int* const counts = reinterpret_cast<int*>(generic + L::kScan);
    if (lane == 31) counts[warp] = inclusive;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += counts[w];
      total += counts[w];
    }
  }
#pragma unroll 16
  for (int j = tid; j < end; j += kNumThreads) {
    if (row[j] > now) {
      if (place < capacity) list[place] = j;
      ++place;
    }
  }
  for (int i = total + tid; i < capacity; i += kNumThreads) list[i] = -1;
}

}  // namespace sparsek::cuda::sm90
