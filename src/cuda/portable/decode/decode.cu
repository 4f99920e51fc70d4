#include "cuda/portable/decode/decode.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/portable/decode/config.cuh"
#include "cuda/runtime.hpp"
#include "sparsek/error.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;
// Lists of evictions that are longer go to the workspace.
constexpr std::int64_t kMaxSharedAppendLists = 96 * 1024;
constexpr std::int64_t kMaxBlocks = INT32_MAX;

bool is_multiple_of_16_bytes(void const* data, std::initializer_list<std::int64_t> strides) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16) return false;
  return std::all_of(strides.begin(), strides.end(), [](std::int64_t s) { return s % 8 == 0; });
}

// Calls body with the dimensions of the kernel's instance as an integral constant.
template <typename Body>
void with_max_dim(std::int64_t head_dim, Body const& body) {
  if (head_dim <= 64) return body(std::integral_constant<int, 64>{});
  if (head_dim <= 96) return body(std::integral_constant<int, 96>{});
  if (head_dim <= 128) return body(std::integral_constant<int, 128>{});
  body(std::integral_constant<int, 256>{});
}

template <typename T>
void launch(DecodeCall const& call, DecodePlan const& plan, DeviceProperties const& device,
            cudaStream_t stream) {
  with_max_dim(call.problem.head_dim,
               [&](auto max_dim) { launch_decode<T, max_dim>(call, plan, device, stream); });
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
  // NOTE: clusters of 4 and 8 find places for one block on each multiprocessor only: with two, half
  // of them waited until the others had ended, and a step took longer than with half as many.
  std::int64_t const heads = p.batch * p.num_kv_heads;
  std::int64_t const blocks_of_rows = (p.layout.num_rows + kBlockKeys - 1) / kBlockKeys;
  with_max_dim(p.head_dim, [&](auto max_dim) {
    using Config = DecodeConfig<max_dim, 1>;
    plan.cluster_log2 = 0;
    for (std::int64_t size = 2; device.compute_capability >= 90 && size <= kMaxClusterSize;
         size *= 2) {
      std::int64_t const places = (size == 2 ? Config::kClusteredBlocksPerSm : 1) * device.num_sms;
      if (size * heads > places || size * Config::kRowWarps > blocks_of_rows) break;
      ++plan.cluster_log2;
    }
    int const slack = p.q ? Config::Evict::kSlack : AppendEviction::kSlack;
    plan.list_bytes = EvictionLists::bytes(p.layout.num_selected, p.layout.num_candidates, slack);
    plan.lists_in_workspace =
        plan.list_bytes > (p.q ? std::int64_t{Config::kMaxSharedLists} : kMaxSharedAppendLists);
  });
  Carver carver(nullptr);
  if (plan.lists_in_workspace) carver.take<std::byte>(heads * plan.list_bytes);
  plan.workspace_bytes = carver.bytes();
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
  call.kv_heads = Divisor(p.num_kv_heads);
  call.group = Divisor(p.group);
  call.chunk_size = Divisor(p.layout.chunk_size);
  call.ring_rows = Divisor(p.layout.window + p.layout.chunk_size);
  call.cluster_log2 = plan.cluster_log2;
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
