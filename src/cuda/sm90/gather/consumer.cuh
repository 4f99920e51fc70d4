// A consumer warpgroup: 64 queries of a tile, one block of 128 keys after another.
//
// A step issues the scores of one block together with the output product of the block before, then
// weighs the scores. The two warpgroups take turns in issuing (named barriers 1 and 2), so that one
// weighs while the other's products run.
#pragma once
#include <math_constants.h>

#include <cstdint>

#include "cuda/device/hopper.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/sm90/gather/config.cuh"

namespace sparsek::cuda::sm90::gather {

template <typename T, int kDim, bool kValueGate>
class Consumer {
  using L = Layout<kDim>;
  using B = Barriers<kDim>;
  static constexpr int kSteps = kDim / 16;   // of the score product
  static constexpr int kOutputs = kDim / 2;  // accumulators of the output
  // A tile's first block sets the reference exponent to its rows' maxima. Later blocks do not look
  // for theirs: a float16 holds weights up to 2^15, and the sums show whether that sufficed. If
  // not, the scores are still there: find the maximum, rescale, weigh again.
  static constexpr float kMaxSum = 32768.f;
  using KeyMma = device::Wgmma<T, 64, device::BLayout::kKMajor>;
  using ValueMma = device::Wgmma<T, kOutputs, device::BLayout::kNMajor>;

 public:
  __device__ __forceinline__ Consumer(portable::AttendParams const& p, std::uint32_t smem,
                                      char* generic, int warpgroup)
      : p_(p), smem_(smem), generic_(generic), warpgroup_(warpgroup) {
    key_descriptor_ = device::matrix_descriptor(smem, 16, 1024);
    value_descriptor_ = device::matrix_descriptor(smem, L::kHalfBytes, 1024);
  }

  __device__ __forceinline__ void run(int num_items) {
    if (warpgroup_ == 1) device::named_barrier_arrive(1, 256);
    for (int x = blockIdx.x; x < num_items; x += gridDim.x) {
      WorkItem const item = locate_item(p_, x);
      if (item.first >= item.last) continue;
      row_ = item.begin + 64 * warpgroup_ + warp() * 16 + lane() / 4;
      if (lane() == 0) set_target(item);
      if (item.first < item.end) {
        // NOTE: broadcast, so that the compiler knows that the loops are uniform; else it
        // serialises the products.
        attend(__shfl_sync(~0u, item.key_first, 0), __shfl_sync(~0u, item.contiguous_blocks, 0),
               __shfl_sync(~0u, item.list_blocks(), 0));
      } else {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) output_[i] = 0.f;
        reference_[0] = reference_[1] = sum_[0] = sum_[1] = 0.f;
      }
      store();
    }
  }

