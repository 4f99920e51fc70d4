// Decode on the GPU: appends tokens to state blocks and attends from them.
// docs/kernels/decode_cuda.md has the account.
#pragma once
#include <cstddef>
#include <string>

#include "problem.hpp"

namespace sparsek::cuda::portable {

// Whether the kernels serve the problem; else `reason` says what is missing.
bool decode_supported(DecodeProblem const& p, std::string* reason);
std::size_t decode_workspace(Context const& context, DecodeProblem const& p);
// Appends, and attends where the problem has queries.
void decode(Context const& context, DecodeProblem const& p);

}  // namespace sparsek::cuda::portable
