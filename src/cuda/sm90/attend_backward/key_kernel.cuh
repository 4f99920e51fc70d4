// The key kernels and their launches.
#pragma once
#include <algorithm>

#include "cuda/device/hopper.cuh"
#include "cuda/runtime.hpp"
#include "cuda/sm90/attend_backward/config.hpp"
#include "cuda/sm90/attend_backward/key_consumer.cuh"
#include "cuda/sm90/attend_backward/key_producer.cuh"
#include "cuda/sm90/attend_backward/key_schedule.cuh"

namespace sparsek::cuda::sm90::backward {

template <int kDim, Mode kMode>
__device__ __forceinline__ void init_key_barriers(std::uint32_t smem, int full_keys,
                                                  int empty_keys) {
  using L = KeyLayout<kDim, kMode>;
  auto const init = [&](int i, int count) {
    device::mbarrier_init(smem + L::kBarriers + i * 8, count);
  };
  for (int i = 0; i < L::kStages; ++i) {
    init(kFullPiece + i, 1 + 32), init(kEmptyPiece + i, 8);  // the copy engine, a warp
  }
  for (int i = 0; i < 2; ++i) init(kFullKeys + i, full_keys), init(kEmptyKeys + i, empty_keys);
  init(kReadSlots, 8);
  device::mbarrier_init_fence();
}

template <typename T, int kDim, Mode kMode, bool kValueGate>
__global__ void __launch_bounds__(kThreads, 1)
    window_kernel(__grid_constant__ BackwardParams const p) {
  using L = KeyLayout<kDim, kMode>;
  extern __shared__ __align__(1024) char shared[];
  std::uint32_t const smem = device::shared_address(shared);
  int const warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  if (threadIdx.x == 0) init_key_barriers<kDim, kMode>(smem, 1, 2);
  __syncthreads();
  if (warpgroup == 0) {
    device::decrease_registers<WindowRegisters::kProducerRegisters>();
    KeyProducer<T, kDim, kMode>(p, smem, shared).run_window();
  } else {
    device::increase_registers<WindowRegisters::kConsumerRegisters>();
    KeyConsumer<T, kDim, kMode, kValueGate, false>(p, smem, shared, warpgroup - 1).run_window();
  }
}

template <typename T, int kDim, Mode kMode, bool kValueGate>
__global__ void __launch_bounds__(kThreads, 1)
    slot_kernel(__grid_constant__ BackwardParams const p) {
  using L = KeyLayout<kDim, kMode>;
  extern __shared__ __align__(1024) char shared[];
  std::uint32_t const smem = device::shared_address(shared);
  int const warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  SlotRange range;
  range.set(p, blockIdx.x);
  if (range.first >= range.end) return;
  if (threadIdx.x == 0) init_key_barriers<kDim, kMode>(smem, 128, 8);
  // Slots that were never filled must hold numbers: their weight is 0, and 0 * NaN is not.
  for (int i = threadIdx.x; i < L::kPieces / 16; i += kThreads) {
    reinterpret_cast<int4*>(shared)[i] = make_int4(0, 0, 0, 0);
  }
  if (kMode == Mode::kAligned && threadIdx.x < 128) {
    reinterpret_cast<T*>(shared + L::kOnes)[threadIdx.x] = T(1.f);
  }
  device::fence_async_proxy();
  __syncthreads();
  if (warpgroup == 0) {
    device::decrease_registers<SlotRegisters::kProducerRegisters>();
    KeyProducer<T, kDim, kMode>(p, smem, shared).run_slots(range);
  } else {
    device::increase_registers<SlotRegisters::kConsumerRegisters>();
    KeyConsumer<T, kDim, kMode, kValueGate, true>(p, smem, shared, warpgroup - 1).run_slots(range);
  }
}

template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch_keys(BackwardParams const& p, int num_sms, cudaStream_t stream) {
  constexpr int kBytes = KeyLayout<kDim, kMode>::kBytes;
  auto* const window = &window_kernel<T, kDim, kMode, kValueGate>;
  check(cudaFuncSetAttribute(window, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "window_kernel: shared memory");
  window<<<std::min(num_sms, p.num_key_tiles * p.num_kv_heads), kThreads, kBytes, stream>>>(p);
  check_launch("window_kernel");
  if (p.num_blocks == 0) return;
  auto* const slots = &slot_kernel<T, kDim, kMode, kValueGate>;
  check(cudaFuncSetAttribute(slots, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "slot_kernel: shared memory");
  slots<<<p.batch * p.num_kv_heads * p.num_segments * p.num_blocks, kThreads, kBytes, stream>>>(p);
  check_launch("slot_kernel");
}

}  // namespace sparsek::cuda::sm90::backward
