// Stage 5, decode, of the CUDA backend as problem.hpp declares it.
#include <string>

#include "cuda/portable/decode/decode.hpp"
#include "cuda/runtime.hpp"
#include "problem.hpp"
#include "sparsek/error.hpp"

namespace sparsek::cuda {

std::string decode_kernel_name(Context const& context, DecodeProblem const& p,
                               std::string* reason) {
  std::string why;
  int const architecture = properties_of(context.device).compute_capability;
  if (context.backend != Backend::kAuto && context.backend != Backend::kPortable) {
    why = "backend: expected auto or portable on a CUDA device";
  } else if (architecture < 80) {
    why = "CUDA decode needs sm_80 or later, this device is sm_" + std::to_string(architecture);
  } else if (portable::decode_supported(p, &why)) {
    return "portable/decode";
  }
  if (reason) *reason = why;
  return "";
}

void decode(Context const& context, DecodeProblem const& p) {
  std::string reason;
  if (decode_kernel_name(context, p, &reason).empty()) {
    throw Unsupported("decode: no CUDA kernel serves this call (" + reason + ")");
  }
  DeviceGuard const guard(context.device);
  portable::decode(context, p);
}

std::size_t decode_workspace(Context const& context, DecodeProblem const& p) {
  return portable::decode_workspace(context, p);
}

}  // namespace sparsek::cuda
