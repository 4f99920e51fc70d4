// dk, dv and the direct term of dscores: listed keys. See key_kernel.cuh and slots.cuh.
#pragma once
#include <cstdint>

#include "cuda/portable/attend_backward/key_kernel.cuh"

namespace sparsek::cuda::portable {

// kKeys slots of a KV head in the tiles of one piece.
template <typename Config, typename T>
class SlotBlock : KeyBlock<Config, T> {
  using Base = KeyBlock<Config, T>;
  using Step = typename Base::Step;
  using Base::a_, Base::dk_, Base::dv_, Base::dscore_, Base::kv_head_, Base::p_, Base::sequence_,
      Base::shared_;
  using Base::kDimTiles, Base::kKeys, Base::kKeyTiles, Base::kPartsPerTile, Base::kQueries;

 public:
  __device__ SlotBlock(BackwardParams const& p, typename Config::SharedStorage& shared, int kv_head,
                       int piece, int first_slot)
      : Base(p, shared, kv_head), piece_(piece), first_slot_(first_slot) {
    PieceSpan const span = locate_piece(p, piece);
    tile_ = span.first - 1;
    last_tile_ = span.last;
    sequence_.index = -1;
  }

  __device__ void run() {
    Base::clear_sums();
    if (threadIdx.x < kKeys) shared_.position[threadIdx.x] = -1;
    bool more = next_tile();
    if (more) {
      Base::load_dout(step_);
      Base::load_q(step_);
    }
    while (more) {
      Base::wait_for_copies();
      PairKind kind = PairKind::kGeneral;
      if (step_.one_chunk) kind = a_.scores ? PairKind::kKeyGate : PairKind::kPlain;
      Base::weigh(step_, kind);
      __syncthreads();
      Base::multiply_weights(dv_, shared_.p, shared_.dout);
      __syncthreads();
      // Within a tile the keys stay.
      more = next_in_tile();
      if (more) Base::load_dout(step_);
      Base::multiply_weights(dk_, shared_.ds, shared_.q);
      if (more) {
        __syncthreads();
      } else {
        more = next_tile();
        if (more) Base::load_dout(step_);
      }
      if (more) Base::load_q(step_);
    }
    change_keys(nullptr, Sequence{-1, 0, 0, 0, 0, 0});
  }

 private:
  // The next head or part of the tile.
  __device__ bool next_in_tile() {
    if (++step_.q_head < (kv_head_ + 1) * a_.group) return true;
    step_.q_head = kv_head_ * a_.group;
    if (step_.begin + kQueries >= tile_end_) return false;
    set_part(step_.begin + kQueries);
    return true;
  }

  __device__ void set_part(int begin) {
    step_.begin = begin;
    step_.first = max(step_.tile_first, begin);
    step_.end = min(tile_end_, begin + kQueries);
  }

  // The first step of the next tile in which any of the block's slots has a key. A barrier comes
  // before the keys change.
  __device__ bool next_tile() {
    while (++tile_ < last_tile_) {
      TileSpan const span = locate_tile(a_, tile_);
      int const end = min(span.last, span.sequence.length);
      if (span.first >= end) continue;
      std::int32_t const* const slots = slot_row(p_, kv_head_, tile_) + first_slot_;
      if (!change_keys(slots, span.sequence)) continue;
      if (tile_ == locate_piece(p_, piece_).first) carried_end_ = carried_end(a_, tile_, span);
      step_.tile_first = span.first;
      step_.low = 0;
      step_.one_chunk = !a_.foreign && span.first / a_.chunk_size == (end - 1) / a_.chunk_size;
      step_.q_head = kv_head_ * a_.group;
      tile_end_ = end;
      int const skipped = (span.first - span.begin) / kQueries;
      set_part(span.begin + skipped * kQueries);
      return true;
    }
    return false;
  }

  // Gives the slots the keys of a tile, or takes them away (null), and writes the sums of those that
  // leave. Whether any slot has a key.
  __device__ bool change_keys(std::int32_t const* slots, Sequence const& sequence) {
    int const x = threadIdx.x;
    bool changed = false, any = false;
    int key = -1;
    if (x < kKeys) {
      key = slots ? slots[x] : -1;
      int const before = shared_.position[x];
      changed = key != before || (key >= 0 && sequence.index != sequence_.index);
      any = key >= 0;
      shared_.changed[x] = changed;
    }
    // Also: all products of the step before are done.
    bool const any_changed = __syncthreads_or(changed);
    if (any_changed) {
      write_leaving();
      __syncthreads();
      if (changed) {
        shared_.position[x] = key;
        if (key >= 0) {
          std::int64_t const row = a_.stride_expiry_batch * sequence.index +
                                   a_.stride_expiry_head * kv_head_ + sequence.first_key + key;
          device::cp_async_4(device::shared_address(&shared_.expiry[x]), a_.expiry + row, true);
          if (a_.scores) {
            std::int64_t const score = a_.stride_scores_batch * sequence.index +
                                       a_.stride_scores_head * kv_head_ +
                                       a_.stride_scores_position * (sequence.first_key + key);
            device::cp_async_4(device::shared_address(&shared_.score[x]), a_.scores + score, true);
          }
        } else {
          shared_.expiry[x] = 0;  // sees nothing
          shared_.score[x] = 0.f;
        }
      }
    }
    if (sequence.index != sequence_.index) carried_end_ = 0;
    sequence_ = sequence;
    any = __syncthreads_or(any);
    if (any && any_changed) load_entering();
    return any;
  }

