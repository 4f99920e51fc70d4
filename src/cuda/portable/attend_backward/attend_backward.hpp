// Portable attend_backward: the gradients on every architecture since sm_80.
#pragma once
#include <cstddef>
#include <string>

#include "problem.hpp"

namespace sparsek::cuda::portable {

// Whether these kernels serve the problem; otherwise `reason` (if not null) says what is missing
// and what is supported.
bool attend_backward_supported(AttendBackwardProblem const& problem, std::string* reason);

// Bytes that attend_backward takes from the context's allocator.
std::size_t attend_backward_workspace(Context const& context, AttendBackwardProblem const& problem);

// Enqueues, on the context's stream and the current device, all gradients of a supported problem
// but for the thresholds' share (threshold_gradient.hpp):
//   dq, dk, dv          every row; zeros where it does not exist or sees or is seen by nobody
//   dscores             if wanted: the direct term, sum of g_ij over the queries i of the group that
//                       see j as a selected key with a gate strictly between 0 and 1; else 0
//   gate_gradient_sums  if not null: addressed like forward.threshold, the sum of the same g_ij
//                       over the queries of a chunk (of chunks that have any) and all keys
// Throws Unsupported where attend_backward_supported is false, DeviceError where a launch fails.
void attend_backward(Context const& context, AttendBackwardProblem const& problem,
                     float* gate_gradient_sums);

}  // namespace sparsek::cuda::portable
