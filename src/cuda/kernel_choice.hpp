// The choice between the kernels of one CUDA stage: the fastest that serves the problem.
#pragma once
#include <algorithm>
#include <cstddef>
#include <span>
#include <string>

#include "cuda/runtime.hpp"
#include "sparsek/context.hpp"
#include "sparsek/error.hpp"

namespace sparsek::cuda {

// One kernel of a stage, as the choice between them sees it. Run is the type of the function that
// enqueues it.
template <typename Problem, typename Run>
struct StageKernel {
  char const* name;
  Backend backend;  // kPortable or kSm90
  bool (*supported)(Problem const&, std::string* reason);
  std::size_t (*workspace)(Context const&, Problem const&);
  Run* run;
};

template <typename Kernel>
bool is_candidate(Context const& context, Kernel const& kernel) {
  return context.backend == Backend::kAuto || context.backend == kernel.backend;
}

// The first of `kernels`, which come fastest first, that serves the problem, or null. `reason`, if
// not null, collects why faster ones, or all, do not.
template <typename Problem, typename Run>
StageKernel<Problem, Run> const* choose_kernel(Context const& context,
                                               std::span<StageKernel<Problem, Run> const> kernels,
                                               Problem const& p, std::string* reason) {
  int const architecture = properties_of(context.device).compute_capability;
  std::string reasons;
  StageKernel<Problem, Run> const* chosen = nullptr;
  for (auto const& kernel : kernels) {
    if (!is_candidate(context, kernel)) continue;
    std::string why;
    if (kernel.backend == Backend::kSm90 && architecture != 90) {
      why = "needs an sm_90 device, this one is sm_" + std::to_string(architecture);
    } else if (architecture < 80) {
      why = "needs sm_80 or later, this device is sm_" + std::to_string(architecture);
    } else if (kernel.supported(p, &why)) {
      chosen = &kernel;
      break;
    }
    reasons += (reasons.empty() ? "" : "; ") + std::string(kernel.name) + ": " + why;
  }
  if (!chosen && reasons.empty()) {
    reasons = context.backend == Backend::kSm90
                  ? "this build has no Hopper kernels (90a is not among its architectures)"
                  : "backend: expected auto, portable or sm90 on a CUDA device";
  }
  if (reason) *reason = reasons;
  return chosen;
}

// The same, or Unsupported, whose message begins with the stage's name.
template <typename Problem, typename Run>
StageKernel<Problem, Run> const& require_kernel(Context const& context, char const* stage,
                                                std::span<StageKernel<Problem, Run> const> kernels,
                                                Problem const& p) {
  std::string reason;
  auto const* const kernel = choose_kernel(context, kernels, p, &reason);
  if (kernel) return *kernel;
  throw Unsupported(std::string(stage) + ": no CUDA kernel serves this call (" + reason + ")");
}

// Bytes that any candidate takes at most.
//
// NOTE: the question knows shapes only. Tensors whose rows are not aligned may meet another kernel
// at run time than the one that serves aligned ones.
template <typename Problem, typename Run>
std::size_t largest_workspace(Context const& context,
                              std::span<StageKernel<Problem, Run> const> kernels,
                              Problem const& p) {
  std::size_t bytes = 0;
  for (auto const& kernel : kernels) {
    if (is_candidate(context, kernel) && kernel.supported(p, nullptr)) {
      bytes = std::max(bytes, kernel.workspace(context, p));
    }
  }
  return bytes;
}

}  // namespace sparsek::cuda
