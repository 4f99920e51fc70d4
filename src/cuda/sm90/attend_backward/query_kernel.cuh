// The query kernel and its launch: the forward's schedule and producer with the consumers of dq.
#pragma once
#include "cuda/device/hopper.cuh"
#include "cuda/runtime.hpp"
#include "cuda/sm90/attend/schedule.cuh"
#include "cuda/sm90/attend_backward/config.hpp"
#include "cuda/sm90/attend_backward/query_consumer.cuh"
#include "cuda/sm90/attend_backward/query_producer.cuh"

namespace sparsek::cuda::sm90::backward {

template <typename T, int kDim, Mode kMode, bool kValueGate>
__global__ void __launch_bounds__(kThreads, 1)
    query_kernel(__grid_constant__ BackwardParams const p) {
  using L = Layout<kDim, kMode>;
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
    for (int wg = 0; wg < 2; ++wg) {
      init(kFullQ + wg, 1), init(kEmptyQ + wg, 1), init(kFullGradient + wg, 1);
    }
    init(kFullWindowK, 1), init(kEmptyWindowK, kConsumerWarps);
    init(kFullWindowV, 1), init(kEmptyWindowV, kConsumerWarps);
    init(kFullSlotK, kProducerThreads), init(kEmptySlotK, kConsumerWarps);
    init(kFullSlotV, kProducerThreads), init(kEmptySlotV, kConsumerWarps);
    init(kFullGate, kProducerThreads), init(kFullGate + 1, kProducerThreads);
    device::mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    device::decrease_registers<QueryRegisters::kProducerRegisters>();
    QueryProducer<kDim, kMode>(p, smem, shared).run(cursor);
  } else {
    device::increase_registers<QueryRegisters::kConsumerRegisters>();
    QueryConsumer<T, kDim, kMode, kValueGate>(p, smem, shared, warpgroup - 1).run();
  }
}

template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch_queries(BackwardParams const& p, int num_sms, cudaStream_t stream) {
  constexpr int kBytes = Layout<kDim, kMode>::kBytes;
  auto* const kernel = &query_kernel<T, kDim, kMode, kValueGate>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "query_kernel: shared memory");
  kernel<<<num_sms, kThreads, kBytes, stream>>>(p);
  check_launch("query_kernel");
}

}  // namespace sparsek::cuda::sm90::backward
