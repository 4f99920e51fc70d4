// Portable attention: the forward on every architecture since sm_80.
#pragma once
#include <cstddef>
#include <string>

#include "problem.hpp"

namespace sparsek::cuda::portable {

// Whether this kernel serves the problem; otherwise `reason` (if not null) says what is missing and
// what is supported.
bool attend_supported(AttendProblem const& problem, std::string* reason);

// Bytes that attend takes from the context's allocator.
std::size_t attend_workspace(Context const& context, AttendProblem const& problem);

// Enqueues the attention of a supported problem on the context's stream, on the current device.
// Throws Unsupported where attend_supported is false, DeviceError where a launch fails.
void attend(Context const& context, AttendProblem const& problem);

}  // namespace sparsek::cuda::portable
