// Selection on the GPU: expiry, threshold and last_candidate from scores.
// docs/kernels/select_sm90.md has the account.
#pragma once
#include <cstddef>

#include "problem.hpp"

namespace sparsek::cuda::portable {

std::size_t select_workspace(Context const& context, SelectProblem const& p);
void select(Context const& context, SelectProblem const& p);

}  // namespace sparsek::cuda::portable
