// attend_backward of the CUDA backend: the choice of kernel, the kernel, then the thresholds' share
// of the scores' gradients, which is the same behind every kernel.
#include <cstddef>
#include <iterator>
#include <span>
#include <string>

#include "cuda/kernel_choice.hpp"
#include "cuda/portable/attend_backward/threshold_gradient.hpp"
#include "cuda/runtime.hpp"
#include "problem.hpp"
#if SPARSEK_WITH_PORTABLE_ATTEND_BACKWARD
#include "cuda/portable/attend_backward/attend_backward.hpp"
#endif
#if SPARSEK_WITH_SM90_ATTEND_BACKWARD
#include "cuda/sm90/attend_backward/attend_backward.hpp"
#endif

namespace sparsek::cuda {
namespace {

// Enqueues dq, dk, dv and, if wanted, the direct term of dscores and gate_gradient_sums.
using BackwardKernel =
    StageKernel<AttendBackwardProblem,
                void(Context const&, AttendBackwardProblem const&, float* gate_gradient_sums)>;

// Fastest first.
constexpr BackwardKernel kBackwardList[] = {
#if SPARSEK_WITH_SM90_ATTEND_BACKWARD
    {"sm90/resident", Backend::kSm90, sm90::attend_backward_supported,
     sm90::attend_backward_workspace, sm90::attend_backward},
#endif
#if SPARSEK_WITH_PORTABLE_ATTEND_BACKWARD
    {"portable/mma", Backend::kPortable, portable::attend_backward_supported,
     portable::attend_backward_workspace, portable::attend_backward},
#endif
    {nullptr, Backend::kAuto, nullptr, nullptr, nullptr}};  // an array has at least one element
constexpr std::span<BackwardKernel const> kBackwardKernels(kBackwardList,
                                                           std::size(kBackwardList) - 1);
constexpr char const* kStage = "attend_backward";

// Whether thresholds have gradients at all.
bool has_threshold_term(AttendBackwardProblem const& p) {
  return p.dscores != nullptr && p.forward.gate != Gate::kNone;
}

}  // namespace

void attend_backward(Context const& context, AttendBackwardProblem const& p) {
  BackwardKernel const& kernel = require_kernel(context, kStage, kBackwardKernels, p);
  DeviceGuard const guard(context.device);
  if (!has_threshold_term(p)) {
    kernel.run(context, p, nullptr);
    return;
  }
  Workspace const workspace(context, portable::threshold_gradient_workspace(p.forward));
  auto const parts = portable::lay_out_threshold_gradient(p.forward, workspace.data());
  kernel.run(context, p, parts.gate_gradient_sums);
  portable::subtract_threshold_gradient(context, p, parts);
}

std::size_t attend_backward_workspace(Context const& context, AttendBackwardProblem const& p) {
  require_kernel(context, kStage, kBackwardKernels, p);
  DeviceGuard const guard(context.device);
  std::size_t const threshold_bytes =
      has_threshold_term(p) ? portable::threshold_gradient_workspace(p.forward) : 0;
  return threshold_bytes + largest_workspace(context, kBackwardKernels, p);
}

std::string attend_backward_kernel_name(Context const& context, AttendBackwardProblem const& p,
                                        std::string* reason) {
  BackwardKernel const* const kernel = choose_kernel(context, kBackwardKernels, p, reason);
  return kernel ? kernel->name : "";
}

}  // namespace sparsek::cuda
