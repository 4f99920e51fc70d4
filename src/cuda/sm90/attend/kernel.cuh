// SparseK attention, forward, Hopper: the kernel and its launch.
#pragma once
#include <type_traits>

#include "cuda/device/hopper.cuh"
#include "cuda/runtime.hpp"
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/consumer.cuh"
#include "cuda/sm90/attend/consumer_ahead.cuh"
#include "cuda/sm90/attend/producer.cuh"
#include "cuda/sm90/attend/producer_ahead.cuh"
#include "cuda/sm90/attend/schedule.cuh"

namespace sparsek::cuda::sm90 {

template <typename T, int kDim, Mode kMode, bool kValueGate, Pipeline kPipeline>
__global__ void __launch_bounds__(kThreads, 1)
    resident_attention(__grid_constant__ Params const p) {
  using L = Layout<kDim, kMode>;
  constexpr bool kIsAhead = kPipeline == Pipeline::kAhead;
  static_assert(kIsAhead || kMode == Mode::kAligned);
  using Producing = std::conditional_t<kIsAhead, AheadProducer<kDim, kMode>, Producer<kDim, kMode>>;
  using Consuming =
      std::conditional_t<kIsAhead, AheadConsumer<T, kDim, kMode, kValueGate>, Consumer<T, kDim>>;
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
    Producing(p, smem, shared).run(cursor);
  } else {
    device::increase_registers<L::kConsumerRegisters>();
    Consuming(p, smem, shared, warpgroup - 1).run();
  }
}

// Enqueues one instantiation on the current device.
template <typename T, int kDim, Mode kMode, bool kValueGate, Pipeline kPipeline>
void launch(Params const& p, int num_sms, cudaStream_t stream) {
  constexpr int kBytes = Layout<kDim, kMode>::kBytes;
  auto* const kernel = &resident_attention<T, kDim, kMode, kValueGate, kPipeline>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "resident_attention: shared memory");
  kernel<<<num_sms, kThreads, kBytes, stream>>>(p);
  check_launch("resident_attention");
}

}  // namespace sparsek::cuda::sm90
