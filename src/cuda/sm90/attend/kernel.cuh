// SparseK attention, forward, Hopper: the kernels, one for each mode, and their launch.
#pragma once
#include "cuda/device/hopper.cuh"
#include "cuda/runtime.hpp"
#include "cuda/sm90/attend/bulk_warp.cuh"
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/consumer.cuh"
#include "cuda/sm90/attend/general_consumer.cuh"
#include "cuda/sm90/attend/general_producer.cuh"
#include "cuda/sm90/attend/row_warp.cuh"
#include "cuda/sm90/attend/schedule.cuh"
#include "cuda/sm90/attend/slot_warp.cuh"

namespace sparsek::cuda::sm90 {

// General mode: the producer warps work together.
template <typename T, int kDim, bool kValueGate>
__global__ void __launch_bounds__(kThreads, 1) general_attention(__grid_constant__ Params const p) {
  using L = Layout<kDim, Mode::kGeneral>;
  extern __shared__ __align__(1024) char shared[];
  std::uint32_t const smem = device::shared_address(shared);
  int const warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  Cursor cursor;
  cursor.start(p);
  if (cursor.done()) return;
  if (threadIdx.x == 0) {
    auto const init = [&](int i, int count) {
      device::mbarrier_init(smem + L::kBarriers + i * 8, count);
    };
    constexpr int kConsumerWarps = 8, kProducerThreads = 128;
    for (int wg = 0; wg < 2; ++wg) init(kFullQ + wg, 1), init(kEmptyQ + wg, 1);
    init(kFullWindowK, 1), init(kEmptyWindowK, kConsumerWarps);
    init(kFullWindowV, 1), init(kEmptyWindowV, kConsumerWarps);
    init(kFullSlotK, kProducerThreads), init(kEmptySlotK, kConsumerWarps);
    init(kFullSlotV, kProducerThreads), init(kEmptySlotV, kConsumerWarps);
    init(kFullGate, kProducerThreads), init(kFullGate + 1, kProducerThreads);
    device::mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    device::decrease_registers<L::kProducerRegisters>();
    GeneralProducer<kDim>(p, smem, shared).run(cursor);
  } else {
    device::increase_registers<L::kConsumerRegisters>();
    GeneralConsumer<T, kDim, kValueGate>(p, smem, shared, warpgroup - 1).run();
  }
}

// Aligned mode: each producer warp has one job.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) aligned_attention(__grid_constant__ Params const p) {
  using L = AlignedLayout<kDim>;
  extern __shared__ __align__(1024) char shared[];
  std::uint32_t const smem = device::shared_address(shared);
  int const warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  Cursor cursor;
  cursor.start(p);
  if (cursor.done()) return;
  if (threadIdx.x == 0) {
    auto const init = [&](int i, int count) {
      device::mbarrier_init(smem + L::kBarriers + i * 8, count);
    };
    constexpr int kConsumerWarps = 8;
    for (int i = 0; i < 2; ++i) {
      init(kFullQ + i, 1), init(kEmptyQ + i, kConsumerWarps / 2);
      init(kFullHeadK + i, 1), init(kFullHeadV + i, 1);
      init(kFullRows + i, 1), init(kEmptyRows + i, 2);
    }
    init(kFullWindowK, 1), init(kEmptyWindowK, kConsumerWarps);
    init(kFullWindowV, 1), init(kEmptyWindowV, kConsumerWarps);
    init(kFullSlotK, 2), init(kEmptySlotK, kConsumerWarps);
    init(kFullSlotV, 1), init(kEmptySlotV, kConsumerWarps);
    init(kEmptyGate, kConsumerWarps);
    device::mbarrier_init_fence();
  }
  if (p.num_blocks > 0 && cursor.t > last_early_tile(p)) {
    find_start_keys<kDim, kThreads>(p, shared, cursor, threadIdx.x);
  }
  __syncthreads();
  if (warpgroup == 0) {
    device::decrease_registers<L::kProducerRegisters>();
    switch (__shfl_sync(~0u, threadIdx.x >> 5, 0)) {
      case 0:
        return BulkWarp<kDim>(p, smem, shared).run(cursor);
      case 1:
        return SlotWarp<kDim>(p, smem, shared).run(cursor);
      default:
        return RowWarp<kDim>(p, smem, shared).run(cursor);
    }
  } else {
    device::increase_registers<L::kConsumerRegisters>();
    Consumer<T, kDim>(p, smem, shared, warpgroup - 1).run();
  }
}

// Enqueues one instantiation on the current device.
template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch(Params const& p, int num_sms, cudaStream_t stream) {
  auto const enqueue = [&](void (*kernel)(Params), int bytes, char const* name) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
    kernel<<<num_sms, kThreads, bytes, stream>>>(p);
    check_launch(name);
  };
  if constexpr (kMode == Mode::kAligned) {
    static_assert(!kValueGate, "value gates are not of the aligned mode");
    enqueue(&aligned_attention<T, kDim>, AlignedLayout<kDim>::kBytes, "aligned_attention");
  } else {
    enqueue(&general_attention<T, kDim, kValueGate>, Layout<kDim, kMode>::kBytes,
            "general_attention");
  }
}

}  // namespace sparsek::cuda::sm90
