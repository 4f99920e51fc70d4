// dk, dv and the direct term of dscores: every key, in the tiles that do not list it, on top of what
// the slots gave. See key_kernel.cuh and slots.cuh.
#pragma once
#include <cstdint>

#include "cuda/portable/attend_backward/key_kernel.cuh"

namespace sparsek::cuda::portable {

// kKeys consecutive keys of a KV head.
template <typename Config, typename T>
class WindowBlock : KeyBlock<Config, T> {
  using Base = KeyBlock<Config, T>;
  using Step = typename Base::Step;
  using Base::a_, Base::dk_, Base::dv_, Base::dscore_, Base::kv_head_, Base::p_, Base::sequence_,
      Base::shared_;
  using Base::kDimTiles, Base::kKeys, Base::kKeyTiles, Base::kQueries;

 public:
  __device__ WindowBlock(BackwardParams const& p, typename Config::SharedStorage& shared,
                         int kv_head, int group_of_keys)
      : Base(p, shared, kv_head) {
    int b = 0, group = group_of_keys;
    if (a_.cu_seqlens_k) {
      b = find_sequence(group_of_keys);
      group -= first_group(b);
    } else {
      int const groups = (a_.seq_len_k + kKeys - 1) / kKeys;
      b = group_of_keys / groups;
      group -= b * groups;
    }
    sequence_ = load_sequence(a_, b);
    first_key_ = group * kKeys;
  }

  __device__ void run() {
    if (first_key_ >= sequence_.num_keys) return;
    Base::clear_sums();
    load_keys();
    step_.begin = max(first_key_, sequence_.query_offset()) / kQueries * kQueries - kQueries;
    step_.q_head = (kv_head_ + 1) * a_.group;
    latest_expiry_ = a_.num_tiles > 0 ? Base::group_expiry_of(first_key_) : 0;
    bool more = next_step();
    if (more) {
      Base::load_q(step_);
      device::cp_async_commit();
      Base::load_dout(step_);
      device::cp_async_commit();
    }
    while (more) {
      Base::template wait_for_copies<1>();
      weigh();
      __syncthreads();
      Base::multiply_weights(dk_, shared_.ds, shared_.q);
      __syncthreads();
      more = next_step();
      if (more) {
        Base::load_q(step_);
        device::cp_async_commit();
      }
      Base::multiply_weights(dv_, shared_.p, shared_.dout);
      __syncthreads();
      if (more) {
        Base::load_dout(step_);
        device::cp_async_commit();
      }
    }
    device::cp_async_wait_all();
    __syncthreads();
    find_pieces();
    __syncthreads();
    store();
  }

 private:
  // Groups of packed sequences, numbered with one to spare for each sequence.
  __device__ int first_group(int b) const {
    return min(max(a_.cu_seqlens_k[b], 0), a_.seq_len_k) / kKeys + b;
  }
  __device__ int find_sequence(int group) const {
    int low = 0, high = a_.batch;  // the last sequence that does not begin after the group
    while (high - low > 1) {
      int const middle = (low + high) / 2;
      (first_group(middle) <= group ? low : high) = middle;
    }
    return low;
  }

  __device__ void load_keys() {
    int const exist = sequence_.length - first_key_;
    char const* const k = static_cast<char const*>(a_.k) +
                          row_bytes(a_.stride_k_batch, a_.stride_k_head, a_.stride_k_position,
                                    sequence_.index, kv_head_, sequence_.first_key);
    char const* const v = static_cast<char const*>(a_.v) +
                          row_bytes(a_.stride_v_batch, a_.stride_v_head, a_.stride_v_position,
                                    sequence_.index, kv_head_, sequence_.first_key);
    load_rows<Config, kKeys>(a_, shared_.k, k, a_.stride_k_position, first_key_, nullptr, 0, exist);
    load_rows<Config, kKeys>(a_, shared_.v, v, a_.stride_v_position, first_key_, nullptr, 0, exist);
    int const x = threadIdx.x;
    if (x >= kKeys) return;
    int const j = first_key_ + x;
    shared_.position[x] = j;
    shared_.expiry[x] = x < exist ? Base::expiry_of_keys()[j] : 0;
    shared_.score[x] = x < exist && a_.scores ? *Base::score_of(j) : 0.f;
  }

  // The next head, part of a tile, or tile whose queries may see a key of the block that their tile
  // does not list.
  __device__ bool next_step() {
    if (++step_.q_head < (kv_head_ + 1) * a_.group) return true;
    step_.q_head = kv_head_ * a_.group;
    if (a_.group == 0) return false;
    int const offset = sequence_.query_offset();
    for (;;) {
      step_.begin += kQueries;
      int const tile = step_.begin / kQueryTile * kQueryTile;
      step_.tile_first = max(tile, offset);
      if (step_.tile_first >= min(sequence_.length, latest_expiry_)) return false;
      step_.low = a_.source == KeySource::kLists ? list_end(a_, step_.tile_first) : 0;
      if (step_.low >= first_key_ + kKeys) return false;
      step_.first = max(step_.begin, offset);
      step_.end = min(step_.begin + kQueries, sequence_.length);
      if (step_.begin >= sequence_.length) return false;
      if (step_.first < step_.end && step_.end > first_key_) return true;
    }
  }

  __device__ void weigh() {
    int const key = first_key_ + Base::warp_key(), query = step_.begin + Base::warp_query();
    int const low = max(query, step_.first);
    int const high = min(query + Config::kQueriesPerWarp, step_.end) - 1;
    PairKind kind = PairKind::kCausal;
    if (a_.foreign || window_begin(a_, max(high, 0)) > key) {
      kind = PairKind::kGeneral;
    } else if (key + Config::kKeysPerWarp <= low + 1) {
      kind = PairKind::kPlain;
    }
    Base::weigh(step_, kind, low <= high && key <= high);
  }

