// The CUDA backend as problem.hpp declares it: the right device, the choice of kernel, then the
// kernel.
#include <algorithm>
#include <string>

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

// One attention kernel, as the choice between them sees it.
struct AttendKernel {
  char const* name;
  Backend backend;  // kPortable or kSm90
  bool (*supported)(AttendProblem const&, std::string* reason);
  std::size_t (*workspace)(Context const&, AttendProblem const&);
  void (*run)(Context const&, AttendProblem const&);
};

// Fastest first.
constexpr AttendKernel kAttendKernels[] = {
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
    {nullptr, Backend::kAuto, nullptr, nullptr, nullptr}};  // the list may be empty otherwise

bool is_candidate(Context const& context, AttendKernel const& kernel) {
  return kernel.name && (context.backend == Backend::kAuto || context.backend == kernel.backend);
}

std::string architecture_name(int compute_capability) {
  return "sm_" + std::to_string(compute_capability);
}

// The kernel that serves the problem, or null. `reason` collects why faster ones, or all, do not.
AttendKernel const* choose_attend(Context const& context, AttendProblem const& p,
                                  std::string* reason) {
  int const architecture = properties_of(context.device).compute_capability;
  std::string reasons;
  auto const add = [&](std::string const& kernel, std::string const& why) {
    reasons += (reasons.empty() ? "" : "; ") + kernel + ": " + why;
  };
  AttendKernel const* chosen = nullptr;
  for (AttendKernel const& kernel : kAttendKernels) {
    if (!is_candidate(context, kernel)) continue;
    std::string why;
    if (kernel.backend == Backend::kSm90 && architecture != 90) {
      why = "needs an sm_90 device, this one is " + architecture_name(architecture);
    } else if (architecture < 80) {
      why = "needs sm_80 or later, this device is " + architecture_name(architecture);
    } else if (kernel.supported(p, &why)) {
      chosen = &kernel;
      break;
    }
    add(kernel.name, why);
  }
  if (!chosen && reasons.empty()) {
    reasons = context.backend == Backend::kSm90
                  ? "this build has no Hopper kernels (90a is not among its architectures)"
                  : "backend: expected auto, portable or sm90 on a CUDA device";
  }
  if (reason) *reason = reasons;
  return chosen;
}

AttendKernel const& require_attend(Context const& context, AttendProblem const& p) {
  std::string reason;
  AttendKernel const* const kernel = choose_attend(context, p, &reason);
  if (!kernel) throw Unsupported("attend: no CUDA kernel serves this call (" + reason + ")");
  return *kernel;
}

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
  AttendKernel const& kernel = require_attend(context, p);
  DeviceGuard const guard(context.device);
  kernel.run(context, p);
}

// NOTE: the question knows shapes only. Tensors whose rows are not aligned may meet another kernel
// at run time than the one that serves aligned ones, so the answer is the most that any candidate
// takes.
std::size_t attend_workspace(Context const& context, AttendProblem const& p) {
  require_attend(context, p);
  DeviceGuard const guard(context.device);
  std::size_t bytes = 0;
  for (AttendKernel const& kernel : kAttendKernels) {
    if (is_candidate(context, kernel) && kernel.supported(p, nullptr)) {
      bytes = std::max(bytes, kernel.workspace(context, p));
    }
  }
  return bytes;
}

std::string attend_kernel_name(Context const& context, AttendProblem const& p,
                               std::string* reason) {
  AttendKernel const* const kernel = choose_attend(context, p, reason);
  return kernel ? kernel->name : "";
}

}  // namespace sparsek::cuda
