// The gathering warpgroups: rows of K or V, by pieces of 16 bytes, into the ring that the consumers
// read.
#pragma once
#include <math_constants.h>

#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/sm90/gather/config.cuh"

namespace sparsek::cuda::sm90::gather {

// kKeys: this warpgroup loads K and Q and prepares the gates; else V.
template <int kDim, bool kKeys>
class Producer {
  using L = Layout<kDim>;
  using B = Barriers<kDim>;
  static constexpr int kStages = kKeys ? L::kStagesK : L::kStagesV;
  static constexpr int kPieces = kDim / 8;              // of 16 bytes, in a row
  static constexpr int kRowsPerPass = 128 / kPieces;    // by the warpgroup
  static constexpr int kPasses = kTile / kRowsPerPass;  // a thread's rows of a block
  static constexpr int kNamedBarrier = kKeys ? 3 : 4;

 public:
  __device__ __forceinline__ Producer(portable::AttendParams const& p, std::uint32_t smem,
                                      char* generic)
      : p_(p), smem_(smem), generic_(generic) {}

  __device__ __forceinline__ void run(int num_items) {
    for (int x = blockIdx.x; x < num_items; x += gridDim.x) {
      WorkItem const item = locate_item(p_, x);
      if (item.first >= item.end) continue;
      if (kKeys) load_queries(item);
      load_blocks(item);
    }
    device::cp_async_wait_all();
  }

 private:
  __device__ __forceinline__ int tid() const { return threadIdx.x & 127; }
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return smem_ + L::kBarriers + i * 8;
  }
  // This thread's place in row `tid() / kPieces` of a block; its other rows follow kRowsPerPass
  // apart, which is a multiple of 8, so that the swizzle is the same.
  __device__ __forceinline__ std::uint32_t place(int base) const {
    int const r = tid() / kPieces, piece = tid() % kPieces;
    return smem_ + base + (piece >> 3) * L::kHalfBytes + r * 128 + (((piece & 7) ^ (r & 7)) << 4);
  }
  static_assert(kRowsPerPass % 8 == 0);

  __device__ __forceinline__ void load_queries(WorkItem const& item) {
    portable::Sequence const& s = item.sequence;
    char const* const q = static_cast<char const*>(p_.q) +
                          2 * (p_.stride_q_batch * s.index + p_.stride_q_head * item.q_head +
                               p_.stride_q_position * (s.first_query - s.query_offset())) +
                          tid() % kPieces * 16;
    bool const inside = tid() % kPieces * 8 < p_.head_dim;
    device::mbarrier_wait(barrier(B::kEmptyQ), queries_parity_ ^ 1);
    queries_parity_ ^= 1;
    std::uint32_t const target = place(L::kQ);
#pragma unroll 4
    for (int pass = 0; pass < kPasses; ++pass) {
      int const i = item.begin + tid() / kPieces + pass * kRowsPerPass;
      bool const valid = i >= item.first && i < item.end;
      device::cp_async_16(target + pass * kRowsPerPass * 128,
                          q + 2 * p_.stride_q_position * (valid ? i : item.first), valid && inside);
    }
    device::cp_async_mbarrier_arrive(barrier(B::kFullQ));
  }

