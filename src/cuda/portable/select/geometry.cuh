// Where a row's keys, chunks and pools lie. A row is one KV head of one sequence.
//
// Pools grow with the chunks: P_c = [0, b_c), b_c = max(0, c * C - w). States are computed at *marks*: every chunk border
// is one, and chunks longer than kMaxMarkSpan keys have extra marks inside, at which only the candidate list is
// trimmed, so that the list stays short.
#pragma once
#include <cfloat>
#include <cstdint>

#include "problem.hpp"

namespace sparsek::cuda::portable {

inline constexpr int kMaxMarkSpan = 256;  // keys between two marks, at most

struct Row {
  float const* scores;  // its first key
  std::int64_t stride;  // between positions
  std::int64_t expiry;  // offset of its first key in expiry
  std::int64_t chunks;  // offset of its first chunk in threshold, last_candidate and the k-th keys
  int num_keys;         // positions
  int valid;            // positions >= valid do not exist
  int num_chunks;       // ceil(num_keys / C)
  int used_chunks;      // ceil(valid / C): those that start before `valid`
};

__host__ __device__ inline int ceil_div(std::int64_t a, std::int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

__device__ inline Row row_of(SelectProblem const& p, int row) {
  int const b = row / static_cast<int>(p.num_kv_heads);
  int const h = row % static_cast<int>(p.num_kv_heads);
  std::int64_t const first = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
  Row r;
  r.stride = p.stride_scores_position;
  r.scores = static_cast<float const*>(p.scores) + b * p.stride_scores_batch +
             h * p.stride_scores_head + first * r.stride;
  r.expiry = b * p.stride_expiry_batch + h * p.stride_expiry_head + first;
  r.chunks = b * p.stride_chunk_batch + h * p.stride_chunk_head +
             (p.cu_seqlens_k ? first / p.chunk_size + b : 0);
  // Bad lengths and offsets give unspecified results but no access outside the tensors.
  std::int64_t num_keys = p.seq_len;
  if (p.cu_seqlens_k)
    num_keys =
        min(max(std::int64_t{p.cu_seqlens_k[b + 1]} - first, std::int64_t{0}), p.seq_len - first);
  r.num_keys = static_cast<int>(num_keys);
  r.valid = p.lengths ? min(max(p.lengths[b], 0), r.num_keys) : r.num_keys;
  r.num_chunks = ceil_div(r.num_keys, p.chunk_size);
  r.used_chunks = ceil_div(r.valid, p.chunk_size);
  return r;
}

// A score as everything here sees it: finite, so that +-inf can serve as sentinels and no comparison meets a NaN.
__device__ inline float sanitized(float u) { return fminf(fmaxf(u, -FLT_MAX), FLT_MAX); }

// Marks are numbered from 1; pool_end(0) is 0. `count` marks reach the row's last pool.
struct Marks {
  std::int64_t chunk_size, window;
  int per_chunk;  // marks of one chunk
  int first;      // raw number (chunk * per_chunk + piece) of mark 0, the last with an empty pool
  int count;

  __host__ __device__ Marks(std::int64_t chunk_size, std::int64_t window, int used_chunks)
      : chunk_size(chunk_size), window(window), per_chunk(ceil_div(chunk_size, kMaxMarkSpan)) {
    // The last raw mark m with floor(m * C / per_chunk) <= w.
    std::int64_t const raw = ((window + 1) * per_chunk + chunk_size - 1) / chunk_size - 1;
    std::int64_t const last = (used_chunks - std::int64_t{1}) * per_chunk;
    first = static_cast<int>(raw < last ? raw : last);
    if (first < 0) first = 0;
    count = last > raw ? static_cast<int>(last - raw) : 0;
  }
  __host__ __device__ int pool_end(int mark) const {
    std::int64_t const raw = std::int64_t{first} + mark;
    std::int64_t const end = raw * chunk_size / per_chunk - window;
    return end > 0 ? static_cast<int>(end) : 0;
  }
  // The chunk whose pool the mark completes, or -1.
  __host__ __device__ int chunk(int mark) const {
    int const raw = first + mark;
    return raw % per_chunk == 0 ? raw / per_chunk : -1;
  }
  // The first chunk with a non-empty pool.
  __host__ __device__ int first_chunk() const { return first / per_chunk + 1; }
  // Keys between two marks, at most.
  __host__ __device__ static int span(std::int64_t chunk_size) {
    int const per_chunk = ceil_div(chunk_size, kMaxMarkSpan);
    return ceil_div(chunk_size, per_chunk);
  }
};

// A key as the ranking sees it: larger scores first, equal scores: the smaller position first.
struct RankedKey {
  float score;
  int position;
};

__host__ __device__ inline bool ranks_after(float score, int position, RankedKey const& other) {
  return score < other.score || (score == other.score && position > other.position);
}

}  // namespace sparsek::cuda::portable
