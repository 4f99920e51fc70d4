// Key-norm scores on the GPU.
#pragma once
#include "problem.hpp"

namespace sparsek::cuda::portable {

// u_j = -||k_j||_2 on the context's stream and the current device.
void key_norm_scores(Context const& context, ScoreProblem const& p);

}  // namespace sparsek::cuda::portable
