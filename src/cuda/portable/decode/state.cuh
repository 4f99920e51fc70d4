// One KV head of one sequence, as the decode kernels see it: its part of the state block, and the
// tokens that a call brings. include/sparsek/decode.hpp has the layout.
#pragma once
#include <cfloat>
#include <cstdint>

#include "cuda/portable/decode/call.cuh"
#include "problem.hpp"

namespace sparsek::cuda::portable {

inline constexpr int kMaxTokens = INT32_MAX - 1;  // one beyond the last must fit too

// A score as everything here sees it: finite, so that no comparison meets a NaN.
__device__ inline float finite_score(float u) { return fminf(fmaxf(u, -FLT_MAX), FLT_MAX); }

__device__ inline DecodeHeadHeader empty_header() { return {0, 0, -INFINITY, 0}; }

struct HeadState {
  DecodeHeadHeader* header;
  float* candidates;
  int* positions;
  float* scores;
  std::byte *k, *v;
  int num_selected, window, num_candidates;  // k, w, M
  int row_bytes;                             // of a row of k or v
  Divisor chunk_size, ring_rows;             // C, w + C

  __device__ HeadState(DecodeCall const& call, std::byte* head)
      : header(reinterpret_cast<DecodeHeadHeader*>(head)),
        candidates(reinterpret_cast<float*>(head + call.problem.layout.candidates_offset)),
        positions(reinterpret_cast<int*>(head + call.problem.layout.positions_offset)),
        scores(reinterpret_cast<float*>(head + call.problem.layout.scores_offset)),
        k(head + call.problem.layout.k_offset),
        v(head + call.problem.layout.v_offset),
        num_selected(static_cast<int>(call.problem.layout.num_selected)),
        window(static_cast<int>(call.problem.layout.window)),
        num_candidates(static_cast<int>(call.problem.layout.num_candidates)),
        row_bytes(static_cast<int>(call.problem.head_dim) * 2),
        chunk_size(call.chunk_size),
        ring_rows(call.ring_rows) {}

  // In one piece, and past L1: another block of the cluster may have written it.
  __device__ DecodeHeadHeader read_header() const {
    int4 const raw = __ldcg(reinterpret_cast<int4 const*>(header));
    if (raw.x <= 0) return empty_header();
    return {min(raw.x, kMaxTokens), raw.y, __int_as_float(raw.z), raw.w};
  }

  // The end of the pool that the newest of `num_tokens` tokens sees.
  __device__ int pool_end(int num_tokens) const {
    if (num_tokens == 0) return 0;
    return max(0, num_tokens - 1 - chunk_size.remainder(num_tokens - 1) - window);
  }
  // The header after a call that leaves `num_tokens`; an eviction has written the rest.
  __device__ void finish(int num_tokens) const {
    header->num_tokens = num_tokens;
    header->reserved = 0;
    if (pool_end(num_tokens) == 0) {
      header->threshold = -INFINITY;
      header->num_candidates = 0;
    }
  }
  __device__ int window_row(int position) const {
    return num_selected + ring_rows.remainder(position);
  }
  __device__ std::int64_t offset(int row) const { return std::int64_t{row} * row_bytes; }
};

// The tokens of a call: that at position p is number p - first.
struct NewTokens {
  int first, count;
  std::byte const *k, *v;
  std::int64_t stride_k, stride_v;  // bytes
  float const* scores;
  std::int64_t stride_scores;
  bool aligned;  // rows start at multiples of 16 bytes

  __device__ std::byte const* k_row(int token) const { return k + token * stride_k; }
  __device__ std::byte const* v_row(int token) const { return v + token * stride_v; }
  __device__ float const* score_address(int token) const { return scores + token * stride_scores; }
  __device__ float score(int token) const { return finite_score(*score_address(token)); }
};

// What a call means for one sequence. Wrong values in memory (block_index, lengths, cu_seqlens, a
// header of other options) give unspecified results but no access outside the tensors.
struct Sequence {
  bool exists;     // its block lies in the pool
  bool continues;  // what the block holds counts
  int count;       // tokens of the call, existing or not
  int valid;       // those that exist
  int first_row;   // of the sequence, in packed tensors
  std::byte* block;