  // Rows of K and V of the changed slots that have a key.
  __device__ void load_entering() {
    constexpr int kPieces = Config::kPieces;
    char const* const k = static_cast<char const*>(a_.k) +
                          row_bytes(a_.stride_k_batch, a_.stride_k_head, a_.stride_k_position,
                                    sequence_.index, kv_head_, sequence_.first_key);
    char const* const v = static_cast<char const*>(a_.v) +
                          row_bytes(a_.stride_v_batch, a_.stride_v_head, a_.stride_v_position,
                                    sequence_.index, kv_head_, sequence_.first_key);
    constexpr int kRowsAtOnce = Config::kNumThreads / kPieces;
    int const column = static_cast<int>(threadIdx.x) % kPieces * 8;
    for (int x = static_cast<int>(threadIdx.x) / kPieces; x < kKeys; x += kRowsAtOnce) {
      int const key = shared_.position[x];
      if (!shared_.changed[x] || key < 0) continue;
      load_piece(&shared_.k[x][column], k + 2 * a_.stride_k_position * key, column);
      load_piece(&shared_.v[x][column], v + 2 * a_.stride_v_position * key, column);
    }
  }

  __device__ void load_piece(T* destination, char const* row, int column) const {
    if (a_.aligned_loads) {
      bool const valid = column < a_.head_dim;
      device::cp_async_16(device::shared_address(destination), row + (valid ? 2 * column : 0),
                          valid);
    } else {
      for (int e = 0; e < 8; ++e) {
        destination[e] =
            column + e < a_.head_dim ? reinterpret_cast<T const*>(row)[column + e] : T(0.f);
      }
    }
  }

  // Writes and clears the sums of the changed slots.
  __device__ void write_leaving() {
    if (p_.dscores) Base::gather_dscores();
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int const slot = Base::key_of(m, h);
        if (!shared_.changed[slot]) continue;
        int const j = shared_.position[slot];
        if (j >= 0 && j < carried_end_) {
          write_carried(m, h, carried_row(p_, kv_head_, piece_, first_slot_ + slot));
        } else if (j >= 0) {
          write_key(m, h, j);
        }
        Base::clear_key(m, h);
      }
    if (!p_.dscores) return;
    __syncthreads();
    int const x = threadIdx.x;
    if (x >= kKeys || !shared_.changed[x]) return;
    int const j = shared_.position[x];
    if (j < 0) return;
    float const sum = shared_.dscores[0][x] + shared_.dscores[1][x];
    if (j < carried_end_) {
      p_.carried_dscores[carried_row(p_, kv_head_, piece_, first_slot_ + x)] = sum;
    } else {
      *Base::dscores_at(j) = sum;
    }
  }

  __device__ void write_key(int m, int h, int j) {
    T* const dk = Base::dk_row(j);
    T* const dv = Base::dv_row(j);
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      int const d = Base::dim_of(n);
      float const *const k = &dk_[m][n][2 * h], *const v = &dv_[m][n][2 * h];
      if (p_.aligned_gradients) {
        if (d >= a_.head_dim) continue;
        *reinterpret_cast<std::uint32_t*>(dk + d) =
            device::pack2<T>(k[0] * p_.sm_scale, k[1] * p_.sm_scale);
        *reinterpret_cast<std::uint32_t*>(dv + d) = device::pack2<T>(v[0], v[1]);
      } else {
#pragma unroll
        for (int x = 0; x < 2; ++x)
          if (d + x < a_.head_dim) dk[d + x] = T(k[x] * p_.sm_scale), dv[d + x] = T(v[x]);
      }
    }
  }

  __device__ void write_carried(int m, int h, std::int64_t row) {
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      int const d = Base::dim_of(n);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (d + x >= a_.head_dim) continue;
        p_.carried_dk[row * a_.head_dim + d + x] = dk_[m][n][2 * h + x] * p_.sm_scale;
        p_.carried_dv[row * a_.head_dim + d + x] = dv_[m][n][2 * h + x];
      }
    }
  }

  int const piece_, first_slot_;
  int tile_, last_tile_;
  int tile_end_ = 0;     // of the tile's queries that exist
  int carried_end_ = 0;  // keys before this position are carried
  Step step_;
};

// A block for each (KV head, piece, group of slots); groups of slots are neighbours and share
// queries.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(KeyConfig<T, kHeadDim>::kNumThreads,
                                  KeyConfig<T, kHeadDim>::kBlocksPerProcessor)
    slot_gradient_kernel(__grid_constant__ BackwardParams const p) {
  using Config = KeyConfig<T, kHeadDim>;
  extern __shared__ __align__(16) char storage[];
  int const groups = p.num_slots / Config::kKeys;
  int x = blockIdx.x;
  int const first_slot = x % groups * Config::kKeys;
  x /= groups;
  int const piece = p.num_pieces - 1 - x % p.num_pieces;
  SlotBlock<Config, T>(p, *reinterpret_cast<typename Config::SharedStorage*>(storage),
                       x / p.num_pieces, piece, first_slot)
      .run();
}

}  // namespace sparsek::cuda::portable
