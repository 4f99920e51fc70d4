// Gathering Hopper attention, host side: what is served, the workspace, the launches.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/portable/attend/attend.hpp"
#include "cuda/portable/attend/params.cuh"
#include "cuda/portable/attend/tile_lists.cuh"
#include "cuda/runtime.hpp"
#include "cuda/sm90/gather/attend.hpp"
#include "cuda/sm90/gather/config.cuh"
#include "cuda/sm90/gather/launch.cuh"
#include "sparsek/error.hpp"

namespace sparsek::cuda::sm90::gather {
namespace {

template <typename T>
cudaError_t launch(portable::AttendParams const& p, int num_sms, cudaStream_t stream) {
  return p.head_dim <= 64 ? launch_gather<T, 64>(p, num_sms, stream)
                          : launch_gather<T, 128>(p, num_sms, stream);
}

}  // namespace

bool attend_supported(AttendProblem const& a, std::string* reason) {
  auto const missing = [&](std::string text) {
    if (reason) *reason = std::move(text);
    return false;
  };
  if (!portable::attend_supported(a, reason)) return false;
  if (a.head_dim > 128 || a.head_dim % 8 != 0)
    return missing("head_dim " + std::to_string(a.head_dim) +
                   ": supported are multiples of 8 up to 128");
  if (a.num_selected < 0) return missing("selections by expiry alone are not supported");
  if (a.chunk_size % kTile != 0 && a.chunk_size < a.seq_len_k)
    return missing("chunk_size " + std::to_string(a.chunk_size) +
                   ": supported are multiples of 128");
  if (portable::choose_source(a) != portable::KeySource::kLists)
    return missing("num_selected " + std::to_string(a.num_selected) +
                   ": supported are less than half of the keys");
  portable::AttendParams const p = portable::make_params(a);
  if (!p.aligned_loads || !p.aligned_stores)
    return missing("rows of q, k, v or out that do not begin at multiples of 16 bytes");
  return true;
}

std::size_t attend_workspace(Context const& context, AttendProblem const& a) {
  return portable::attend_workspace(context, a);
}

void attend(Context const& context, AttendProblem const& a) {
  std::string reason;
  if (!attend_supported(a, &reason)) throw Unsupported(reason);
  std::size_t const bytes = attend_workspace(context, a);
  if (bytes == 0) return;  // nothing to compute
  Workspace const workspace(context, bytes);
  portable::AttendParams params = portable::make_params(a);
  Carver carver(workspace.data());
  portable::lay_out_workspace(a, carver, params);
  cudaStream_t const stream = stream_of(context);
  portable::prepare_tiles(params, stream);
  check_launch("gathering attention: preparing the tiles");
  int const num_sms = properties_of(context.device).num_sms;
  check(a.dtype == DataType::kFloat16 ? launch<__half>(params, num_sms, stream)
                                      : launch<__nv_bfloat16>(params, num_sms, stream),
        "gathering attention");
}

}  // namespace sparsek::cuda::sm90::gather
