// key_norm_scores on the CPU: rows of k in ranges of positions, one range per task.
#include <algorithm>
#include <cstdint>

#include "cpu/kernels.hpp"
#include "cpu/sequence.hpp"
#include "cpu/thread_pool.hpp"
#include "problem.hpp"

namespace sparsek::cpu {

void key_norm_scores(Context const& context, ScoreProblem const& p) {
  constexpr std::int64_t kRange = 1024;  // enough work to pay for handing out a task
  std::int64_t const ranges = (p.seq_len + kRange - 1) / kRange;
  std::int64_t const num_tasks = p.batch * p.num_kv_heads * ranges;
  auto const element_bytes = static_cast<std::int64_t>(size_of(p.dtype));
  KernelTable const& table = kernels(active_isa());
  for_each_task(context.num_threads, num_tasks, [&] {
    return [&](std::int64_t task) {
      std::int64_t const row = task / ranges;
      std::int64_t const b = row / p.num_kv_heads, h = row % p.num_kv_heads;
      Sequence const seq = key_sequence(b, p.seq_len, 1, p.lengths, p.cu_seqlens_k);
      std::int64_t const begin = task % ranges * kRange;
      std::int64_t const end = std::min(begin + kRange, seq.num_keys);
      std::int64_t const valid_end =
          std::clamp(seq.valid, std::min(begin, end), std::max(begin, end));
      float* const scores = static_cast<float*>(p.scores) + b * p.stride_scores_batch +
                            h * p.stride_scores_head + seq.first_k * p.stride_scores_position;
      if (begin < valid_end) {
        std::int64_t const offset = b * p.stride_k_batch + h * p.stride_k_head +
                                    (seq.first_k + begin) * p.stride_k_position;
        table.negative_norms(p.dtype, static_cast<std::byte const*>(p.k) + offset * element_bytes,
                             p.stride_k_position, valid_end - begin, p.head_dim,
                             scores + begin * p.stride_scores_position, p.stride_scores_position);
      }
      for (std::int64_t j = valid_end; j < end; ++j) scores[j * p.stride_scores_position] = 0.0F;
    };
  });
}

}  // namespace sparsek::cpu
