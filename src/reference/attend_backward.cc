// The specification of attend_backward: the formulas of the header, term by term, in fp64.
#include <cmath>
#include <cstdint>
#include <vector>

#include "problem.hpp"
#include "reference/element.hpp"
#include "reference/visibility.hpp"

namespace sparsek::reference {
namespace {

// The gradients of one (sequence, KV head), summed over the query heads of its group.
struct KeyGradients {
  std::vector<double> dk, dv;         // [num_keys, D]
  std::vector<double> du;             // [num_keys]
  std::vector<double> gate_gradient;  // [num_chunks]: sum over the chunk's queries and their
                                      // selected l in I_c of g_il

  KeyGradients(std::int64_t num_keys, std::int64_t head_dim, std::int64_t num_chunks)
      : dk(num_keys * head_dim), dv(num_keys * head_dim), du(num_keys), gate_gradient(num_chunks) {}
};

// j in I_c: a candidate whose score is strictly between tau and tau + 1. Empty where tau is
// infinite.
bool is_interior(Visibility const& visibility, std::int64_t c, std::int64_t j) {
  double const tau = visibility.threshold(c);
  if (!std::isfinite(tau)) return false;
  double const m = visibility.score(j) - tau;
  return m > 0.0 && m < 1.0 && visibility.is_candidate(c, j);
}

void add_query_row(AttendBackwardProblem const& problem, Visibility const& visibility,
                   std::int64_t b, std::int64_t h, std::int64_t row, KeyGradients& grad) {
  AttendProblem const& p = problem.forward;
  Sequence const& seq = visibility.sequence();
  std::int64_t const kv_head = h / p.group, dim = p.head_dim;
  std::int64_t const i = seq.num_keys - seq.num_queries + row;
  std::int64_t const position = seq.first_q + row;
  std::int64_t const q_row =
      b * p.stride_q_batch + h * p.stride_q_head + position * p.stride_q_position;
  std::int64_t const out_row =
      b * p.stride_out_batch + h * p.stride_out_head + position * p.stride_out_position;
  std::int64_t const dout_row = b * problem.stride_dout_batch + h * problem.stride_dout_head +
                                position * problem.stride_dout_position;
  std::vector<double> dq(dim, 0.0);

  if (i < seq.valid) {
    std::vector<double> q(dim), dout(dim);
    double delta = 0.0;
    for (std::int64_t d = 0; d < dim; ++d) {
      q[d] = load(p.q, p.dtype, q_row + d);
      dout[d] = load(problem.dout, p.dtype, dout_row + d);
      delta += dout[d] * load(p.out, p.dtype, out_row + d);
    }
    double const lse =
        load(p.lse, p.score_dtype,
             b * p.stride_lse_batch + h * p.stride_lse_head + position * p.stride_lse_position);
    std::int64_t const c = visibility.chunk(i);
    for (std::int64_t j = 0; j <= i; ++j) {
      if (!visibility.sees(i, j)) continue;
      std::int64_t const k_row = b * p.stride_k_batch + kv_head * p.stride_k_head +
                                 (seq.first_k + j) * p.stride_k_position;
      std::int64_t const v_row = b * p.stride_v_batch + kv_head * p.stride_v_head +
                                 (seq.first_k + j) * p.stride_v_position;
      double dout_v = 0.0;
      for (std::int64_t d = 0; d < dim; ++d) dout_v += dout[d] * load(p.v, p.dtype, v_row + d);
      double const m = visibility.gate(i, j);
      double const e = std::exp(scaled_dot(p, q_row, k_row) - lse);
      // Softmax gate: p = m e. Value gate: p = e, and v is weighted by m p.
      double const weight = m * e;
      double const ds =
          p.gate == Gate::kValue ? e * (m * dout_v - delta) : weight * (dout_v - delta);
      for (std::int64_t d = 0; d < dim; ++d) {
        dq[d] += p.sm_scale * ds * load(p.k, p.dtype, k_row + d);
        grad.dk[j * dim + d] += p.sm_scale * ds * q[d];
        grad.dv[j * dim + d] += weight * dout[d];
      }
      if (problem.dscores && visibility.is_gated(i, j) && is_interior(visibility, c, j)) {
        double const g = p.gate == Gate::kValue ? e * dout_v : e * (dout_v - delta);
        grad.du[j] += g;
        grad.gate_gradient[c] += g;
      }
    }
  }
  for (std::int64_t d = 0; d < dim; ++d) {
    store(problem.dq, p.dtype,
          b * problem.stride_dq_batch + h * problem.stride_dq_head +
              position * problem.stride_dq_position + d,
          dq[d]);
  }
}

// The threshold moves with the scores: every j in I_c, visible or not, gets -(sum of g over the
// chunk) / |I_c|.
void add_threshold_term(AttendProblem const& p, Visibility const& visibility, KeyGradients& grad) {
  Sequence const& seq = visibility.sequence();
  std::vector<std::int64_t> interior;
  for (std::int64_t c = 0; c * p.chunk_size < seq.valid; ++c) {
    interior.clear();
    for (std::int64_t j = 0; j < visibility.pool_end(c); ++j) {
      if (is_interior(visibility, c, j)) interior.push_back(j);
    }
    for (std::int64_t const j : interior) {
      grad.du[j] -= grad.gate_gradient[c] / static_cast<double>(interior.size());
    }
  }
}

}  // namespace

void attend_backward(AttendBackwardProblem const& problem) {
  AttendProblem const& p = problem.forward;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
      Visibility const visibility(p, b, kv_head);
      Sequence const& seq = visibility.sequence();
      KeyGradients grad(seq.num_keys, p.head_dim, seq.num_keys / p.chunk_size + 1);
      for (std::int64_t h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h) {
        for (std::int64_t row = 0; row < seq.num_queries; ++row) {
          add_query_row(problem, visibility, b, h, row, grad);
        }
      }
      if (problem.dscores && p.gate != Gate::kNone) add_threshold_term(p, visibility, grad);

      for (std::int64_t j = 0; j < seq.num_keys; ++j) {
        std::int64_t const position = seq.first_k + j;
        for (std::int64_t d = 0; d < p.head_dim; ++d) {
          store(problem.dk, p.dtype,
                b * problem.stride_dk_batch + kv_head * problem.stride_dk_head +
                    position * problem.stride_dk_position + d,
                grad.dk[j * p.head_dim + d]);
          store(problem.dv, p.dtype,
                b * problem.stride_dv_batch + kv_head * problem.stride_dv_head +
                    position * problem.stride_dv_position + d,
                grad.dv[j * p.head_dim + d]);
        }
        if (problem.dscores) {
          store(problem.dscores, p.score_dtype,
                b * problem.stride_dscores_batch + kv_head * problem.stride_dscores_head +
                    position * problem.stride_dscores_position,
                grad.du[j]);
        }
      }
    }
  }
}

}  // namespace sparsek::reference
