// From a validated problem to what the kernels are given.
#pragma once
#include <cstdint>

#include "cuda/portable/attend/geometry.cuh"
#include "cuda/runtime.hpp"
#include "problem.hpp"

namespace sparsek::cuda::portable {

// Tiles of one head: exact for dense batches, an upper bound for packed ones (n queries touch at
// most n / 128 + 2 tiles).
std::int64_t count_tiles(AttendProblem const& problem);

// Lists that hold half of all keys save nothing over walking through them.
KeySource choose_source(AttendProblem const& problem);

// Everything but the workspace.
AttendParams make_params(AttendProblem const& problem);

// Points the parameters at the workspace's parts, or only measures them.
void lay_out_workspace(AttendProblem const& problem, Carver& carver, AttendParams& params);

// Bytes that lay_out_workspace takes.
std::size_t workspace_bytes(AttendProblem const& problem);

}  // namespace sparsek::cuda::portable
