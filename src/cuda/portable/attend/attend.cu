// Portable attention, host side: what is served, the workspace, the launches.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/portable/attend/attend.hpp"
#include "cuda/portable/attend/launch.cuh"
#include "cuda/portable/attend/params.cuh"
#include "cuda/portable/attend/tile_lists.cuh"
#include "cuda/runtime.hpp"
#include "sparsek/error.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;
// Positions, rounded up to tiles, are 32-bit.
constexpr std::int64_t kMaxSeqLen = std::int64_t{1} << 30;

template <typename T>
cudaError_t launch(AttendParams const& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_attend<T, 64>(p, stream);
  if (p.head_dim <= 96) return launch_attend<T, 96>(p, stream);
  if (p.head_dim <= 128) return launch_attend<T, 128>(p, stream);
  return launch_attend<T, 256>(p, stream);
}

bool is_empty(AttendProblem const& a) {
  return a.batch == 0 || a.seq_len_q == 0 || a.num_q_heads == 0;
}

}  // namespace

bool attend_supported(AttendProblem const& a, std::string* reason) {
  auto const missing = [&](std::string text) {
    if (reason) *reason = std::move(text);
    return false;
  };
  if (a.dtype != DataType::kFloat16 && a.dtype != DataType::kBFloat16)
    return missing(std::string("CUDA attention of ") + name_of(a.dtype) +
                   ": supported are float16 and bfloat16");
  if (a.head_dim < 1 || a.head_dim > kMaxHeadDim)
    return missing("CUDA attention of head_dim " + std::to_string(a.head_dim) +
                   ": supported are 1 to " + std::to_string(kMaxHeadDim));
  if (a.seq_len_k > kMaxSeqLen)
    return missing("CUDA attention of " + std::to_string(a.seq_len_k) +
                   " keys: supported are up to " + std::to_string(kMaxSeqLen));
  // Blocks of a launch and rows of the workspace are counted in 31 bits; tiles are two blocks at
  // most.
  constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 30) - 1;
  if (!is_empty(a) && (count_tiles(a) > kMaxBlocks / a.num_q_heads ||
                       a.batch > kMaxBlocks / (2048 + a.num_kv_heads)))
    return missing("CUDA attention of " + std::to_string(count_tiles(a)) + " query tiles for " +
                   std::to_string(a.num_q_heads) +
                   " heads: supported are up to 2^30 pairs of a tile and a head");
  return true;
}

std::size_t attend_workspace(Context const&, AttendProblem const& a) {
  return is_empty(a) ? 0 : workspace_bytes(a);
}

void attend(Context const& context, AttendProblem const& a) {
  std::string reason;
  if (!attend_supported(a, &reason)) throw Unsupported(reason);
  if (is_empty(a)) return;
  Workspace const workspace(context, workspace_bytes(a));
  AttendParams params = make_params(a);
  Carver carver(workspace.data());
  lay_out_workspace(a, carver, params);
  cudaStream_t const stream = stream_of(context);
  prepare_tiles(params, stream);
  check_launch("portable attention: preparing the tiles");
  check(a.dtype == DataType::kFloat16 ? launch<__half>(params, stream)
                                      : launch<__nv_bfloat16>(params, stream),
        "portable attention");
}

}  // namespace sparsek::cuda::portable
