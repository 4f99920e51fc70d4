// select on the CPU: one pass over every (sequence, KV head), a thread per row, O(S log M) time and
// O(k + M) memory per thread.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>

#include "cpu/min_heap.hpp"
#include "cpu/prefix_threshold.hpp"
#include "cpu/rank.hpp"
#include "cpu/sequence.hpp"
#include "cpu/thread_pool.hpp"
#include "problem.hpp"

namespace sparsek::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Memory of one thread, used for one row after another.
struct Workspace {
  Workspace(std::int64_t num_selected, std::int64_t num_candidates)
      : selected(std::make_unique_for_overwrite<std::uint64_t[]>(num_selected)),
        candidates(std::make_unique_for_overwrite<std::uint64_t[]>(num_candidates)),
        saturated(std::make_unique_for_overwrite<std::int32_t[]>(num_candidates + 1)),
        interior(std::make_unique_for_overwrite<std::int32_t[]>(num_candidates + 1)) {}

  std::unique_ptr<std::uint64_t[]> selected, candidates;
  std::unique_ptr<std::int32_t[]> saturated, interior;
};

struct Row {
  float const* scores;
  std::int64_t stride_scores;
  std::int64_t num_keys, valid;
  std::int32_t* expiry;
  float* threshold;
  std::int32_t* last_candidate;  // or null
};

// Two heaps hold the first k and the first M keys of the pool by rank, the last-ranked one on top.
void select_row(SelectProblem const& p, Row const& row, std::int64_t num_selected,
                std::int64_t num_candidates, Workspace& workspace) {
  MinHeap<std::uint64_t> selected(workspace.selected.get());
  MinHeap<std::uint64_t> candidates(workspace.candidates.get());
  PrefixThreshold threshold(num_selected, num_candidates, workspace.saturated.get(),
                            workspace.interior.get());
  for (std::int64_t j = 0; j < row.num_keys; ++j) {
    row.expiry[j] = static_cast<std::int32_t>(j < row.valid ? row.valid : j);
  }

  float tau = -kInfinity;
  std::int64_t pool_size = 0;
  std::int64_t const num_chunks = (row.num_keys + p.chunk_size - 1) / p.chunk_size;
  for (std::int64_t c = 0; c < num_chunks; ++c) {
    std::int64_t const chunk_begin = c * p.chunk_size;
    if (chunk_begin < row.valid) {
      std::int64_t const boundary = chunk_begin - p.window;
      bool const grew = pool_size < boundary;
      for (; pool_size < boundary; ++pool_size) {
        float const score = row.scores[pool_size * row.stride_scores];
        std::uint64_t const rank = rank_of(score, pool_size);
        std::int64_t evicted = -1;
        if (selected.size() < num_selected) {
          selected.push(rank);
        } else if (num_selected > 0 && selected.min() < rank) {
          evicted = position_of(selected.replace_min(rank));
        } else {
          evicted = pool_size;
        }
        if (evicted >= 0) row.expiry[evicted] = static_cast<std::int32_t>(chunk_begin);
        if (num_selected > 0) threshold.insert(score);
        if (!row.last_candidate) continue;
        if (candidates.size() < num_candidates) {
          candidates.push(rank);
        } else if (num_candidates > 0 && candidates.min() < rank) {
          candidates.replace_min(rank);
        }
      }
      if (grew && pool_size > num_selected) {
        tau = num_selected == 0
                  ? kInfinity
                  : std::max(tau, stored_threshold(threshold.solve(), score_of(selected.min())));
      }
    }
    // Chunks that start at or after the length are never read; they get a defined value all the
    // same.
    row.threshold[c] = chunk_begin < row.valid ? tau : kInfinity;
    if (row.last_candidate) {
      bool const all =
          chunk_begin >= row.valid || pool_size <= num_candidates || num_candidates == 0;
      row.last_candidate[c] = all ? -1 : position_of(candidates.min());
    }
  }
}

}  // namespace

void select(Context const& context, SelectProblem const& p) {
  // A pool never holds more than seq_len keys; larger k and M mean the same as seq_len.
  std::int64_t const num_selected = std::min(p.num_selected, p.seq_len);
  std::int64_t const num_candidates = std::min(p.num_candidates, p.seq_len);
  for_each_task(context.num_threads, p.batch * p.num_kv_heads, [&] {
    return [&p, num_selected, num_candidates,
            workspace = Workspace(num_selected, num_candidates)](std::int64_t task) mutable {
      std::int64_t const b = task / p.num_kv_heads, h = task % p.num_kv_heads;
      Sequence const seq = key_sequence(b, p.seq_len, p.chunk_size, p.lengths, p.cu_seqlens_k);
      std::int64_t const chunk_offset =
          b * p.stride_chunk_batch + h * p.stride_chunk_head + seq.first_chunk;
      Row const row{
          .scores = static_cast<float const*>(p.scores) + b * p.stride_scores_batch +
                    h * p.stride_scores_head + seq.first_k * p.stride_scores_position,
          .stride_scores = p.stride_scores_position,
          .num_keys = seq.num_keys,
          .valid = seq.valid,
          .expiry = p.expiry + b * p.stride_expiry_batch + h * p.stride_expiry_head + seq.first_k,
          .threshold = static_cast<float*>(p.threshold) + chunk_offset,
          .last_candidate = p.last_candidate ? p.last_candidate + chunk_offset : nullptr,
      };
      select_row(p, row, num_selected, num_candidates, workspace);
    };
  });
}

}  // namespace sparsek::cpu
