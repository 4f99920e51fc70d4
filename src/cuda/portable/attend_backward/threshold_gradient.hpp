// The share of the scores' gradients that goes through the thresholds: the same behind every kernel
// of attend_backward.
#pragma once
#include <cstddef>
#include <cstdint>

#include "problem.hpp"

namespace sparsek::cuda::portable {

// Chunks c with begin <= c < end have a key in their I_c, counted from its sequence's first chunk.
struct ChunkRange {
  std::int32_t begin, end;
};

// The parts of the workspace.
struct ThresholdGradient {
  float* gate_gradient_sums;  // laid out like threshold: written by the kernel before
  ChunkRange* ranges;         // laid out like expiry
  std::int32_t* support;      // |I_c|, first as its differences: support_per_row for each row
  double* prefix;             // of gbar: laid out like support
};

// Bytes of all parts together; the problem has gates.
std::size_t threshold_gradient_workspace(AttendProblem const& problem);
ThresholdGradient lay_out_threshold_gradient(AttendProblem const& problem, std::byte* workspace);

// dscores_j -= sum over the chunks c with j in I_c of gate_gradient_sums[c] / |I_c|. Enqueued on
// the context's stream, on the current device; throws DeviceError where a launch fails.
void subtract_threshold_gradient(Context const& context, AttendBackwardProblem const& problem,
                                 ThresholdGradient const& parts);

}  // namespace sparsek::cuda::portable
