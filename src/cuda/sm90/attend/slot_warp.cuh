// The producer warp that decides who is in the slots: admits keys that left the window tile to the
// places of keys that expired, tells the row warps, and writes the gates.
#pragma once
#include "cuda/device/mma_sync.cuh"
#include "cuda/sm90/attend/role.cuh"

namespace sparsek::cuda::sm90 {

template <int kDim>
class SlotWarp : Role<kDim> {
  using Base = Role<kDim>;
  using Base::p_, Base::smem_, Base::generic_, Base::early_tiles_, Base::lane, Base::arrive,
      Base::barrier, Base::enters_early, Base::wait_empty;
  using typename Base::L;
  // A lane owns the four slots of each block whose gates lie side by side: a consumer thread reads
  // what belongs to its columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of 16 at once.
  static constexpr int kPerLane = 4 * L::kMaxBlocks;
  __device__ __forceinline__ int slot_of(int s) const {
    return (s >> 2) * kTile + (lane() >> 2) * 16 + (lane() & 3) * 2 + (s & 1) + (s & 2) * 4;
  }

 public:
  __device__ __forceinline__ SlotWarp(Params const& p, std::uint32_t smem, char* generic)
      : Base(p, smem, generic),
        chunk_tiles_(p.chunk_size / kTile),
        inverse_scale_(1.f / p.scale_log2) {}

  // Works through the range that starts at `cursor`; the list for its first tile is there.
  __device__ __forceinline__ void run(Cursor cursor) {
    if (p_.num_blocks == 0) return;
    bool early = enters_early(cursor), filled = false, found = true;
    find_rows(cursor);
    for (;;) {
      int const t = cursor.t, list = fills_ & 1;
      if (t >= 2) {
        std::uint16_t* const rows = Base::template at<std::uint16_t>(L::kRowList) + list * kTile;
        wait_empty(kEmptyRows + list, fills_ >> 1);
        int count = 0;
        bool from_list = false;
        if (filled && t - 2 >= early_tiles_) {
          count = admit(t, rows);
        } else if (filled || early) {
          take_tiles(t, filled ? t - 2 : 0);
        } else {
          from_list = true;
          if (!found) {
            wait_empty(kEmptyGate, fills_);  // the list takes the gates' place
            find_start_keys<kDim, 32>(p_, generic_, cursor, lane());
            __syncwarp();
          }
          take_list();
        }
        filled = true;
        if (lane() == 0) Base::template at<int>(L::kRowCount)[list] = count;
        arrive(kFullRows + list);
        int const chunk = t / chunk_tiles_;
        float const tau = p_.gated ? thresholds_[chunk] : 0.f;
        wait_empty(kEmptyGate, fills_);
        if (from_list) wait_empty(kEmptyRows + list, (fills_ >> 1) + 1);  // it has been read
        write_gates(t * kTile, chunk * p_.chunk_size - p_.window, tau);
        arrive(kFullSlotK);
        ++fills_;
      }
      bool new_head;
      if (!cursor.advance_keys(p_, new_head)) return;
      if (new_head) {
        early = enters_early(cursor), filled = found = false;
        find_rows(cursor);
      } else {
        prefetch(cursor.t);
      }
    }
  }

 private:
  // The head's rows of what selection made.
  __device__ __forceinline__ void find_rows(Cursor const& c) {
    expiries_ = p_.expiry + c.sequence * p_.stride_expiry_batch +
                c.kv_head * p_.stride_expiry_head + c.tiles.first_k;
    if (!p_.gated) return;
    scores_ = p_.scores + c.sequence * p_.stride_scores_batch + c.kv_head * p_.stride_scores_head +
              c.tiles.first_k * p_.stride_scores_position;
    thresholds_ = p_.threshold + c.sequence * p_.stride_chunk_batch +
                  c.kv_head * p_.stride_chunk_head +
                  (p_.cu_seqlens_k ? c.tiles.first_k / p_.chunk_size + c.sequence : 0);
  }
  __device__ __forceinline__ void take(int s, int key) {
    key_[s] = key;
    expiry_[s] = expiries_[key];
    if (p_.gated) score_[s] = scores_[key * p_.stride_scores_position];
  }

