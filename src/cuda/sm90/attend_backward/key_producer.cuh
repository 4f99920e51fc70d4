// The producer warpgroup of the key kernels: K and V of the resident keys, and the queries that
// pass by them.
#pragma once
#include <type_traits>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/device/wgmma_shared.cuh"
#include "cuda/sm90/attend_backward/config.hpp"
#include "cuda/sm90/attend_backward/key_schedule.cuh"

namespace sparsek::cuda::sm90::backward {

template <typename T, int kDim, Mode kMode>
class KeyProducer {
  using L = KeyLayout<kDim, kMode>;
  static constexpr int kBlocks = Layout<kDim, kMode>::kMaxBlocks;
  static constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
  static constexpr int kProducerBarrier = 5;
  static constexpr bool kGeneral = kMode == Mode::kGeneral;
  // Eight bits each: keys that enter, free slots of block 0, 1, ...
  using Counts = std::conditional_t<(kBlocks > 3), std::uint64_t, std::uint32_t>;

 public:
  __device__ __forceinline__ KeyProducer(BackwardParams const& p, std::uint32_t smem, char* generic)
      : p_(p),
        smem_(smem),
        generic_(generic),
        tid_(threadIdx.x & 127),
        lane_(threadIdx.x & 31),
        warp_((threadIdx.x & 127) >> 5) {}

  // One key tile after another; the first warp does everything.
  __device__ __forceinline__ void run_window() {
    if (warp_ != 0) return;
    int fills = 0;
    KeyTileCursor cursor;
    for (cursor.start(p_); !cursor.done(p_); cursor.advance()) {
      KeyTile const keys = cursor.tile(p_);
      if (!keys.exists || !keys.has_queries()) continue;
      if (lane_ == 0) {
        int const buffer = fills & 1;
        if (fills >= 2) wait(kEmptyKeys + buffer, fills / 2 - 1);
        std::uint32_t const full = barrier(kFullKeys + buffer);
        device::mbarrier_arrive_expect(full, L::kBufferBytes);
        int const position = keys.head.tiles.first_k + keys.tile * kTile;
        for (int c = 0; c < kDim / 64; ++c) {
          std::uint32_t const to = smem_ + buffer * L::kBufferBytes + c * L::kHalfBytes;
          device::tma_load(to, &p_.k, full, c * 64, position, keys.head.kv_head,
                           keys.head.batch_coordinate(p_));
          device::tma_load(to + L::kBlockBytes, &p_.v, full, c * 64, position, keys.head.kv_head,
                           keys.head.batch_coordinate(p_));
        }
      }
      __syncwarp();
      ++fills;
      for (int t = keys.begin(); t < keys.end(); ++t) stream_tile(keys.head, t);
    }
  }

  // The slots of a head, tile by tile: who leaves, who enters, gates, rows. Every block of a head
  // comes to the same result for all slots and copies the rows of its own 128.
  __device__ __forceinline__ void run_slots(SlotRange const& range) {
    KeyHead const& head = range.head;
    start_slots(range);
    int n = 0;                                             // tiles so far
    for (int t = range.first; t <= range.end; ++t, ++n) {  // at the end: everything leaves
      bool const last = t == range.end;
      std::uint32_t const buffer = n & 1;
      leave(t, last);
      if (t > range.first && !last) admit(head, t, range.block);
      if (n >= 2) wait(kEmptyKeys + buffer, n / 2 - 1);
      if (!last) copy_rows(head, buffer);
      fresh_ = fresher_, fresher_ = false;
      if (n >= 1) wait(kReadSlots, n - 1);
      write_slots(head, t, last);
      device::mbarrier_arrive(barrier(kFullKeys + buffer));
      if (t + 1 < range.end) prefetch(head, t + 1);
      if (!last && warp_ == 0 && range.uses(t)) stream_tile(head, t);
      __syncwarp();
    }
  }

