// Hopper attention with the selected keys resident in shared memory. Plain C++; see
// docs/kernels/attend_sm90.md.
#pragma once
#include <cstddef>
#include <string>

#include "problem.hpp"

namespace sparsek::cuda::sm90 {

// Whether this kernel serves the problem (on a device of compute capability 9.0, which the caller
// checks); if not, `reason` says what stands in the way.
bool attend_supported(AttendProblem const& problem, std::string* reason);

// Bytes that attend takes from the context's allocator.
std::size_t attend_workspace(Context const& context, AttendProblem const& problem);

// Enqueues the kernel on the context's stream, on the current device.
void attend(Context const& context, AttendProblem const& problem);

}  // namespace sparsek::cuda::sm90
