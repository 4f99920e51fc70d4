#include <cmath>

#include "problem.hpp"
#include "reference/element.hpp"
#include "reference/sequence.hpp"

namespace sparsek::reference {

void key_norm_scores(ScoreProblem const& p) {
  for (std::int64_t b = 0; b < p.batch; ++b) {
    Sequence const seq = key_sequence(b, p.seq_len, 1, p.lengths, p.cu_seqlens_k);
    for (std::int64_t h = 0; h < p.num_kv_heads; ++h) {
      for (std::int64_t j = 0; j < seq.num_keys; ++j) {
        double norm2 = 0.0;
        std::int64_t const row =
            b * p.stride_k_batch + h * p.stride_k_head + (seq.first_k + j) * p.stride_k_position;
        for (std::int64_t d = 0; j < seq.valid && d < p.head_dim; ++d) {
          double const x = load(p.k, p.dtype, row + d);
          norm2 += x * x;
        }
        store(p.scores, p.score_dtype,
              b * p.stride_scores_batch + h * p.stride_scores_head +
                  (seq.first_k + j) * p.stride_scores_position,
              j < seq.valid ? -std::sqrt(norm2) : 0.0);
      }
    }
  }
}

}  // namespace sparsek::reference
