// SparseK attention, forward, Hopper: gathers each tile's keys. See
// docs/kernels/attend_gather_sm90.md.
#pragma once
#include "cuda/sm90/gather/consumer.cuh"
#include "cuda/sm90/gather/producer.cuh"

namespace sparsek::cuda::sm90::gather {

template <typename T, int kDim, bool kValueGate>
__global__ void __launch_bounds__(kThreads, 1)
    gather_kernel(__grid_constant__ portable::AttendParams const p, int num_items) {
  using L = Layout<kDim>;
  using B = Barriers<kDim>;
  extern __shared__ __align__(1024) char storage[];
  std::uint32_t const smem = device::shared_address(storage);
  if (threadIdx.x == 0) {
    auto const init = [&](int i, int count) {
      device::mbarrier_init(smem + L::kBarriers + i * 8, count);
    };
    init(B::kFullQ, 128);
    init(B::kEmptyQ, kConsumerWarps);
    for (int i = 0; i < L::kStagesK; ++i) {
      init(B::kFullK + i, 2 * 128);  // each producer thread for its copies and for its gate
      init(B::kEmptyK + i, kConsumerWarps);
    }
    for (int i = 0; i < L::kStagesV; ++i) {
      init(B::kFullV + i, 128);
      init(B::kEmptyV + i, kConsumerWarps);
    }
    device::mbarrier_init_fence();
  }
  __syncthreads();
  auto const role = static_cast<Role>(threadIdx.x / 128);
  if (role == Role::kKeys) {
    device::decrease_registers<kProducerRegisters>();
    Producer<kDim, true>(p, smem, storage).run(num_items);
  } else if (role == Role::kValues) {
    device::decrease_registers<kProducerRegisters>();
    Producer<kDim, false>(p, smem, storage).run(num_items);
  } else {
    device::increase_registers<kConsumerRegisters>();
    Consumer<T, kDim, kValueGate>(p, smem, storage, role == Role::kUpper).run(num_items);
  }
}

}  // namespace sparsek::cuda::sm90::gather
