// The CUDA backend as problem.hpp declares it: the right device, the choice of kernel, then the
// kernel.
#include <iterator>
#include <span>
#include <string>

#include "cuda/kernel_choice.hpp"
#include "cuda/portable/score/key_norm.hpp"
#include "cuda/portable/select/select.hpp"
#include "cuda/runtime.hpp"
#include "problem.hpp"
#include "sparsek/error.hpp"
#if SPARSEK_WITH_PORTABLE_ATTEND
#include "cuda/portable/attend/attend.hpp"
#endif
#if SPARSEK_WITH_SM90_ATTEND
#include "cuda/sm90/attend/attend.hpp"
#endif
#if SPARSEK_WITH_SM90_GATHER
#include "cuda/sm90/gather/attend.hpp"
#endif

namespace sparsek::cuda {
namespace {

using AttendKernel = StageKernel<AttendProblem, void(Context const&, AttendProblem const&)>;

// Fastest first.
constexpr AttendKernel kAttendList[] = {
#if SPARSEK_WITH_SM90_ATTEND
    {"sm90/resident", Backend::kSm90, sm90::attend_supported, sm90::attend_workspace, sm90::attend},
#endif
#if SPARSEK_WITH_SM90_GATHER
    {"sm90/gather", Backend::kSm90, sm90::gather::attend_supported, sm90::gather::attend_workspace,
     sm90::gather::attend},
#endif
#if SPARSEK_WITH_PORTABLE_ATTEND
    {"portable/mma", Backend::kPortable, portable::attend_supported, portable::attend_workspace,
     portable::attend},
#endif
    {nullptr, Backend::kAuto, nullptr, nullptr, nullptr}};  // an array has at least one element
constexpr std::span<AttendKernel const> kAttendKernels(kAttendList, std::size(kAttendList) - 1);

void require_float32_scores(DataType dtype, char const* stage) {
  if (dtype == DataType::kFloat32) return;
  throw Unsupported(std::string(stage) + ": scores: expected float32 on CUDA, got " +
                    name_of(dtype) + " (float64 is served by the reference backend)");
}

}  // namespace

void key_norm_scores(Context const& context, ScoreProblem const& p) {
  require_float32_scores(p.score_dtype, "key_norm_scores");
  DeviceGuard const guard(context.device);
  portable::key_norm_scores(context, p);
}

void select(Context const& context, SelectProblem const& p) {
  require_float32_scores(p.score_dtype, "select");
  DeviceGuard const guard(context.device);
  portable::select(context, p);
}

std::size_t select_workspace(Context const& context, SelectProblem const& p) {
  return portable::select_workspace(context, p);
}

void attend(Context const& context, AttendProblem const& p) {
  AttendKernel const& kernel = require_kernel(context, "attend", kAttendKernels, p);
  DeviceGuard const guard(context.device);
  kernel.run(context, p);
}

std::size_t attend_workspace(Context const& context, AttendProblem const& p) {
  require_kernel(context, "attend", kAttendKernels, p);
  DeviceGuard const guard(context.device);
  return largest_workspace(context, kAttendKernels, p);
}

std::string attend_kernel_name(Context const& context, AttendProblem const& p,
                               std::string* reason) {
  AttendKernel const* const kernel = choose_kernel(context, kAttendKernels, p, reason);
  return kernel ? kernel->name : "";
}

}  // namespace sparsek::cuda