  __device__ __forceinline__ void load_blocks(WorkItem const& item) {
    portable::Sequence const& s = item.sequence;
    char const* rows =
        kKeys ? static_cast<char const*>(p_.k) +
                    2 * (p_.stride_k_batch * s.index + p_.stride_k_head * item.kv_head +
                         p_.stride_k_position * s.first_key)
              : static_cast<char const*>(p_.v) +
                    2 * (p_.stride_v_batch * s.index + p_.stride_v_head * item.kv_head +
                         p_.stride_v_position * s.first_key);
    rows += tid() % kPieces * 16;
    std::int32_t const* const list = p_.lists + item.list * p_.list_capacity;
    // Each thread fetches the position of one key, a block ahead.
    int next = tid() < item.list_size ? list[tid()] : 0;

    for (int n = 0; n < item.contiguous_blocks; ++n) {
      int const first = item.key_first + n * kTile;
      load_block(rows, item.end - first, [&](int r) { return first + r; });
      if (kKeys) device::mbarrier_arrive(barrier(B::kFullK + ring_.stage));
      finish_block();
    }
    for (int entry = 0; entry < item.list_size; entry += kTile) {
      bool const valid = entry + tid() < item.list_size;
      int const position = next;
      auto* const positions = reinterpret_cast<std::int32_t*>(generic_ + L::kPositions) +
                              (kKeys ? 0 : 2 * kTile) + position_buffer_ * kTile;
      position_buffer_ ^= 1;
      positions[tid()] = position;
      next = entry + kTile + tid() < item.list_size ? list[entry + kTile + tid()] : 0;
      float score = 0.f, threshold = -CUDART_INF_F;
      if (kKeys && p_.scores) {
        score = p_.scores[p_.stride_scores_batch * s.index + p_.stride_scores_head * item.kv_head +
                          p_.stride_scores_position * (s.first_key + position)];
        std::int64_t const first_chunk =
            p_.cu_seqlens_k ? s.first_key / p_.chunk_size + s.index : 0;
        threshold =
            p_.threshold[p_.stride_chunk_batch * s.index + p_.stride_chunk_head * item.kv_head +
                         first_chunk + item.first / p_.chunk_size];
      }
      // NOTE: two buffers of positions, so that one barrier a block suffices.
      device::named_barrier_sync(kNamedBarrier, 128);
      load_block(rows, item.list_size - entry, [&](int r) { return positions[r]; });
      if (kKeys) {
        write_gate(valid, __saturatef(score - threshold));
        device::mbarrier_arrive(barrier(B::kFullK + ring_.stage));
      }
      finish_block();
    }
  }

  // Starts the copies of the first `existing` rows of a block, zeros for the others.
  template <typename Position>
  __device__ __forceinline__ void load_block(char const* rows, int existing, Position position) {
    device::mbarrier_wait(barrier((kKeys ? B::kEmptyK : B::kEmptyV) + ring_.stage),
                          ring_.parity ^ 1);
    std::uint32_t const target = place((kKeys ? L::kK : L::kV) + ring_.stage * L::kBlockBytes);
    auto const stride =
        static_cast<std::uint32_t>(2 * (kKeys ? p_.stride_k_position : p_.stride_v_position));
    bool const inside = tid() % kPieces * 8 < p_.head_dim;
    int const row = tid() / kPieces;
#pragma unroll 4
    for (int pass = 0; pass < kPasses; ++pass) {
      int const r = row + pass * kRowsPerPass;
      auto const j = static_cast<std::uint32_t>(position(r));
      device::cp_async_16(target + pass * kRowsPerPass * 128,
                          rows + static_cast<std::uint64_t>(j) * stride, inside && r < existing);
    }
  }

  // The consumers' barrier counts this thread when its copies have arrived.
  __device__ __forceinline__ void finish_block() {
    device::cp_async_mbarrier_arrive(barrier((kKeys ? B::kFullK : B::kFullV) + ring_.stage));
    ring_.advance();
  }

  __device__ __forceinline__ void write_gate(bool valid, float gate) {
    float const bias = !valid                        ? -CUDART_INF_F
                       : p_.scores && !p_.value_gate ? __log2f(gate) / p_.scale_log2
                                                     : 0.f;
    int const at = ring_.stage * kTile + tid();
    reinterpret_cast<float*>(generic_ + L::kBias)[at] = bias;
    reinterpret_cast<float*>(generic_ + L::kGate)[at] = gate;
  }

  portable::AttendParams const& p_;
  std::uint32_t const smem_;
  char* const generic_;
  RingPosition<kStages> ring_;
  std::uint32_t queries_parity_ = 0;
  int position_buffer_ = 0;
};

}  // namespace sparsek::cuda::sm90::gather
