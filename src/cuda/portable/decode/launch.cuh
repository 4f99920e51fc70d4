// The launcher of the decode kernel's instances.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/portable/decode/config.cuh"
#include "cuda/portable/decode/kernel.cuh"
#include "cuda/runtime.hpp"

namespace sparsek::cuda::portable {

template <typename T, int kMaxDim, int kTiles>
void launch_decode_tiles(DecodeCall call, DecodePlan const& plan, DeviceProperties const& device,
                         cudaStream_t stream) {
  using Config = DecodeConfig<kMaxDim, kTiles>;
  auto* const kernel = decode_kernel<T, kMaxDim, kTiles>;
  // As many stages as leave two blocks on a multiprocessor; where not even one block fits with
  // them, fewer.
  std::int64_t const list_bytes = plan.lists_in_workspace ? 0 : plan.list_bytes;
  call.num_stages = Config::kMaxStages;
  while (call.num_stages > Config::kMinStages &&
         Config::shared_bytes(call.num_stages, list_bytes) + sizeof(typename Config::Shared) >
             static_cast<std::size_t>(device.shared_bytes_per_block)) {
    --call.num_stages;
  }
  auto const bytes = static_cast<int>(Config::shared_bytes(call.num_stages, list_bytes));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "decode: shared memory of the kernel");

  cudaLaunchConfig_t launch{};
  launch.gridDim =
      static_cast<unsigned>(call.problem.batch * call.problem.num_kv_heads * call.cluster_size);
  launch.blockDim = Config::kThreads;
  launch.dynamicSmemBytes = bytes;
  launch.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(call.cluster_size), 1, 1};
  launch.attrs = &cluster;
  launch.numAttrs = call.cluster_size > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&launch, kernel, call), "decode kernel");
}

template <typename T, int kMaxDim>
void launch_decode(DecodeCall call, DecodePlan const& plan, DeviceProperties const& device,
                   cudaStream_t stream) {
  // At more than 128 dimensions two tiles do not fit in the registers.
  constexpr int kMaxTiles = kMaxDim <= 128 ? 2 : 1;
  if (plan.max_query_rows <= kTileRows) {
    launch_decode_tiles<T, kMaxDim, 1>(call, plan, device, stream);
  } else {
    launch_decode_tiles<T, kMaxDim, kMaxTiles>(call, plan, device, stream);
  }
}

}  // namespace sparsek::cuda::portable
