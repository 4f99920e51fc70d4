// Backward of Hopper attention with resident keys. Plain C++; see
// docs/kernels/attend_backward_sm90.md.
#pragma once
#include <cstddef>
#include <string>

#include "problem.hpp"

namespace sparsek::cuda::sm90 {

// Whether these kernels serve the problem (on a device of compute capability 9.0, which the caller
// checks); if not, `reason` says what stands in the way.
bool attend_backward_supported(AttendBackwardProblem const& problem, std::string* reason);

// Bytes that attend_backward takes from the context's allocator.
std::size_t attend_backward_workspace(Context const& context, AttendBackwardProblem const& problem);

// Enqueues the kernels on the context's stream, on the current device. Writes
//   dq, dk, dv          every row; zeros where rows do not exist or nobody sees them
//   dscores             if wanted, the direct term: sum over the queries of the group that see the
//                       key as a selected one with a gate strictly between 0 and 1 of the gradient
//                       of that gate; 0 elsewhere
//   gate_gradient_sums  if dscores is wanted, float32, addressed like forward.threshold: for each
//                       chunk, the sum of the same gradients over the queries of the chunk and of
//                       the group, and over the keys
// The term through the threshold is not included: it needs no queries, only these sums.
void attend_backward(Context const& context, AttendBackwardProblem const& problem,
                     float* gate_gradient_sums);

}  // namespace sparsek::cuda::sm90
