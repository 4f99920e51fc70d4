// The specification of select: the pool of every chunk, ranked, and what follows from it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.hpp"
#include "reference/element.hpp"
#include "reference/sequence.hpp"
#include "reference/threshold.hpp"

namespace sparsek::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Key {
  double score;
  std::int64_t position;
};

// Larger scores first; equal scores (-0.0 equals 0.0): the smaller position first.
bool ranks_before(Key const& a, Key const& b) {
  return a.score != b.score ? a.score > b.score : a.position < b.position;
}

// tau as it is stored: rounded down to the scores' dtype, and below the k-th score, so that every
// selected key keeps a positive gate.
double stored_threshold(double kth_score, double below, DataType dtype) {
  double const tau = kth_score + below;
  if (dtype == DataType::kFloat64) return std::min(tau, std::nextafter(kth_score, -kInfinity));
  auto rounded = static_cast<float>(tau);
  if (static_cast<double>(rounded) > tau) rounded = std::nextafterf(rounded, -INFINITY);
  return std::min(rounded, std::nextafterf(static_cast<float>(kth_score), -INFINITY));
}

}  // namespace

void select(SelectProblem const& p) {
  for (std::int64_t b = 0; b < p.batch; ++b) {
    Sequence const seq = sequence_of(p, b);
    for (std::int64_t h = 0; h < p.num_kv_heads; ++h) {
      auto const score = [&](std::int64_t j) {
        return load(p.scores, p.score_dtype,
                    b * p.stride_scores_batch + h * p.stride_scores_head +
                        (seq.first_k + j) * p.stride_scores_position);
      };
      std::int32_t* const expiry =
          p.expiry + b * p.stride_expiry_batch + h * p.stride_expiry_head + seq.first_k;
      std::int64_t const chunk_row =
          b * p.stride_chunk_batch + h * p.stride_chunk_head + seq.first_chunk;

      // A key that no chunk drops lives to the end; one that does not exist is seen by nobody.
      for (std::int64_t j = 0; j < seq.num_keys; ++j) {
        expiry[j] = static_cast<std::int32_t>(j < seq.valid ? seq.valid : j);
      }
      std::int64_t const end = (seq.num_keys + p.chunk_size - 1) / p.chunk_size;
      std::vector<Key> pool;  // P_c, ranked
      std::vector<bool> dropped(seq.num_keys, false);
      std::int64_t pool_end = 0;
      double tau = -kInfinity;
      for (std::int64_t c = 0; c < end && c * p.chunk_size < seq.valid; ++c) {
        for (; pool_end < c * p.chunk_size - p.window; ++pool_end) {
          Key const key{score(pool_end), pool_end};
          pool.insert(std::upper_bound(pool.begin(), pool.end(), key, ranks_before), key);
        }
        auto const pool_size = static_cast<std::int64_t>(pool.size());
        for (std::int64_t r = p.num_selected; r < pool_size; ++r) {
          std::int64_t const j = pool[r].position;
          if (!dropped[j]) expiry[j] = static_cast<std::int32_t>(c * p.chunk_size);
          dropped[j] = true;
        }
        std::int64_t const num_candidates = std::min(p.num_candidates, pool_size);
        if (pool_size > p.num_selected) {
          if (p.num_selected == 0) {
            tau = kInfinity;
          } else {
            std::vector<double> z(num_candidates);
            for (std::int64_t r = 0; r < num_candidates; ++r) z[r] = pool[r].score;
            double const below = threshold_below_kth(z, p.num_selected);
            tau = std::max(tau, stored_threshold(z[p.num_selected - 1], below, p.score_dtype));
          }
        }
        store(p.threshold, p.score_dtype, chunk_row + c, tau);
        if (p.last_candidate) {
          p.last_candidate[chunk_row + c] =
              static_cast<std::int32_t>(pool_size <= p.num_candidates || p.num_candidates == 0
                                            ? -1
                                            : pool[p.num_candidates - 1].position);
        }
      }
      // Chunks that start at or after the length are never read; give them a defined value all the
      // same.
      for (std::int64_t c = (seq.valid + p.chunk_size - 1) / p.chunk_size; c < end; ++c) {
        store(p.threshold, p.score_dtype, chunk_row + c, kInfinity);
        if (p.last_candidate) p.last_candidate[chunk_row + c] = -1;
      }
    }
  }
}

}  // namespace sparsek::reference
