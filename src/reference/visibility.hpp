// Which keys a query sees and with which gate: what attend and attend_backward share.
#pragma once
#include <algorithm>
#include <cstdint>

#include "problem.hpp"
#include "reference/element.hpp"
#include "reference/sequence.hpp"

namespace sparsek::reference {

// One (sequence, KV head) of a problem.
class Visibility {
 public:
  Visibility(AttendProblem const& p, std::int64_t b, std::int64_t kv_head)
      : p_(p),
        seq_(sequence_of(p, b)),
        expiry_(p.expiry + b * p.stride_expiry_batch + kv_head * p.stride_expiry_head +
                seq_.first_k),
        score_row_(b * p.stride_scores_batch + kv_head * p.stride_scores_head),
        chunk_row_(b * p.stride_chunk_batch + kv_head * p.stride_chunk_head + seq_.first_chunk) {}

  Sequence const& sequence() const { return seq_; }
  std::int64_t chunk(std::int64_t i) const { return i / p_.chunk_size; }
  // End of the pool of chunk c: key b_c is the first of the window.
  std::int64_t pool_end(std::int64_t c) const {
    return std::max<std::int64_t>(0, c * p_.chunk_size - p_.window);
  }
  bool sees(std::int64_t i, std::int64_t j) const { return j <= i && i < expiry_[j]; }
  double score(std::int64_t j) const {
    return load(p_.scores, p_.score_dtype,
                score_row_ + (seq_.first_k + j) * p_.stride_scores_position);
  }
  double threshold(std::int64_t c) const {
    return load(p_.threshold, p_.score_dtype, chunk_row_ + c);
  }
  // Whether the query at position i reaches key j as a selected one (not through the window), where
  // there are gates.
  bool is_gated(std::int64_t i, std::int64_t j) const {
    return p_.gate != Gate::kNone && j < pool_end(chunk(i));
  }
  // m_ij = clip(u_j - tau, 0, 1); 1 for window keys and where tau is -inf.
  double gate(std::int64_t i, std::int64_t j) const {
    return is_gated(i, j) ? std::clamp(score(j) - threshold(chunk(i)), 0.0, 1.0) : 1.0;
  }
  // j in T_c, for j < pool_end(c): it ranks no later than the last candidate.
  bool is_candidate(std::int64_t c, std::int64_t j) const {
    std::int32_t const last = p_.last_candidate[chunk_row_ + c];
    if (last < 0) return true;
    double const u = score(j), u_last = score(last);
    return u > u_last || (u == u_last && j <= last);
  }

 private:
  AttendProblem const& p_;
  Sequence seq_;
  std::int32_t const* expiry_;
  std::int64_t score_row_, chunk_row_;
};

// s_ij = sm_scale q_i . k_j; `q_row` and `k_row` are element offsets.
inline double scaled_dot(AttendProblem const& p, std::int64_t q_row, std::int64_t k_row) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < p.head_dim; ++d) {
    sum += load(p.q, p.dtype, q_row + d) * load(p.k, p.dtype, k_row + d);
  }
  return p.sm_scale * sum;
}

}  // namespace sparsek::reference
