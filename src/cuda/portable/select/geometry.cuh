// Where a row's keys, chunks and pools lie. A row is one KV head of one sequence.
//
// Pools grow with the chunks: P_c = [0, b_c), b_c = max(0, c * C - w). States are computed at
// *marks* first, by one warp each. Every chunk border is a mark where C is at least kMarkSpan;
// chunks longer than kMaxMarkSpan have extra marks inside, at which the candidate list is trimmed,
// so that it stays short. Of shorter chunks every n-th border is a mark; those between are walked
// key by key (short_chunks.cuh).
#pragma once
#include <cfloat>
#include <cstdint>

#include "problem.hpp"

namespace sparsek::cuda::portable {

inline constexpr int kMarkSpan = 128;  // of chunks shorter than this, as many as fit share a mark
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
  auto const chunk_size = static_cast<unsigned>(p.chunk_size);
  r.num_chunks = static_cast<int>((r.num_keys + chunk_size - 1) / chunk_size);
  r.used_chunks = static_cast<int>((r.valid + chunk_size - 1) / chunk_size);
  return r;
}

// A score as everything here sees it: finite, so that +-inf can serve as sentinels and no
// comparison meets a NaN.
__device__ inline float sanitized(float u) { return fminf(fmaxf(u, -FLT_MAX), FLT_MAX); }

// Marks are numbered from 1; pool_end(0) is 0. `count` marks reach the row's last pool.
struct Marks {
  std::int64_t chunk_size, window;
  int chunks_per_mark;  // > 1: short chunks, several to a mark
  int per_chunk;        // > 1: long chunks, several marks to each
  int last_chunk;       // the row's last one
  int first;            // raw number (in units of mark spans from position -w) of mark 0
  int count;

  __host__ __device__ Marks(std::int64_t chunk_size, std::int64_t window, int used_chunks)
      : chunk_size(chunk_size),
        window(window),
        chunks_per_mark(chunk_size < kMarkSpan ? static_cast<int>(kMarkSpan / chunk_size) : 1),
        per_chunk(ceil_div(chunk_size, kMaxMarkSpan)),
        last_chunk(used_chunks - 1) {
    // Mark 0 is the last one with an empty pool: raw * span <= w.
    std::int64_t const scaled = (window + 1) * per_chunk;
    std::int64_t const span = chunk_size * chunks_per_mark;
    std::int64_t const raw = (scaled + span - 1) / span - 1;
    std::int64_t const last = ceil_div(std::int64_t{last_chunk} * per_chunk, chunks_per_mark);
    bool const any = last_chunk > 0 && last > raw;
    first = static_cast<int>(any ? raw : 0);
    count = static_cast<int>(any ? last - raw : 0);
  }
  __host__ __device__ int pool_end_of_chunk(int chunk) const {
    std::int64_t const end = chunk * chunk_size - window;
    return end > 0 ? static_cast<int>(end) : 0;
  }
  __host__ __device__ int pool_end(int mark) const {
    std::int64_t const raw = std::int64_t{first} + mark;
    std::int64_t end = raw * chunks_per_mark * chunk_size;
    if (per_chunk > 1) end /= per_chunk;
    end -= window;
    std::int64_t const last = last_chunk * chunk_size - window;
    if (end > last) end = last;
    return end > 0 ? static_cast<int>(end) : 0;
  }
  // The last chunk whose pool lies within the mark's.
  __host__ __device__ int chunk(int mark) const {
    int at = (first + mark) * chunks_per_mark;
    if (per_chunk > 1) at /= per_chunk;
    return at < last_chunk ? at : last_chunk;
  }
  // Whether the mark's pool is that of its chunk.
  __host__ __device__ bool completes_chunk(int mark) const {
    return per_chunk == 1 || (first + mark) % per_chunk == 0;
  }
  // The first chunk with a non-empty pool.
  __host__ __device__ int first_chunk() const { return static_cast<int>(window / chunk_size) + 1; }
  // Keys between two marks, at most.
  __host__ __device__ static int span(std::int64_t chunk_size) {
    if (chunk_size < kMarkSpan) return static_cast<int>(kMarkSpan / chunk_size * chunk_size);
    return ceil_div(chunk_size, ceil_div(chunk_size, kMaxMarkSpan));
  }
};

// A key as the ranking sees it: larger scores first, equal scores: the smaller position first.
struct alignas(8) RankedKey {
  float score;
  int position;
};

__host__ __device__ inline bool ranks_after(float score, int position, RankedKey const& other) {
  return score < other.score || (score == other.score && position > other.position);
}

}  // namespace sparsek::cuda::portable
