#include "cuda/portable/decode/decode.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cuda/portable/decode/config.cuh"
#include "cuda/runtime.hpp"
#include "sparsek/error.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;
// Portable; larger clusters need an attribute and are scheduled less well.
constexpr int kMaxClusterSize = 8;
// Blocks that fit on a multiprocessor at up to 128 dimensions, by their shared memory.
constexpr int kBlocksPerSm = 2;
// Lists of evictions that leave room for them; longer ones go to the workspace.
constexpr std::int64_t kMaxSharedLists = 12 * 1024;
constexpr std::int64_t kMaxSharedAppendLists = 96 * 1024;
constexpr std::int64_t kMaxBlocks = INT32_MAX;

bool is_multiple_of_16_bytes(void const* data, std::initializer_list<std::int64_t> strides) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16) return false;
  return std::all_of(strides.begin(), strides.end(), [](std::int64_t s) { return s % 8 == 0; });
}

template <typename T>
void launch(DecodeCall const& call, DecodePlan const& plan, DeviceProperties const& device,
            cudaStream_t stream) {
  std::int64_t const d = call.problem.head_dim;
  if (d <= 64) return launch_decode<T, 64>(call, plan, device, stream);
  if (d <= 96) return launch_decode<T, 96>(call, plan, device, stream);
  if (d <= 128) return launch_decode<T, 128>(call, plan, device, stream);
  return launch_decode<T, 256>(call, plan, device, stream);
}

}  // namespace

bool decode_supported(DecodeProblem const& p, std::string* reason) {
  auto const missing = [&](std::string text) {
    if (reason) *reason = std::move(text);
    return false;
  };
  if (p.dtype != DataType::kFloat16 && p.dtype != DataType::kBFloat16)
    return missing(std::string("CUDA decode of ") + name_of(p.dtype) +
                   ": supported are float16 and bfloat16");
  if (p.head_dim < 8 || p.head_dim > kMaxHeadDim || p.head_dim % 8)
    return missing("CUDA decode of head_dim " + std::to_string(p.head_dim) +
                   ": supported are multiples of 8 from 8 to " + std::to_string(kMaxHeadDim));
  if (p.batch > 0 && p.num_kv_heads > kMaxBlocks / kMaxClusterSize / p.batch)
    return missing("CUDA decode of " + std::to_string(p.batch) + " sequences with " +
                   std::to_string(p.num_kv_heads) +
                   " KV heads: supported are up to 2^28 pairs of them");
  return true;
}

DecodePlan plan_decode(DecodeProblem const& p, DeviceProperties const& device) {
  DecodePlan plan{};
  // A packed call may be a batch of single steps; more tokens than expected only cost time.
  std::int64_t const tokens =
      p.cu_seqlens ? std::max<std::int64_t>(1, p.seq_len - p.batch + 1) : p.seq_len;
  plan.max_query_rows = static_cast<int>(std::min<std::int64_t>(
      INT32_MAX, p.group * std::min({tokens, p.layout.chunk_size, std::int64_t{kMaxRun}})));

  // Few heads: several blocks share one, as long as they find places side by side and each of their
  // warps has rows.
  std::int64_t const heads = p.batch * p.num_kv_heads;
  std::int64_t const warps_of_rows = (p.layout.num_rows + kBlockKeys - 1) / kBlockKeys;
  int const num_warps =
      p.head_dim > 128 ? DecodeConfig<256, 1>::kWarps : DecodeConfig<128, 1>::kWarps;
  plan.cluster_size = 1;
  while (device.compute_capability >= 90 && plan.cluster_size < kMaxClusterSize &&
         2 * plan.cluster_size * heads <= kBlocksPerSm * device.num_sms &&
         2 * plan.cluster_size * num_warps <= warps_of_rows) {
    plan.cluster_size *= 2;
  }

  int const slack = p.q ? DecodeConfig<128, 1>::Evict::kSlack : AppendEviction::kSlack;
  plan.list_bytes = EvictionLists::bytes(p.layout.num_selected, p.layout.num_candidates, slack);
  plan.lists_in_workspace = plan.list_bytes > (p.q ? kMaxSharedLists : kMaxSharedAppendLists);
  plan.workspace_bytes =
      plan.lists_in_workspace ? static_cast<std::size_t>(heads * plan.list_bytes) : 0;
  return plan;
}

std::size_t decode_workspace(Context const& context, DecodeProblem const& p) {
  DeviceProperties const& device = properties_of(context.device);
  DecodeProblem appending = p, attending = p;
  appending.q = nullptr;
  attending.q = &attending;  // only whether it is there counts
  return std::max(plan_decode(appending, device).workspace_bytes,
                  plan_decode(attending, device).workspace_bytes);
}

void decode(Context const& context, DecodeProblem const& p) {
  DeviceProperties const& device = properties_of(context.device);
  DecodePlan const plan = plan_decode(p, device);
  Workspace const workspace(context, plan.workspace_bytes);
  DecodeCall call{};
  call.problem = p;
  call.cluster_size = plan.cluster_size;
  call.aligned_tokens =
      is_multiple_of_16_bytes(p.k, {p.stride_k_batch, p.stride_k_head, p.stride_k_position}) &&
      is_multiple_of_16_bytes(p.v, {p.stride_v_batch, p.stride_v_head, p.stride_v_position});
  call.aligned_queries =
      is_multiple_of_16_bytes(p.q, {p.stride_q_batch, p.stride_q_head, p.stride_q_position}) &&
      is_multiple_of_16_bytes(p.out,
                              {p.stride_out_batch, p.stride_out_head, p.stride_out_position});
  call.lists = plan.lists_in_workspace ? workspace.data() : nullptr;
  call.list_bytes = plan.list_bytes;
  cudaStream_t const stream = stream_of(context);
  if (!p.q) {
    launch_append(call, plan, stream);
  } else if (p.dtype == DataType::kFloat16) {
    launch<__half>(call, plan, device, stream);
  } else {
    launch<__nv_bfloat16>(call, plan, device, stream);
  }
}

}  // namespace sparsek::cuda::portable
