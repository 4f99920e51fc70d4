// One KV head of one sequence, as the decode kernels see it: its part of the state block, and the
// tokens that a call brings. include/sparsek/decode.hpp has the layout.
#pragma once
#include <cfloat>
#include <cstdint>

#include "problem.hpp"

namespace sparsek::cuda::portable {

inline constexpr std::int64_t kMaxTokens = INT32_MAX - 1;  // one beyond the last must fit too

// A score as everything here sees it: finite, so that no comparison meets a NaN.
__device__ inline float finite_score(float u) { return fminf(fmaxf(u, -FLT_MAX), FLT_MAX); }

struct HeadState {
  DecodeHeadHeader* header;
  float* candidates;
  int* positions;
  float* scores;
  std::byte *k, *v;
  int num_selected, window, chunk_size, num_candidates;  // k, w, C, M
  int row_bytes;                                         // of a row of k or v

  __device__ HeadState(DecodeProblem const& p, std::byte* head)
      : header(reinterpret_cast<DecodeHeadHeader*>(head)),
        candidates(reinterpret_cast<float*>(head + p.layout.candidates_offset)),
        positions(reinterpret_cast<int*>(head + p.layout.positions_offset)),
        scores(reinterpret_cast<float*>(head + p.layout.scores_offset)),
        k(head + p.layout.k_offset),
        v(head + p.layout.v_offset),
        num_selected(static_cast<int>(p.layout.num_selected)),
        window(static_cast<int>(p.layout.window)),
        chunk_size(static_cast<int>(p.layout.chunk_size)),
        num_candidates(static_cast<int>(p.layout.num_candidates)),
        row_bytes(static_cast<int>(p.head_dim) * 2) {}

  // NOTE: read past L1: another block of the cluster may have written it.
  __device__ int num_tokens() const { return max(0, __ldcg(&header->num_tokens)); }
  __device__ float threshold() const { return __ldcg(&header->threshold); }

  // The end of the pool that the newest of `num_tokens` tokens sees.
  __device__ int pool_end(int num_tokens) const {
    if (num_tokens == 0) return 0;
    return max(0, (num_tokens - 1) / chunk_size * chunk_size - window);
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
  __device__ int ring_rows() const { return window + chunk_size; }
  __device__ int window_row(int position) const { return num_selected + position % ring_rows(); }
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
  __device__ float score(int token) const { return finite_score(scores[token * stride_scores]); }
};

// What a call means for one sequence. Wrong values in memory (block_index, lengths, cu_seqlens, a
// header of other options) give unspecified results but no access outside the tensors.
struct Sequence {
  bool exists;             // its block lies in the pool
  bool continues;          // what the block holds counts
  int count;               // tokens of the call, existing or not
  int valid;               // those that exist
  std::int64_t first_row;  // of the sequence, in packed tensors
  std::byte* block;

  __device__ Sequence(DecodeProblem const& p, int b) {
    std::int64_t begin = 0, end = p.seq_len;
    if (p.cu_seqlens) {
      begin = min(max(std::int64_t{p.cu_seqlens[b]}, std::int64_t{0}), p.seq_len);
      end = min(max(std::int64_t{p.cu_seqlens[b + 1]}, begin), p.seq_len);
    }
    int const index = p.block_index[b];
    exists = index >= 0 && index < p.num_blocks;
    continues = !p.continues || p.continues[b] != 0;
    block = static_cast<std::byte*>(p.state) + (exists ? index : 0) * p.stride_block;
    first_row = begin;
    count = static_cast<int>(end - begin);
    valid = p.lengths ? min(max(p.lengths[b], 0), count) : count;
    if (!exists) valid = 0;
  }
};

// The tokens of a sequence that has `first` already.
__device__ inline NewTokens tokens_of(DecodeProblem const& p, Sequence const& s, int b, int kv_head,
                                      int first, bool aligned) {
  auto const row = [&](void const* tensor, std::int64_t batch, std::int64_t head,
                       std::int64_t position) {
    return static_cast<std::byte const*>(tensor) +
           2 * (b * batch + kv_head * head + s.first_row * position);
  };
  return {
      .first = first,
      .count = static_cast<int>(min(std::int64_t{s.valid}, kMaxTokens - first)),
      .k = row(p.k, p.stride_k_batch, p.stride_k_head, p.stride_k_position),
      .v = row(p.v, p.stride_v_batch, p.stride_v_head, p.stride_v_position),
      .stride_k = 2 * p.stride_k_position,
      .stride_v = 2 * p.stride_v_position,
      .scores = p.scores + b * p.stride_scores_batch + kv_head * p.stride_scores_head +
                s.first_row * p.stride_scores_position,
      .stride_scores = p.stride_scores_position,
      .aligned = aligned,
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

// The tokens at positions begin ... end - 1 of the call go into the window's rows.
template <int kThreads>
__device__ inline void append_rows(HeadState const& state, NewTokens const& tokens, int begin,
                                   int end) {
  copy_rows<kThreads>(end - begin, state.row_bytes, [&](int i) {
    int const token = begin + i - tokens.first;
    std::int64_t const to = state.offset(state.window_row(begin + i));
    return RowCopy{tokens.k_row(token), tokens.v_row(token), state.k + to, state.v + to,
                   tokens.aligned};
  });
  for (int p = begin + static_cast<int>(threadIdx.x); p < end; p += kThreads) {
    state.scores[state.window_row(p)] = tokens.score(p - tokens.first);
  }
}

}  // namespace sparsek::cuda::portable