  // The slots' first state in a head that is entered late.
  __device__ __forceinline__ void take_list() {
#pragma unroll
    for (int s = 0; s < kPerLane; ++s) {
      int const slot = slot_of(s);
      int const key = slot < p_.num_blocks * kTile ? Base::template at<int>(L::kStart)[slot] : -1;
      expiry_[s] = 0;
      if (key >= 0) take(s, key);
    }
  }
  // The keys of early tiles from `first` on, which lie in the blocks of slots of the same number.
  __device__ __forceinline__ void take_tiles(int t, int first) {
    int const end = min(t - 1, early_tiles_);
#pragma unroll
    for (int s = 0; s < kPerLane; ++s) {
      int const tile = s >> 2;
      if (tile >= first && tile < end) take(s, slot_of(s));
      if (tile >= end) expiry_[s] = 0;
    }
  }

  // Loads ahead what admission to the cursor's tile needs: keys of the tile that was the window of
  // the tile before.
  __device__ __forceinline__ void prefetch(int t) {
    if (t - 2 < early_tiles_) return;
    std::int32_t const* const expiry = expiries_ + (t - 2) * kTile + lane();
#pragma unroll
    for (int r = 0; r < 4; ++r) next_expiry_[r] = expiry[32 * r];
  }
  // Those that the cursor's tile sees take the places of keys that it no longer sees. `rows`
  // receives, for each, its slot and its place in the tile; returns how many.
  __device__ __forceinline__ int admit(int t, std::uint16_t* rows) {
    std::uint32_t const lower = (1u << lane()) - 1;
    int const now = t * kTile, first = (t - 2) * kTile;
    int entering = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      bool const enters = next_expiry_[r] > now;
      std::uint32_t const mask = __ballot_sync(~0u, enters);
      if (enters) {
        rows[entering + __popc(mask & lower)] = static_cast<std::uint16_t>(32 * r + lane());
      }
      entering += __popc(mask);
    }
    __syncwarp();
    int free = 0;
#pragma unroll
    for (int s = 0; s < kPerLane; ++s) {
      bool const is_free = s >> 2 < p_.num_blocks && expiry_[s] <= now;
      std::uint32_t const mask = __ballot_sync(~0u, is_free);
      int const rank = free + __popc(mask & lower);
      if (is_free && rank < entering) {
        int const place = rows[rank];
        take(s, first + place);
        rows[rank] = static_cast<std::uint16_t>(slot_of(s) << 7 | place);
      }
      free += __popc(mask);
    }
    return min(entering, free);
  }

  // log2 of the gates in units of the score accumulators, -inf for slots without a live key.
  __device__ __forceinline__ void write_gates(int now, int pool_end, float tau) {
    float4* const gates = Base::template at<float4>(L::kGate);
#pragma unroll
    for (int i = 0; i < L::kMaxBlocks; ++i) {
      if (i >= p_.num_blocks) break;
      float x[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        int const s = 4 * i + r;
        float m = expiry_[s] > now ? 1.f : 0.f;
        if (p_.gated && expiry_[s] > now && key_[s] < pool_end) m = __saturatef(score_[s] - tau);
        x[r] = device::log2_approx(m) * inverse_scale_;
      }
      float4* const here = gates + (i * 32 + lane()) * 2;
      here[0] = make_float4(x[0], x[1], x[0], x[1]);
      here[1] = make_float4(x[2], x[3], x[2], x[3]);
    }
  }

  int const chunk_tiles_;
  float const inverse_scale_;
  std::int32_t const* expiries_ = nullptr;
  float const *scores_ = nullptr, *thresholds_ = nullptr;
  int fills_ = 0;
  int expiry_[kPerLane] = {}, key_[kPerLane] = {};
  float score_[kPerLane] = {};
  int next_expiry_[4] = {};
};

}  // namespace sparsek::cuda::sm90
