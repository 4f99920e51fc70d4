// Thread-block clusters (sm_90 and later). Before sm_90 every block is alone, and nothing here is
// called.
#pragma once
#include <cstdint>

namespace sparsek::cuda::device {

// Arrives at the cluster's barrier; this thread's writes so far become visible to those that wait.
// All lanes of a warp together.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same without a word about memory: for blocks that only must not leave too early.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Reads what lies at this block's shared address `address` in the shared memory of block `rank`.
__device__ __forceinline__ float4 load_from_rank_x4(std::uint32_t address, int rank) {
  float4 r{};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}\n"
      : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w)
      : "r"(address), "r"(rank)
      : "memory");
#endif
  return r;
}

__device__ __forceinline__ float2 load_from_rank_x2(std::uint32_t address, int rank) {
  float2 r{};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [remote];\n}\n"
      : "=f"(r.x), "=f"(r.y)
      : "r"(address), "r"(rank)
      : "memory");
#endif
  return r;
}

}  // namespace sparsek::cuda::device
