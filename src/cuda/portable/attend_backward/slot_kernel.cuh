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
      Base::load_q(step_);
      device::cp_async_commit();
      Base::load_dout(step_);
      device::cp_async_commit();
    }
    while (more) {
      Base::template wait_for_copies<1>();
      PairKind kind = PairKind::kGeneral;
      if (step_.one_chunk) kind = a_.scores ? PairKind::kKeyGate : PairKind::kPlain;
      Base::weigh(step_, kind, true);
      __syncthreads();
      Base::multiply_weights(dk_, shared_.ds, shared_.q);
      __syncthreads();
      // Within a tile the keys stay; so q of the next step can be loaded now.
      more = next_in_tile();
      if (more) {
        Base::load_q(step_);
        device::cp_async_commit();
      }
      Base::multiply_weights(dv_, shared_.p, shared_.dout);
      if (more) {
        __syncthreads();
      } else {
        more = next_tile();
        if (more) {
          Base::load_q(step_);
          device::cp_async_commit();
        }
      }
      if (more) {
        Base::load_dout(step_);
        device::cp_async_commit();
      }
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
    int key = -1;
    bool leaves = false, enters = false;
    if (x < kKeys) {
      key = slots ? slots[x] : -1;
      int const before = shared_.position[x];
      bool const changes = key != before || (key >= 0 && sequence.index != sequence_.index);
      leaves = changes && before >= 0;
      enters = changes && key >= 0;
      unsigned const leaving = __ballot_sync(~0u, leaves), entering = __ballot_sync(~0u, enters);
      if (x % 32 == 0) {
        shared_.leaving[buffer_][x / 32] = leaving;
        shared_.entering[buffer_][x / 32] = entering;
      }
    }
    // Also: all products of the step before are done.
    bool const any = __syncthreads_or(key >= 0);
    std::uint64_t const leaving = slots_of(shared_.leaving[buffer_]);
    std::uint64_t const entering = slots_of(shared_.entering[buffer_]);
    buffer_ ^= 1;
    if (leaving | entering) {
      if (leaving) write_leaving(leaving);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if ((leaving | entering) >> Base::key_of(m, h) & 1) Base::clear_key(m, h);
      __syncthreads();  // positions have been read
      if (leaves || enters) set_key(x, key, sequence);
    }
    if (sequence.index != sequence_.index) carried_end_ = 0;
    sequence_ = sequence;
    if (entering) {
      __syncthreads();
      load_entering(entering);
    }
    return any;
  }

  static __device__ std::uint64_t slots_of(std::uint32_t const (&bits)[2]) {
    return bits[0] | (kKeys > 32 ? static_cast<std::uint64_t>(bits[1]) << 32 : 0);
  }

  // Calls body(slot) for the slots whose bits are set, distributed over the groups of threads that
  // share a row.
  template <typename Body>
  static __device__ void for_each_slot(std::uint64_t slots, Body const& body) {
    for (int index = 0; slots != 0; slots &= slots - 1, ++index)
      if (index % Base::kRowGroups == Base::row_group()) body(__ffsll(slots) - 1);
  }

  __device__ void set_key(int slot, int key, Sequence const& sequence) {
    shared_.position[slot] = key;
    if (key < 0) {
      shared_.expiry[slot] = 0;  // sees nothing
      return;
    }
    std::int64_t const expiry = a_.stride_expiry_batch * sequence.index +
                                a_.stride_expiry_head * kv_head_ + sequence.first_key + key;
    device::cp_async_4(device::shared_address(&shared_.expiry[slot]), a_.expiry + expiry, true);
    if (!a_.scores) return;
    std::int64_t const score = a_.stride_scores_batch * sequence.index +
                               a_.stride_scores_head * kv_head_ +
                               a_.stride_scores_position * (sequence.first_key + key);
    device::cp_async_4(device::shared_address(&shared_.score[slot]), a_.scores + score, true);
  }

  // Rows of K and V.
  __device__ void load_entering(std::uint64_t slots) {
    char const* const k = static_cast<char const*>(a_.k) +
                          row_bytes(a_.stride_k_batch, a_.stride_k_head, a_.stride_k_position,
                                    sequence_.index, kv_head_, sequence_.first_key);
    char const* const v = static_cast<char const*>(a_.v) +
                          row_bytes(a_.stride_v_batch, a_.stride_v_head, a_.stride_v_position,
                                    sequence_.index, kv_head_, sequence_.first_key);
    int const column = Base::lane_dim();
    for_each_slot(slots, [&](int slot) {
      int const key = shared_.position[slot];
      load_piece(&shared_.k[slot][column], k + 2 * a_.stride_k_position * key, column);
      load_piece(&shared_.v[slot][column], v + 2 * a_.stride_v_position * key, column);
    });
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

  // Writes the sums of the slots. q and dout are free, and so they are after the next barrier.
  __device__ void write_leaving(std::uint64_t slots) {
    write_sums(dk_, p_.sm_scale, slots, p_.carried_dk, Base::dk_row(0), p_.stride_dk_position);
    write_sums(dv_, 1.f, slots, p_.carried_dv, Base::dv_row(0), p_.stride_dv_position);
    if (!p_.dscores) return;
    Base::gather_dscores();
    __syncthreads();
    int const x = threadIdx.x;
    if (x >= kKeys || !(slots >> x & 1)) return;
    int const j = shared_.position[x];
    float* const target =
        j < carried_end_ ? p_.carried_dscores + carried_row(p_, kv_head_, piece_, first_slot_ + x)
                         : Base::dscores_at(j);
    *target = Base::gathered_dscores(x);
  }

  __device__ void write_sums(float const (&sums)[kKeyTiles][kDimTiles][4], float scale,
                             std::uint64_t slots, float* carried, T* rows, std::int64_t stride) {
    Base::stage(sums, scale, slots);
    for_each_slot(slots, [&](int slot) {
      int const j = shared_.position[slot];
      typename Base::Octet const& octet = Base::staged(slot);
      if (j >= carried_end_) {
        Base::store_octet(rows + stride * j, octet);
        return;
      }
      int const d = Base::lane_dim();
      float* const row =
          carried + carried_row(p_, kv_head_, piece_, first_slot_ + slot) * a_.head_dim;
      for (int e = 0; e < 8 && d + e < a_.head_dim; ++e) row[d + e] = octet.x[e];
    });
    __syncthreads();
  }

  int const piece_, first_slot_;
  int tile_, last_tile_;
  int tile_end_ = 0;     // of the tile's queries that exist
  int carried_end_ = 0;  // keys before this position are carried
  int buffer_ = 0;       // of leaving and entering
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
