// What a thread of a consumer warpgroup knows of itself, and its barriers; and what is common where
// a warpgroup has 64 query rows of a tile. Forward and backward.
#pragma once
#include <cstdint>

#include "cuda/device/hopper.cuh"
#include "cuda/sm90/attend/config.hpp"

namespace sparsek::cuda::sm90 {

// KernelParams has scale_log2, L is the shared memory's layout.
template <typename KernelParams, typename L>
class ConsumerThread {
 protected:
  __device__ __forceinline__ ConsumerThread(KernelParams const& p, std::uint32_t smem,
                                            char* generic, int wg)
      : p_(p), smem_(smem), generic_(generic), wg_(wg), scale_(p.scale_log2) {}

  __device__ __forceinline__ static int tid() { return threadIdx.x & 127; }
  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }
  __device__ __forceinline__ static int warp() { return (threadIdx.x & 127) >> 5; }
  __device__ __forceinline__ static int quad() { return threadIdx.x & 3; }
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return smem_ + L::kBarriers + i * 8;
  }
  __device__ __forceinline__ void wait(int i, std::uint32_t phase) const {
    device::mbarrier_wait(barrier(i), phase & 1);
  }
  __device__ __forceinline__ void release(int i) const {
    __syncwarp();  // the other lanes have read, too
    if (lane() == 0) device::mbarrier_arrive(barrier(i));
  }

  KernelParams const& p_;
  std::uint32_t const smem_;
  char* const generic_;
  int const wg_;
  float const scale_;
};

// A warpgroup with 64 query rows of a tile, which the producer describes by a TilePlan.
template <typename KernelParams, typename L>
class TileConsumer : protected ConsumerThread<KernelParams, L> {
  using Base = ConsumerThread<KernelParams, L>;

 protected:
  using Base::Base;
  using Base::lane, Base::warp, Base::barrier, Base::smem_, Base::generic_, Base::wg_;

  __device__ __forceinline__ TilePlan const& plan(int tile_count) const {
    return reinterpret_cast<TilePlan const*>(generic_ + L::kPlans)[tile_count & 1];
  }
  // Which 64 rows of a tile with these flags: rows 64 * half + ...
  __device__ __forceinline__ int half_of(int flags) const {
    return wg_ ^ (flags & kSwapHalves ? 1 : 0);
  }
  // The first of this thread's two rows there; the other is 8 further on.
  __device__ __forceinline__ int row_of(int flags) const {
    return 64 * half_of(flags) + warp() * 16 + (lane() >> 2);
  }
  // Where this lane's 16 bytes of a 16-column step lie in its warpgroup's part of the queries' buffer.
  struct Staging {
    std::uint32_t first;
    __device__ __forceinline__ std::uint32_t step(int kk) const {
      return (first ^ ((2 * kk & 7) << 4)) + (kk >> 2) * (64 * 128);
    }
  };
  // NOTE: worked out anew wherever it is asked for. Else the compiler keeps all steps' addresses, in
  // local memory where registers are short, which has hardly any cache beside this much shared memory.
  __device__ __forceinline__ Staging staging() const {
    std::uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    std::uint32_t const row = (thread >> 1 & 48) + (thread & 15);
    std::uint32_t const chunk = (thread >> 4 & 1) ^ (thread & 7);
    return {smem_ + L::kQ + wg_ * L::kQBytes + row * 128 + (chunk << 4)};
  }
  // Address of this lane's row in this warpgroup's 64 rows of shared memory for queries; 16-column
  // step kk.
  __device__ __forceinline__ std::uint32_t query_address(int kk) const {
    int const r = warp() * 16 + (lane() & 15);
    std::uint32_t const chunk = (lane() >> 4) ^ (lane() & 7);
    return smem_ + L::kQ + wg_ * L::kQBytes + r * 128 + ((chunk ^ (2 * kk & 7)) << 4) +
           (kk >> 2) * (64 * 128);
  }
};

}  // namespace sparsek::cuda::sm90