 private:
  __device__ __forceinline__ int lane() const { return threadIdx.x & 31; }
  __device__ __forceinline__ int warp() const { return (threadIdx.x & 127) >> 5; }
  __device__ __forceinline__ int quad() const { return threadIdx.x & 3; }
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return smem_ + L::kBarriers + i * 8;
  }
  __device__ __forceinline__ void release(int i) const {
    __syncwarp();
    if (lane() == 0) device::mbarrier_arrive(barrier(i));
  }
  // Until a block of K or V is there, also for the matrix units: ordinary copies wrote it.
  __device__ __forceinline__ void wait_full(int i, std::uint32_t parity) const {
    device::mbarrier_wait(barrier(i), parity);
    device::fence_async_proxy();
  }

  __device__ __forceinline__ void attend(int key_first, int contiguous, int listed) {
    load_queries();
    sum_[0] = sum_[1] = 0.f;
    reference_[0] = reference_[1] = -CUDART_INF_F;

    {
      float s[64];
      wait_full(B::kFullK + keys_.stage, keys_.parity);
      begin_products();
      multiply_keys<false>(s);
      end_products();
      device::wgmma_wait<0>();
      device::pin(s);
      mask(s, key_first);
      raise_reference<false>(s);
      float sum[2];
      weigh<false>(s, sum);
      sum_[0] = sum[0], sum_[1] = sum[1];
      finish_keys();
    }
    for (int n = 1; n < contiguous; ++n) step<false>(key_first + n * kTile, n > 1);
    for (int n = 0; n < listed; ++n) step<true>(0, contiguous + n > 1);

    wait_full(B::kFullV + values_.stage, values_.parity);
    device::pin(output_), device::pin(weights_);
    device::wgmma_fence();
    multiply_values(contiguous + listed > 1);
    device::wgmma_wait<0>();
    device::pin(output_), device::pin(weights_);
    finish_values();
  }

  // Scores and weights of a block, output product of the block before.
  template <bool kListed>
  __device__ __forceinline__ void step(int first_key, bool accumulate) {
    float s[64];
    wait_full(B::kFullK + keys_.stage, keys_.parity);
    if (kListed) load_bias(s);
    device::mbarrier_wait(barrier(B::kFullV + values_.stage), values_.parity);
    device::fence_async_proxy();
    begin_products();
    if (kListed) device::pin(s), device::wgmma_fence();
    multiply_keys<kListed>(s);
    multiply_values(accumulate);
    end_products();
    device::wgmma_wait<0>();
    device::pin(s), device::pin(output_), device::pin(weights_);
    finish_values();
    if (!kListed) mask(s, first_key);
    float sum[2];
    weigh<kListed>(s, sum);
    if (__any_sync(~0u, !(sum[0] <= kMaxSum && sum[1] <= kMaxSum))) {
      raise_reference<true>(s);
      weigh<kListed>(s, sum);
    }
    sum_[0] += sum[0], sum_[1] += sum[1];
    finish_keys();
  }

  // --- shared memory -----------------------------------------------------------------------------
  __device__ __forceinline__ void load_queries() {
    device::mbarrier_wait(barrier(B::kFullQ), queries_parity_);
    queries_parity_ ^= 1;
    int const r = 64 * warpgroup_ + warp() * 16 + (lane() & 15);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      int const piece = 2 * k + (lane() >> 4);
      std::uint32_t q[4];
      device::ldmatrix_x4(q, smem_ + L::kQ + (piece >> 3) * L::kHalfBytes + r * 128 +
                                 (((piece & 7) ^ (r & 7)) << 4));
      // The sign of the scale; see AttendParams.
#pragma unroll
      for (int i = 0; i < 4; ++i) queries_[4 * k + i] = (q[i] & p_.q_and) ^ p_.q_xor;
    }
    release(B::kEmptyQ);
  }
  __device__ __forceinline__ void finish_keys() {
    release(B::kEmptyK + keys_.stage);
    keys_.advance();
  }
  __device__ __forceinline__ void finish_values() {
    release(B::kEmptyV + values_.stage);
    values_.advance();
  }
  // The gates enter as the scores' initial value.
  __device__ __forceinline__ void load_bias(float (&s)[64]) const {
    auto const* const bias =
        reinterpret_cast<float const*>(generic_ + L::kBias) + keys_.stage * kTile + 2 * quad();
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float2 const b = *reinterpret_cast<float2 const*>(bias + 8 * j);
      s[4 * j] = s[4 * j + 2] = b.x;
      s[4 * j + 1] = s[4 * j + 3] = b.y;
    }
  }

  // --- products ----------------------------------------------------------------------------------
  __device__ __forceinline__ void begin_products() {
    device::named_barrier_sync(1 + warpgroup_, 256);
    device::pin(output_), device::pin(weights_), device::pin(queries_);
    device::wgmma_fence();
  }
  __device__ __forceinline__ void end_products() {
    device::named_barrier_arrive(2 - warpgroup_, 256);
  }
  // S = Q K', or S += where the gates are in S already.
  template <bool kAccumulate>
  __device__ __forceinline__ void multiply_keys(float (&s)[64]) {
    std::uint64_t const block = key_descriptor_ + ((L::kK + keys_.stage * L::kBlockBytes) >> 4);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t const* const q = queries_ + 4 * k;
      std::uint64_t const b = block + (k & 3) * 2 + (k >> 2) * (L::kHalfBytes >> 4);
      if (k == 0 && !kAccumulate) {
        KeyMma::first(s, q[0], q[1], q[2], q[3], b);
      } else {
        KeyMma::next(s, q[0], q[1], q[2], q[3], b, 1);
      }
    }
    device::wgmma_commit();
  }
  // O += P V.
  __device__ __forceinline__ void multiply_values(bool accumulate) {
    std::uint64_t const block = value_descriptor_ + ((L::kV + values_.stage * L::kBlockBytes) >> 4);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      std::uint32_t const* const w = weights_ + 4 * k;
      ValueMma::next(output_, w[0], w[1], w[2], w[3], block + k * 128, k > 0 || accumulate);
    }
    device::wgmma_commit();
  }

  // --- softmax -----------------------------------------------------------------------------------
  // Causal mask of a block of contiguous keys; all of them are in the window of all queries.
  __device__ __forceinline__ void mask(float (&s)[64], int first_key) const {
    if (first_key + kTile <= row_ - lane() / 4 + 1) return;
    int const last = row_ - first_key - 2 * quad();  // of this thread's columns, its first row
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (8 * j > last) s[4 * j] = -CUDART_INF_F;
      if (8 * j + 1 > last) s[4 * j + 1] = -CUDART_INF_F;
      if (8 * j > last + 8) s[4 * j + 2] = -CUDART_INF_F;
      if (8 * j + 1 > last + 8) s[4 * j + 3] = -CUDART_INF_F;
    }
  }

  // Raises the references to the block's maxima and rescales what has been summed, if anything.
  template <bool kRescale>
  __device__ __forceinline__ void raise_reference(float const (&s)[64]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
      for (int j = 1; j < 16; ++j) x = fmaxf(x, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
      x = fmaxf(x * p_.scale_log2, reference_[h]);
      if (x == -CUDART_INF_F) x = 0.f;  // a row that does not exist
      if (kRescale) {
        float const factor = device::exp2_approx(reference_[h] - x);
        sum_[h] *= factor;
#pragma unroll
        for (int j = 0; j < kOutputs / 4; ++j)
          output_[4 * j + 2 * h] *= factor, output_[4 * j + 2 * h + 1] *= factor;
      }
      reference_[h] = x;
    }
  }

  // The weights of a block, rounded for the next product, and this thread's part of their sums.
  template <bool kListed>
  __device__ __forceinline__ void weigh(float const (&s)[64], float (&sum)[2]) {
    auto const* const gate =
        reinterpret_cast<float const*>(generic_ + L::kGate) + keys_.stage * kTile + 2 * quad();
    float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[e] = device::exp2_approx(fmaf(s[4 * j + e], p_.scale_log2, -reference_[e / 2]));
        part[e] += w[e];
      }
      if (kListed && kValueGate) {
        float2 const m = *reinterpret_cast<float2 const*>(gate + 8 * j);
        w[0] *= m.x, w[1] *= m.y, w[2] *= m.x, w[3] *= m.y;
      }
      weights_[2 * j] = device::pack2<T>(w[0], w[1]);
      weights_[2 * j + 1] = device::pack2<T>(w[2], w[3]);
    }
    sum[0] = part[0] + part[1], sum[1] = part[2] + part[3];
  }

  // --- results -----------------------------------------------------------------------------------
  __device__ __forceinline__ StoreTarget& target() const {
    return reinterpret_cast<StoreTarget*>(generic_ + L::kTargets)[4 * warpgroup_ + warp()];
  }
  __device__ __forceinline__ void set_target(WorkItem const& item) const {
    portable::Sequence const& s = item.sequence;
    std::int64_t const row = s.first_query - s.query_offset();
    target() = {2 * (p_.stride_out_batch * s.index + p_.stride_out_head * item.q_head +
                     p_.stride_out_position * row),
                p_.stride_lse_batch * s.index + p_.stride_lse_head * item.q_head +
                    p_.stride_lse_position * row,
                item.first, item.last, item.end};
  }

  __device__ __forceinline__ void store() {
    __syncwarp();
    StoreTarget const to = target();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = sum_[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      int const i = row_ + 8 * h;
      if (i < to.first || i >= to.last) continue;
      bool const empty = i >= to.end;
      float const inverse = 1.f / sum;
      char* const out = static_cast<char*>(p_.out) + to.out + 2 * p_.stride_out_position * i;
#pragma unroll
      for (int j = 0; j < kOutputs / 4; ++j) {
        int const column = 8 * j + 2 * quad();
        float const x = empty ? 0.f : output_[4 * j + 2 * h] * inverse;
        float const y = empty ? 0.f : output_[4 * j + 2 * h + 1] * inverse;
        if (column < p_.head_dim)
          *reinterpret_cast<std::uint32_t*>(out + 2 * column) = device::pack2<T>(x, y);
      }
      if (p_.lse && quad() == 0) {
        constexpr float kLn2 = 0.69314718055994531f;
        p_.lse[to.lse + p_.stride_lse_position * i] =
            empty ? -CUDART_INF_F : (reference_[h] + log2f(sum)) * kLn2;
      }
    }
    __syncwarp();  // before the next tile's target
  }

  portable::AttendParams const& p_;
  std::uint32_t const smem_;
  char* const generic_;
  int const warpgroup_;
  std::uint64_t key_descriptor_, value_descriptor_;
  RingPosition<L::kStagesK> keys_;
  RingPosition<L::kStagesV> values_;
  std::uint32_t queries_parity_ = 0;

  int row_;  // position of this thread's first row; the second is 8 on
  float output_[kOutputs];
  std::uint32_t weights_[32];        // of a block, the next product's A operand
  std::uint32_t queries_[kDim / 4];  // of the tile
  float reference_[2], sum_[2];      // two rows; sum: of this thread's columns
};

}  // namespace sparsek::cuda::sm90::gather
