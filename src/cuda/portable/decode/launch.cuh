// The launcher of the decode kernel's instances.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cuda/portable/decode/config.cuh"
#include "cuda/portable/decode/kernel.cuh"
#include "cuda/runtime.hpp"

namespace sparsek::cuda::portable {

template <typename T, int kMaxDim, int kTiles, int kBlocksPerSm>
void launch_decode_instance(DecodeCall const& call, DeviceProperties const& device,
                            cudaStream_t stream) {
  using Config = DecodeConfig<kMaxDim, kTiles>;
  auto* const kernel = decode_kernel<T, kMaxDim, kTiles, kBlocksPerSm>;
  int const bytes = Config::kSharedBytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "decode: shared memory of the kernel");
  // NOTE: without the hint a multiprocessor may be left with shared memory for one block. What is
  // left over serves as L1, which the loads of rows need.
  std::int64_t const needed =
      kBlocksPerSm * (bytes + std::int64_t{sizeof(typename Config::Shared)} + 2048);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             static_cast<int>(std::min<std::int64_t>(
                                 100, 100 * needed / device.shared_bytes_per_sm + 1))),
        "decode: shared memory of the kernel");

  cudaLaunchConfig_t launch{};
  unsigned const cluster_size = 1u << call.cluster_log2;
  launch.gridDim =
      static_cast<unsigned>(call.problem.batch * call.problem.num_kv_heads) * cluster_size;
  launch.blockDim = Config::kThreads;
  launch.dynamicSmemBytes = bytes;
  launch.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cluster_size, 1, 1};
  launch.attrs = &cluster;
  launch.numAttrs = cluster_size > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&launch, kernel, call), "decode kernel");
}

template <typename T, int kMaxDim, int kTiles>
void launch_decode_tiles(DecodeCall const& call, DeviceProperties const& device,
                         cudaStream_t stream) {
  using Config = DecodeConfig<kMaxDim, kTiles>;
  if (call.cluster_log2 == 0) {
    launch_decode_instance<T, kMaxDim, kTiles, Config::kBlocksPerSm>(call, device, stream);
  } else {
    launch_decode_instance<T, kMaxDim, kTiles, Config::kClusteredBlocksPerSm>(call, device, stream);
  }
}

template <typename T, int kMaxDim>
void launch_decode(DecodeCall const& call, DecodePlan const& plan, DeviceProperties const& device,
                   cudaStream_t stream) {
  // At more than 128 dimensions two tiles do not fit in the registers.
  constexpr int kMaxTiles = kMaxDim <= 128 ? 2 : 1;
  if (plan.max_query_rows <= kTileRows) {
    launch_decode_tiles<T, kMaxDim, 1>(call, device, stream);
  } else {
    launch_decode_tiles<T, kMaxDim, kMaxTiles>(call, device, stream);
  }
}

}  // namespace sparsek::cuda::portable
