// The specification of attend: one query row after another.
#include <cmath>
#include <limits>
#include <vector>

#include "problem.hpp"
#include "reference/element.hpp"
#include "reference/visibility.hpp"

namespace sparsek::reference {
namespace {

struct SeenKey {
  std::int64_t position;
  double s;     // sm_scale q . k
  double gate;  // m
};

}  // namespace

void attend(AttendProblem const& p) {
  std::vector<SeenKey> seen;
  std::vector<double> o(p.head_dim);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.num_q_heads; ++h) {
      std::int64_t const kv_head = h / p.group;
      Visibility const visibility(p, b, kv_head);
      Sequence const& seq = visibility.sequence();
      for (std::int64_t row = 0; row < seq.num_queries; ++row) {
        std::int64_t const i = seq.num_keys - seq.num_queries + row;
        std::int64_t const q_row =
            b * p.stride_q_batch + h * p.stride_q_head + (seq.first_q + row) * p.stride_q_position;
        seen.clear();
        double max = -std::numeric_limits<double>::infinity();
        for (std::int64_t j = 0; i < seq.valid && j <= i; ++j) {
          if (!visibility.sees(i, j)) continue;
          std::int64_t const k_row = b * p.stride_k_batch + kv_head * p.stride_k_head +
                                     (seq.first_k + j) * p.stride_k_position;
          seen.push_back({j, scaled_dot(p, q_row, k_row), visibility.gate(i, j)});
          max = std::max(max, seen.back().s);
        }

        // Softmax gate: p ~ m exp(s), o = sum p v. Value gate: p ~ exp(s), o = sum p m v.
        double denominator = 0.0;
        std::fill(o.begin(), o.end(), 0.0);
        for (SeenKey const& key : seen) {
          double const e = std::exp(key.s - max);
          denominator += p.gate == Gate::kSoftmax ? key.gate * e : e;
          std::int64_t const v_row = b * p.stride_v_batch + kv_head * p.stride_v_head +
                                     (seq.first_k + key.position) * p.stride_v_position;
          for (std::int64_t d = 0; d < p.head_dim; ++d) {
            o[d] += key.gate * e * load(p.v, p.dtype, v_row + d);
          }
        }
        std::int64_t const out_row = b * p.stride_out_batch + h * p.stride_out_head +
                                     (seq.first_q + row) * p.stride_out_position;
        for (std::int64_t d = 0; d < p.head_dim; ++d) {
          store(p.out, p.dtype, out_row + d, denominator > 0.0 ? o[d] / denominator : 0.0);
        }
        if (p.lse) {
          store(p.lse, p.score_dtype,
                b * p.stride_lse_batch + h * p.stride_lse_head +
                    (seq.first_q + row) * p.stride_lse_position,
                denominator > 0.0 ? max + std::log(denominator)
                                  : -std::numeric_limits<double>::infinity());
        }
      }
    }
  }
}

}  // namespace sparsek::reference
