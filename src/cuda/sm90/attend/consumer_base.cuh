// What the consumer warpgroups of both modes share: the state of 64 query rows, and their way out.
//
// NOTE: counters that only the derived classes use stand there: where they lie decides how the
// compiler schedules the general mode.
#pragma once
#include "cuda/device/hopper.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/consumer_thread.cuh"

namespace sparsek::cuda::sm90 {

template <typename T, int kDim, typename SharedLayout>
class ConsumerBase : protected TileConsumer<Params, SharedLayout> {
  using Base = TileConsumer<Params, SharedLayout>;

 protected:
  using L = SharedLayout;
  static constexpr int kOutRegs = kDim / 2;  // accumulators of the output

  using Base::Base;
  using Base::half_of, Base::p_, Base::quad, Base::row_of, Base::wg_;

  __device__ __forceinline__ int half() const { return half_of(flags_); }
  // This thread's rows of the tile are row() and row() + 8.
  __device__ __forceinline__ int row() const { return row_of(flags_); }

  __device__ __forceinline__ void end_products() { device::named_barrier_arrive(2 - wg_, 256); }
  __device__ __forceinline__ void clear_sums() { s0_ = s1_ = r0_ = r1_ = 0.f; }
  // Raises the reference exponents to n0, n1: earlier weights and sums shrink.
  __device__ __forceinline__ void raise_reference(float n0, float n1) {
    float const c0 = device::exp2_approx(m0_ - n0), c1 = device::exp2_approx(m1_ - n1);
    m0_ = n0, m1_ = n1, l0_ *= c0, l1_ *= c1;
#pragma unroll
    for (int j = 0; j < kOutRegs / 4; ++j) {
      O_[4 * j] *= c0, O_[4 * j + 1] *= c0, O_[4 * j + 2] *= c1, O_[4 * j + 3] *= c1;
    }
  }
  // Of a finished tile's rows r and r + 8, whose sums are complete; -inf where there is no weight.
  // `whole`: they exist. NOTE: this comes late in a product's shadow, so branches and slow paths
  // would be waited for.
  __device__ __forceinline__ void store_lse(TilePlan const& old, int r, bool whole) const {
    float const lse0 = (m0_ + device::log2_approx(l0_)) * 0.69314718f;
    float const lse1 = (m1_ + device::log2_approx(l1_)) * 0.69314718f;
    float* const row = p_.lse + old.lse_offset + r * p_.stride_lse_position;
    if (whole || (r >= old.row_begin && r < old.row_end)) row[0] = lse0;
    if (whole || (r + 8 >= old.row_begin && r + 8 < old.row_end)) {
      row[8 * p_.stride_lse_position] = lse1;
    }
  }
  // Row r of a partly existing tile, from registers; `first`: 0 for row(), 2 for row() + 8.
  __device__ __forceinline__ void store_row(TilePlan const& old, int r, int first, float inverse) {
    if (r < old.row_begin || r >= old.row_end) return;
    char* const row = p_.out_rows + old.batch * p_.stride_out_batch +
                      old.q_head * p_.stride_out_head +
                      static_cast<std::int64_t>(old.q_position + r) * p_.stride_out_position;
#pragma unroll
    for (int j = 0; j < kOutRegs / 4; ++j) {
      int const column = 8 * j + 2 * quad();
      if (column < p_.head_dim) {
        *reinterpret_cast<std::uint32_t*>(row + column * 2) =
            device::pack2<T>(O_[4 * j + first] * inverse, O_[4 * j + first + 1] * inverse);
      }
    }
  }

  float O_[kOutRegs];          // output
  std::uint32_t P_[32];        // weights, the next product's A operand
  std::uint32_t Q_[kDim / 4];  // this tile's queries
  float m0_ = 0.f, m1_ = 0.f, l0_ = 0.f,
        l1_ = 0.f;           // reference exponent and this thread's part of the sum, two rows
  float s0_, s1_, r0_, r1_;  // sums of one block
  int flags_ = 0;
};

}  // namespace sparsek::cuda::sm90