  // --- what the slots gave -----------------------------------------------------------------------
  // The pieces in which each key is listed.
  __device__ void find_pieces() {
    int const x = threadIdx.x;
    if (x >= kKeys) return;
    int const j = first_key_ + x;
    shared_.first_piece[x] = -1;
    if (p_.num_slots == 0 || j >= sequence_.length) return;
    int const offset = sequence_.query_offset(), expiry = min(shared_.expiry[x], sequence_.length);
    // The first query whose tile may list the key.
    std::int64_t const chunk = (static_cast<std::int64_t>(j) + a_.window) / a_.chunk_size + 1;
    std::int64_t const listed = a_.foreign ? j + kQueryTile + 1 : chunk * a_.chunk_size;
    std::int64_t const first =
        offset >= listed ? offset : (listed + kQueryTile - 1) / kQueryTile * kQueryTile;
    if (first >= expiry) return;
    int const tile = first_tile_of(a_, sequence_) - offset / kQueryTile;
    shared_.first_piece[x] = piece_of_tile(p_, tile + static_cast<int>(first) / kQueryTile);
    shared_.last_piece[x] = piece_of_tile(p_, tile + (expiry - 1) / kQueryTile);
  }

  // Where a piece carried the sums of a key that it did not see enter.
  __device__ std::int64_t find_carried(int piece, int j) const {
    std::int64_t const index =
        static_cast<std::int64_t>(kv_head_) * a_.num_tiles + locate_piece(p_, piece).first;
    std::int32_t const* const list = a_.lists + index * a_.list_capacity;
    int low = 0, high = a_.list_count[index] - 1;
    while (low < high) {
      int const middle = (low + high) / 2;
      if (list[middle] < j) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return carried_row(p_, kv_head_, piece, max(low, 0));
  }

  // --- results -----------------------------------------------------------------------------------
  __device__ void store() {
    store_sums(dk_, p_.sm_scale, p_.carried_dk, Base::dk_row(first_key_), p_.stride_dk_position);
    store_sums(dv_, 1.f, p_.carried_dv, Base::dv_row(first_key_), p_.stride_dv_position);
    if (!p_.dscores) return;
    Base::gather_dscores();
    __syncthreads();
    store_dscores();
  }

  // Rows of dk or dv, from `rows` on: the sums, and what the slots gave.
  __device__ void store_sums(float const (&sums)[kKeyTiles][kDimTiles][4], float scale,
                             float const* carried, T* rows, std::int64_t stride) {
    Base::stage(sums, scale, ~std::uint64_t{0});
    int const count = min(kKeys, sequence_.num_keys - first_key_);
    for (int x = Base::row_group(); x < count; x += Base::kRowGroups) {
      T* const row = rows + stride * x;
      typename Base::Octet octet = Base::staged(x);
      if (first_key_ + x >= sequence_.length) {
        octet = {};
      } else if (shared_.first_piece[x] >= 0) {
        add_listed(octet, x, carried, row);
      }
      Base::store_octet(row, octet);
    }
    __syncthreads();
  }

  __device__ void add_listed(typename Base::Octet& octet, int x, float const* carried,
                             T const* row) const {
    Base::add_octet(octet, row);
    int const d = Base::lane_dim();
    for (int piece = shared_.first_piece[x] + 1; piece <= shared_.last_piece[x]; ++piece) {
      float const* const part = carried + find_carried(piece, first_key_ + x) * a_.head_dim + d;
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (d + e < a_.head_dim) octet.x[e] += part[e];
    }
  }

  __device__ void store_dscores() const {
    int const x = threadIdx.x, j = first_key_ + x;
    if (x >= kKeys || j >= sequence_.num_keys) return;
    float sum = 0.f;
    if (j < sequence_.length) {
      sum = Base::gathered_dscores(x);
      if (shared_.first_piece[x] >= 0) {
        sum += *Base::dscores_at(j);
        for (int piece = shared_.first_piece[x] + 1; piece <= shared_.last_piece[x]; ++piece)
          sum += p_.carried_dscores[find_carried(piece, j)];
      }
    }
    *Base::dscores_at(j) = sum;
  }

  int first_key_;      // position of the block's first key
  int latest_expiry_;  // of its keys and their neighbours
  Step step_;
};

// Groups of kKeys keys of one KV head, all sequences; packed: an upper bound.
template <int kKeys>
__host__ __device__ inline int count_key_groups(AttendParams const& a) {
  return a.cu_seqlens_k ? a.seq_len_k / kKeys + a.batch
                        : (a.seq_len_k + kKeys - 1) / kKeys * a.batch;
}

// A block for each (KV head, group of keys).
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(KeyConfig<T, kHeadDim>::kNumThreads,
                                  KeyConfig<T, kHeadDim>::kBlocksPerProcessor)
    window_gradient_kernel(__grid_constant__ BackwardParams const p) {
  using Config = KeyConfig<T, kHeadDim>;
  extern __shared__ __align__(16) char storage[];
  int const groups = count_key_groups<Config::kKeys>(p.a);
  WindowBlock<Config, T>(p, *reinterpret_cast<typename Config::SharedStorage*>(storage),
                         blockIdx.x / groups, blockIdx.x % groups)
      .run();
}

}  // namespace sparsek::cuda::portable