 private:
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return smem_ + L::kBarriers + i * 8;
  }
  __device__ __forceinline__ void wait(int i, int phase) const {
    device::mbarrier_wait(barrier(i), phase & 1);
  }
  template <typename U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(generic_ + offset);
  }

  // --- queries -----------------------------------------------------------------------------------
  // Q and dO of a tile, for all query heads of the group, in pieces of 64 rows. One warp.
  __device__ __forceinline__ void stream_tile(KeyHead const& head, int t) {
    for (int g = 0; g < p_.group; ++g) {
      for (int half = 0; half < 2; ++half) {
        if (!head.has_piece(t, half)) continue;
        stream_piece(head, t, g, half);
        if (++stage_ == L::kStages) stage_ = 0, phase_ ^= 1;
      }
    }
  }
  __device__ __forceinline__ void stream_piece(KeyHead const& head, int t, int g, int half) {
    wait(kEmptyPiece + stage_, phase_ ^ 1);  // at once in the first round
    std::uint32_t const full = barrier(kFullPiece + stage_);
    std::uint32_t const to = smem_ + L::kPieces + stage_ * 2 * L::kPieceBytes;
    int const rows = L::kRows + stage_ * L::kRowBytes;
    int const position = head.tiles.first_q + t * kTile + half * kPiece - head.tiles.q_offset;
    int const q_head = head.kv_head * p_.group + g, batch = head.batch_coordinate(p_);
    int const begin = head.piece_begin(t, half), end = head.piece_end(t, half);
    bool const whole = begin == 0 && end == kPiece;
    float const* const row_data =
        p_.row_data + batch * p_.stride_row_batch + q_head * p_.stride_row_head + position;
    // What the query kernel left, by bulk copies of 16-byte aligned rows that all exist.
    if (whole && (position & 3) == 0) {
      if (lane_ == 0) {
        device::mbarrier_expect(full, L::kRowBytes + 2 * L::kPieceBytes);
        device::mbarrier_arrive(full, 1 + 32);
        for (int array = 0; array < row_arrays(kMode); ++array) {
          device::bulk_load(smem_ + rows + array * kPiece * 4,
                            row_data + array * p_.stride_row_array, kPiece * 4, full);
        }
        load_piece(to, full, position, q_head, batch);
      }
      __syncwarp();
      return;
    }
    // Else by ordinary copies; zeros where there is no query.
    for (int i = lane_; i < row_arrays(kMode) * kPiece; i += 32) {
      int const array = i / kPiece, r = i % kPiece;
      bool const exists = r >= begin && r < end;
      float const* const from = row_data + array * p_.stride_row_array + r;
      device::cp_async_4(smem_ + rows + i * 4, exists ? from : p_.row_data, exists);
    }
    // Beyond the tensor the copy engine writes zeros; rows of other sequences, or memory that must
    // not be used, are replaced by zeros here.
    if (!whole && (p_.lengths || p_.cu_seqlens_k)) {
      copy_piece_rows(to, p_.q_rows, p_.stride_q_batch, p_.stride_q_head, p_.stride_q_position,
                      q_head, batch, position, begin, end);
      copy_piece_rows(to + L::kPieceBytes, p_.dout_rows, p_.stride_dout_batch, p_.stride_dout_head,
                      p_.stride_dout_position, q_head, batch, position, begin, end);
      device::cp_async_wait_all();
      device::fence_async_proxy();
      device::mbarrier_arrive(full);
      if (lane_ == 0) device::mbarrier_arrive(full);
    } else {
      device::cp_async_mbarrier_arrive(full);
      if (lane_ == 0) {
        device::mbarrier_arrive_expect(full, 2 * L::kPieceBytes);
        load_piece(to, full, position, q_head, batch);
      }
    }
    __syncwarp();
  }
  __device__ __forceinline__ void load_piece(std::uint32_t to, std::uint32_t full, int position,
                                             int q_head, int batch) const {
    for (int c = 0; c < kDim / 64; ++c) {
      device::tma_load(to + c * L::kPieceHalfBytes, &p_.q, full, c * 64, position, q_head, batch);
    }
    for (int c = 0; c < kDim / 64; ++c) {
      device::tma_load(to + L::kPieceBytes + c * L::kPieceHalfBytes, &p_.dout, full, c * 64,
                       position, q_head, batch);
    }
  }
  __device__ __forceinline__ void copy_piece_rows(
      std::uint32_t to, char const* rows, std::int64_t stride_batch, std::int64_t stride_head,
      std::int64_t stride_position, int q_head, int batch, int position, int begin, int end) const {
    rows += batch * stride_batch + q_head * stride_head;
    for (int i = lane_; i < kPiece * kChunks; i += 32) {
      int const r = i / kChunks, chunk = i % kChunks;
      bool const valid = r >= begin && r < end && chunk * 8 < p_.head_dim;
      device::cp_async_16(
          to + (chunk >> 3) * L::kPieceHalfBytes + r * 128 + (((chunk & 7) ^ (r & 7)) << 4),
          valid ? rows + (position + r) * stride_position + chunk * 16 : rows, valid);
    }
  }

  // --- the slots ---------------------------------------------------------------------------------
  // Every thread owns one slot of each block: until when its key is seen; and of this block: the
  // key, its score, which of the two buffers lack its row.

  // The keys that are alive at the range's first tile, in the order of (key % 128, key), which
  // add_inherited searches.
  __device__ __forceinline__ void start_slots(SlotRange const& range) {
    KeyHead const& head = range.head;
    int const t = range.first;
    int* const list = at<int>(L::kPieces);  // no queries are there yet
    std::int32_t const* const row = p_.expiry + head.expiry_row(p_);
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
    total = min(total, capacity);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      int const slot = i * kTile + tid_;
      if (slot < total) {
        expiry_[i] = row[list[slot]];
        if (i == range.block) take_key(head, list[slot], expiry_[i]);
      }
    }
    if (range.segment > 0) {
      inherited_ = key_ >= 0;
      p_.inherited_keys[range.inherited_at(p_, tid_)] = key_;
    }
    fresh_ = false;
    device::fence_async_proxy();  // bulk copies follow in the list's place
    device::named_barrier_sync(kProducerBarrier, 128);
    if (range.first < range.end && p_.gated && !kGeneral) next_tau_ = threshold_of(head, t);
  }

  __device__ __forceinline__ void take_key(KeyHead const& head, int key, int expiry) {
    key_ = key, own_expiry_ = expiry, fresher_ = true, inherited_ = false;
    score_ = p_.gated ? p_.scores[head.score_at(p_, key)] : 0.f;
  }
  __device__ __forceinline__ float threshold_of(KeyHead const& head, int t) const {
    return p_.threshold[head.chunk_row(p_) + t * kTile / p_.chunk_size];
  }

  // Loads ahead what admission to tile t needs: keys of the tile that was the window of the tile
  // before.
  __device__ __forceinline__ void prefetch(KeyHead const& head, int t) {
    next_expiry_ = p_.expiry[head.expiry_row(p_) + (t - 2) * kTile + tid_];
    if (!kGeneral && p_.gated) next_tau_ = threshold_of(head, t);
  }

  // A key that tile t no longer sees leaves this thread's slot.
  __device__ __forceinline__ void leave(int t, bool last) {
    leaving_ = kNobody;
    if (key_ >= 0 && (last || own_expiry_ <= t * kTile)) {
      leaving_ = inherited_ ? kInherited : key_;
      key_ = -1;
    }
  }

  // The prefetched keys that tile t sees take the place of keys that it no longer sees.
  __device__ __forceinline__ void admit(KeyHead const& head, int t, int block) {
    std::uint32_t const lower = (1u << lane_) - 1;
    int const now = t * kTile;
    bool const enters = next_expiry_ > now;
    std::uint32_t const enter_mask = __ballot_sync(~0u, enters);
    std::uint32_t free_mask[kBlocks];
    Counts mine = __popc(enter_mask);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      free_mask[i] = __ballot_sync(~0u, i < p_.num_blocks && expiry_[i] <= now);
      mine |= static_cast<Counts>(__popc(free_mask[i])) << (8 * i + 8);
    }
    auto* const counts = at<Counts volatile>(L::kCounts);
    if (lane_ == 0) counts[warp_] = mine;
    device::named_barrier_sync(kProducerBarrier, 128);
    Counts before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w < warp_) before += counts[w];
      total += counts[w];
    }
    auto* const queue = at<std::uint8_t volatile>(L::kQueue);
    if (enters) {
      queue[(before & 255) + __popc(enter_mask & lower)] = static_cast<std::uint8_t>(tid_);
    }
    device::named_barrier_sync(kProducerBarrier, 128);
    int const entering = static_cast<int>(total & 255);
    std::int32_t const* const row = p_.expiry + head.expiry_row(p_);
    int rank_base = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      int const rank =
          rank_base + static_cast<int>(before >> (8 * i + 8) & 255) + __popc(free_mask[i] & lower);
      if ((free_mask[i] >> lane_ & 1) && rank < entering) {
        int const key = (t - 2) * kTile + queue[rank];
        expiry_[i] = row[key];
        if (i == block) take_key(head, key, expiry_[i]);
      }
      rank_base += static_cast<int>(total >> (8 * i + 8) & 255);
    }
  }

  // For whole rows of K and V, or of dK and dV, at once: lanes of 16 bytes, first those of K.
  static constexpr int kRowLanes = 2 * kChunks, kRowsAtOnce = 32 / kRowLanes;
  __device__ __forceinline__ bool is_value_lane() const { return lane_ / kChunks & 1; }
  __device__ __forceinline__ int lane_chunk() const { return lane_ % kChunks; }
  __device__ __forceinline__ bool lane_exists() const { return lane_chunk() * 8 < p_.head_dim; }
  // Takes kRowsAtOnce of the warp's slots from `mask`; this lane's one.
  __device__ __forceinline__ int take_slot(std::uint32_t& mask) const {
    int slot = 0;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      int const next = r == 0 || mask ? __ffs(mask) - 1 : slot;
      mask &= mask - 1;
      if (r == 0 || lane_ / kRowLanes >= r) slot = next;
    }
    return slot;
  }
  // Where this lane's chunk of the warp's first slot lies in a buffer, the columns in order.
  __device__ __forceinline__ std::uint32_t lane_address(std::uint32_t buffer) const {
    return smem_ + buffer * L::kBufferBytes + (is_value_lane() ? L::kBlockBytes : 0) +
           (lane_chunk() >> 3) * L::kHalfBytes + warp_ * (32 * 128) + (lane_chunk() & 7) * 16;
  }

  // This lane's part of row 0 of K or V (chunk 0 instead of one that does not exist), and bytes
  // from row to row.
  struct Rows {
    char* first;
    std::uint32_t stride;
    __device__ __forceinline__ Rows(char* first_, std::int64_t stride_)
        : first(first_), stride(static_cast<std::uint32_t>(stride_)) {
      asm volatile("" : "+l"(first));  // NOTE: else the compiler works it out anew for every row
    }
    __device__ __forceinline__ char* at(int key) const {
      return first + static_cast<std::uint64_t>(static_cast<std::uint32_t>(key)) * stride;
    }
  };
  __device__ __forceinline__ Rows source_rows(KeyHead const& head) const {
    int const batch = head.batch_coordinate(p_), at = lane_exists() ? lane_chunk() * 16 : 0;
    bool const v = is_value_lane();
    std::int64_t const stride = v ? p_.stride_v_position : p_.stride_k_position;
    char const* const rows =
        v ? p_.v_rows + batch * p_.stride_v_batch + head.kv_head * p_.stride_v_head
          : p_.k_rows + batch * p_.stride_k_batch + head.kv_head * p_.stride_k_head;
    return {const_cast<char*>(rows) + head.tiles.first_k * stride + at, stride};
  }
  // Copies the rows that this buffer lacks: of keys that entered for this tile or the one before.
  __device__ __forceinline__ void copy_rows(KeyHead const& head, std::uint32_t buffer) const {
    std::uint32_t mask = __ballot_sync(~0u, key_ >= 0 && (fresh_ || fresher_));
    if (mask) {
      Rows const rows = source_rows(head);
      std::uint32_t const to = lane_address(buffer);
      bool const exists = lane_exists();
      do {
        int const slot = take_slot(mask);
        int const key = __shfl_sync(~0u, key_, slot);
        device::cp_async_16((to + slot * 128) ^ (slot & 7) << 4, rows.at(key), exists);
      } while (mask);
    }
    device::cp_async_wait_all();
    device::fence_async_proxy();
  }

  // What the consumers need to know of a slot.
  __device__ __forceinline__ void write_slots(KeyHead const& head, int t, bool last) const {
    bool const alive = key_ >= 0 && !last;
    float gate = score_;
    if constexpr (kGeneral) {
      at<int>(L::kSlotKeys)[tid_] = alive ? key_ : 0;
      at<std::uint16_t>(L::kSlotExpiry)[tid_] =
          static_cast<std::uint16_t>(alive ? min(max(own_expiry_ - t * kTile, 0), kTile) : 0);
    } else {
      // log2 of the gate; -0.0 says that the gate rounds to 1 and still has a gradient.
      int const pool_end = t * kTile / p_.chunk_size * p_.chunk_size - p_.window;
      gate = alive ? 0.f : -INFINITY;
      if (alive && p_.gated && key_ < pool_end) {
        gate = __log2f(__saturatef(score_ - next_tau_));
        if (gate == 0.f && score_ < __fadd_ru(next_tau_, 1.f)) gate = -0.f;
      }
    }
    at<float2>(L::kSlotData)[tid_] = make_float2(__int_as_float(leaving_), gate);
  }

  BackwardParams const& p_;
  std::uint32_t const smem_;
  char* const generic_;
  int const tid_, lane_, warp_;
  std::uint32_t stage_ = 0, phase_ = 0;
  int expiry_[kBlocks] = {};
  int key_ = -1, own_expiry_ = 0, leaving_ = kNobody;
  float score_ = 0.f, next_tau_ = 0.f;
  bool fresh_ = false, fresher_ = false, inherited_ = false;
  int next_expiry_ = 0;
};

}  // namespace sparsek::cuda::sm90::backward