  __device__ Sequence(DecodeProblem const& p, int b) {
    int const total = static_cast<int>(p.seq_len);
    int begin = 0, end = total;
    if (p.cu_seqlens) {
      begin = min(max(p.cu_seqlens[b], 0), total);
      end = min(max(p.cu_seqlens[b + 1], begin), total);
    }
    int const index = p.block_index[b];
    exists = index >= 0 && index < p.num_blocks;
    continues = !p.continues || p.continues[b] != 0;
    block = static_cast<std::byte*>(p.state) + (exists ? index : 0) * p.stride_block;
    first_row = begin;
    count = end - begin;
    valid = p.lengths ? min(max(p.lengths[b], 0), count) : count;
    if (!exists) valid = 0;
  }
};

// What a block knows of its head in a call.
struct Head {
  std::byte* memory;  // of its part of the state block
  int batch, kv_head;
  int first_row;     // of the sequence, in packed tensors
  int first, count;  // tokens that the sequence has already; the call's that exist
};

__device__ inline NewTokens tokens_of(DecodeCall const& call, Head const& head) {
  DecodeProblem const& p = call.problem;
  auto const row = [&](void const* tensor, std::int64_t batch, std::int64_t kv_head,
                       std::int64_t position) {
    return static_cast<std::byte const*>(tensor) +
           2 * (head.batch * batch + head.kv_head * kv_head + head.first_row * position);
  };
  return {
      .first = head.first,
      .count = head.count,
      .k = row(p.k, p.stride_k_batch, p.stride_k_head, p.stride_k_position),
      .v = row(p.v, p.stride_v_batch, p.stride_v_head, p.stride_v_position),
      .stride_k = 2 * p.stride_k_position,
      .stride_v = 2 * p.stride_v_position,
      .scores = p.scores + head.batch * p.stride_scores_batch +
                head.kv_head * p.stride_scores_head + head.first_row * p.stride_scores_position,
      .stride_scores = p.stride_scores_position,
      .aligned = call.aligned_tokens,
  };
}

// 16 bytes of a row, whose address is a multiple of 2 only unless `aligned`.
__device__ inline uint4 load_16(std::byte const* source, bool aligned) {
  if (aligned) return *reinterpret_cast<uint4 const*>(source);
  auto const* const half = reinterpret_cast<std::uint16_t const*>(source);
  auto const pair = [&](int i) { return half[i] | std::uint32_t{half[i + 1]} << 16; };
  return {pair(0), pair(2), pair(4), pair(6)};
}

// A row of k and v that is copied into the state.
struct RowCopy {
  std::byte const *k, *v;
  std::byte *to_k, *to_v;
  bool aligned;
};

// Copies the rows row(0) ... row(count - 1), all threads of the block together.
// NOTE: several loads of a thread are under way at once; one at a time would make a chunk border
// wait for the memory's latency again and again.
template <int kThreads, typename Row>
__device__ inline void copy_rows(int count, int row_bytes, Row row) {
  constexpr int kUnroll = 4;
  int const chunks = row_bytes / 16;
  int const total = count * chunks;
  for (int base = threadIdx.x; base < total; base += kUnroll * kThreads) {
    uint4 k[kUnroll], v[kUnroll];
    std::byte *to_k[kUnroll], *to_v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      int const i = base + j * kThreads;
      if (i >= total) continue;
      RowCopy const copy = row(i / chunks);
      int const at = i % chunks * 16;
      k[j] = load_16(copy.k + at, copy.aligned);
      v[j] = load_16(copy.v + at, copy.aligned);
      to_k[j] = copy.to_k + at;
      to_v[j] = copy.to_v + at;
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (base + j * kThreads >= total) continue;
      *reinterpret_cast<uint4*>(to_k[j]) = k[j];
      *reinterpret_cast<uint4*>(to_v[j]) = v[j];
    }
  }
}

}  // namespace sparsek::cuda::portable
