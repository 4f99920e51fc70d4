// A consumer warpgroup in aligned mode: 64 query rows of a tile, one 128-key
// block after another.
//
// Every step issues the scores of one block together with the output product of the block before,
// across tiles and heads: first block, slots, last block, next tile's first block ... So the matrix
// units have work while the weights of a block are computed, and the two warpgroups take turns in
// issuing (named barriers 1 and 2).
#pragma once
#include <type_traits>

#include "cuda/device/hopper.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/sm90/attend/barriers.cuh"
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/consumer_base.cuh"
#include "cuda/sm90/attend/scores.cuh"

namespace sparsek::cuda::sm90 {

template <typename T, int kDim>
class Consumer : ConsumerBase<T, kDim, AlignedLayout<kDim>> {
  using Base = ConsumerBase<T, kDim, AlignedLayout<kDim>>;
  using Base::clear_sums, Base::raise_reference, Base::end_products;
  using Base::flags_, Base::half, Base::half_of, Base::row_of;
  using Base::generic_, Base::O_, Base::P_, Base::p_, Base::Q_, Base::scale_, Base::smem_,
      Base::wg_;
  using Base::kOutRegs, Base::plan;
  using Base::m0_, Base::m1_, Base::l0_, Base::l1_, Base::s0_, Base::s1_, Base::r0_, Base::r1_;
  using Base::staging, Base::store_lse, Base::store_row;
  using Base::tid, Base::lane, Base::warp, Base::quad, Base::barrier, Base::wait, Base::release;
  using typename Base::L;
  using typename Base::Staging;
  static constexpr int kK16 = kDim / 16;  // 16-column steps of the score product
  template <int N>
  using Int = std::integral_constant<int, N>;
  using Scores128 = float[64];

  // A tile's first block sets the reference exponent kHeadroom above its row maximum. Later blocks
  // are weighed without looking for a maximum: fp16 has room for weights 2^(kHeadroom + 14) times
  // the first block's largest, and the sums show whether that sufficed. If not, the scores are
  // still there: find the maximum, rescale, weigh again. Each warp decides for itself.
  static constexpr float kHeadroom = 8.f, kSumLimit = 16384.f;

 public:
  __device__ __forceinline__ Consumer(Params const& p, std::uint32_t smem, char* generic, int wg)
      : Base(p, smem, generic, wg) {
    // NOTE: kept in registers; the compiler would work them out again and again.
    queries_ = staging();
    column_ = warp() * 16 + (lane() >> 2) - 2 * quad();
    gates_ = smem + L::kGate + quad() * 32;
    asm volatile("" : "+r"(queries_.first), "+r"(column_), "+r"(gates_));
    desc_k_ = device::matrix_descriptor(smem + L::kKeys, 16, 1024);
    desc_v_ = device::matrix_descriptor(smem + L::kValues, L::kHalfBytes, 1024);
  }

  __device__ __forceinline__ void run() {
    if (wg_ == 1) device::named_barrier_arrive(1, 256);
    load_queries();
    load_plan();
    first_tile();
    for (;;) {
      bool const more = flags_ & kMore, single = flags_ & kSingle;
      if (!single) later_blocks();  // loads the next tile's queries, if there is one
      if (!more) break;
      if (single) load_queries();
      int const old_flags = flags_;
      load_plan();
      next_tile(old_flags);
    }
    last_output();
  }

 private:
  // --- queries and plan --------------------------------------------------------------------------
  // Waits for the next tile's queries and plan. Registers `Q` hold the queries, so that their
  // buffer can stage the output.
  __device__ __forceinline__ void load_queries(std::uint32_t ready = 0) {
    wait_unless(ready, kFullQ + wg_, tiles_);
    std::uint32_t r[4];
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      device::ldmatrix_x4(r, queries_.step(kk));
      Q_[4 * kk] = r[0], Q_[4 * kk + 1] = r[1], Q_[4 * kk + 2] = r[2], Q_[4 * kk + 3] = r[3];
    }
  }
  // NOTE: broadcast, so that the compiler knows that the branches on flags are uniform; else it
  // serialises the products.
  __device__ __forceinline__ void load_plan() {
    flags_ = __shfl_sync(~0u, plan(tiles_).flags, 0);
    ++tiles_;
  }
  __device__ __forceinline__ int num_blocks() const { return flags_ >> kBlocksShift & 15; }
  __device__ __forceinline__ static int first_place(int flags) {
    return flags >> kFirstPlaceShift & 15;
  }
  __device__ __forceinline__ static int last_place(int flags) {
    return flags >> kLastPlaceShift & 15;
  }

  // Barriers are asked ahead, in the shadow of a product, and waited for where the answer was no: an
  // answer takes over 100 cycles.
  __device__ __forceinline__ std::uint32_t test(int i, std::uint32_t phase) const {
    return mbarrier_test(barrier(i), phase & 1);
  }
  __device__ __forceinline__ void wait_unless(std::uint32_t over, int i,
                                              std::uint32_t phase) const {
    mbarrier_wait_unless(over, barrier(i), phase & 1);
  }
  // Keys of the block at `place`, filled for this tile.
  __device__ __forceinline__ void wait_keys(int place, bool phase) const {
    wait(place == L::kWindow ? kFullWindowK : kFullHeadK + place, phase);
  }
  __device__ __forceinline__ void wait_values(int place, bool phase) const {
    wait(place == L::kWindow ? kFullWindowV : kFullHeadV + place, phase);
  }
  __device__ __forceinline__ void wait_first_values() const {
    if (flags_ & kFirstIsFresh) wait_values(first_place(flags_), flags_ & kFirstPhase);
  }
  // A tile's last block, for its output product in the next tile.
  __device__ __forceinline__ static int final_place(int flags) {
    return flags & kSingle ? first_place(flags) : last_place(flags);
  }
  __device__ __forceinline__ void wait_final_values(int flags) const {
    if (flags & (flags & kSingle ? kFirstIsFresh : kLastIsFresh)) {
      wait_values(final_place(flags), flags & (flags & kSingle ? kFirstPhase : kLastPhase));
    }
  }

  // --- products ----------------------------------------------------------------------------------
  // S = Q K^T for the 128 or 64 keys at `place`, or S += where the gates are in S already.
  template <int N, bool kAccumulate>
  __device__ __forceinline__ void multiply_keys(float (&S)[N], int place,
                                                std::bool_constant<kAccumulate>) {
    using Mma = device::Wgmma<T, N, device::BLayout::kKMajor>;
    std::uint64_t const base = desc_k_ + place * (L::kBlockBytes >> 4);
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      std::uint32_t const* const q = Q_ + 4 * kk;
      std::uint64_t const keys = base + (kk & 3) * 2 + (kk >> 2) * (L::kHalfBytes >> 4);
      if (kk == 0 && !kAccumulate)
        Mma::first(S, q[0], q[1], q[2], q[3], keys);
      else
        Mma::next(S, q[0], q[1], q[2], q[3], keys, 1);
    }
    device::wgmma_commit();
  }
  // O (+)= P V for the first kNumKeys keys at `place`.
  template <int kNumKeys>
  __device__ __forceinline__ void multiply_values(int place, bool accumulate, Int<kNumKeys>) {
    using Mma = device::Wgmma<T, kOutRegs, device::BLayout::kNMajor>;
    std::uint64_t const base = desc_v_ + place * (L::kBlockBytes >> 4);
#pragma unroll
    for (int kk = 0; kk < kNumKeys / 16; ++kk) {
      std::uint32_t const* const w = P_ + 4 * kk;
      Mma::next(O_, w[0], w[1], w[2], w[3], base + kk * 128, kk > 0 || accumulate);
    }
    device::wgmma_commit();
  }
  __device__ __forceinline__ void begin_products() {
    device::named_barrier_sync(1 + wg_, 256);
    device::pin(O_), device::pin(P_), device::pin(Q_);
    device::wgmma_fence();
  }

  // --- softmax -----------------------------------------------------------------------------------
  // Weights of keys 16 g ... 16 g + 15.
  template <int N>
  __device__ __forceinline__ void weigh(float (&S)[N], int g) {
#pragma unroll
    for (int i = 8 * g; i < 8 * g + 8; i += 4) {
      float const a = device::exp2_approx(fmaf(S[i], scale_, -m0_));
      float const b = device::exp2_approx(fmaf(S[i + 1], scale_, -m0_));
      float const d = device::exp2_approx(fmaf(S[i + 2], scale_, -m1_));
      float const e = device::exp2_approx(fmaf(S[i + 3], scale_, -m1_));
      s0_ += a, r0_ += b, s1_ += d, r1_ += e;
      P_[i / 2] = device::pack2<T>(a, b), P_[i / 2 + 1] = device::pack2<T>(d, e);
    }
  }
  template <int N>
  __device__ __forceinline__ void weigh_block(float (&S)[N]) {
    clear_sums();
#pragma unroll
    for (int g = 0; g < N / 8; ++g) weigh(S, g);
  }
  template <int N>
  __device__ __forceinline__ void weigh_later(float (&S)[N]) {
    weigh_block(S);
    if (__any_sync(~0u, !(s0_ + r0_ < kSumLimit && s1_ + r1_ < kSumLimit))) {
      float x0, x1;
      row_max(S, scale_, x0, x1);
      raise_reference(fmaxf(m0_, x0 + kHeadroom), fmaxf(m1_, x1 + kHeadroom));
      weigh_block(S);
    }
    l0_ += s0_ + r0_, l1_ += s1_ + r1_;
  }
  // Masks the first block and takes the reference exponent from it.
  __device__ __forceinline__ void set_reference(Scores128& S) {
    if (flags_ & kDiagonalFirst) mask_future<0>(S, 64 * half() + column_, 0);
    row_max(S, scale_, m0_, m1_);
    m0_ += kHeadroom, m1_ += kHeadroom;
  }
  // Weights of the first block; `between` runs after every 16 keys.
  template <typename Between>
  __device__ __forceinline__ void weigh_first(Scores128& S, Between&& between) {
    clear_sums();
#pragma unroll
    for (int g = 0; g < 8; ++g) weigh(S, g), between(g);
    l0_ = s0_ + r0_, l1_ = s1_ + r1_;
  }

  // --- gates -------------------------------------------------------------------------------------
  // The gates are the initial value of the accumulators. They lie there as a thread's accumulators
  // take them, once for each of its rows.
  __device__ __forceinline__ void fetch_gates(Scores128& S, int block) const {
    std::uint32_t const address = gates_ + block * kTile * 8;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float4 const x = device::load_shared_float4(address + (j >> 1) * 128 + (j & 1) * 16);
      S[4 * j] = x.x, S[4 * j + 1] = x.y, S[4 * j + 2] = x.z, S[4 * j + 3] = x.w;
    }
  }

  // --- steps -------------------------------------------------------------------------------------
  // The very first block, not overlapped with anything.
  __device__ __forceinline__ void first_tile() {
    wait_keys(first_place(flags_), flags_ & kFirstPhase);
    Scores128 S;
    device::pin(Q_);
    device::wgmma_fence();
    multiply_keys(S, first_place(flags_), std::false_type{});
    device::wgmma_wait<0>();
    device::pin(S), device::pin(Q_);
    // NOTE: the queries' buffer is given back only now: the product has taken the registers, so
    // every load from it has arrived. A barrier alone does not order ldmatrix before a bulk copy
    // into the same place.
    release(kEmptyQ + wg_);
    after_first_scores();
    set_reference(S);
    weigh_first(S, [](int) {});
    keys_in_last_ = 128;
  }
  // Whether the slots are free when they have been used (not `late`), or the last block has been.
  __device__ __forceinline__ static bool releases_slots(int flags, bool late) {
    return (flags & (kReleaseSlots | kReleaseLate)) ==
           (late ? kReleaseSlots | kReleaseLate : kReleaseSlots);
  }
  // What is free once a first block's scores are there.
  __device__ __forceinline__ void after_first_scores() {
    if (flags_ & kReleaseFirst) release(kEmptyWindowK);
    if ((flags_ & kSingle) && releases_slots(flags_, true)) release(kEmptySlotK);
  }

  // Slots and last block of a tile.
  __device__ __forceinline__ void later_blocks() {
    int const blocks = num_blocks();
    if (blocks > 0) slot_block(Int<0>{}, blocks);
    if (blocks > 1) slot_block(Int<1>{}, blocks);
    if constexpr (L::kMaxBlocks > 2) {
      if (blocks > 2) slot_block(Int<2>{}, blocks);
      if (blocks > 3) slot_block(Int<3>{}, blocks);
    }
    // The last block: the diagonal tile, or the window tile where the diagonal came first.
    if (flags_ & kLastIsFresh) wait_keys(last_place(flags_), flags_ & kLastPhase);
    if (blocks == 0)
      wait_first_values();
    else if (blocks == 1 && (flags_ & kSlotsFresh))
      wait(kFullSlotV, slot_fills_);
    if (flags_ & kDiagonalFirst) {
      last_block<128, false>(blocks);
    } else if (half() == 0) {  // keys 64 ... 127 are in these rows' future
      last_block<64, true>(blocks);
    } else {
      last_block<128, true>(blocks);
    }
    if (blocks > 0 && (flags_ & kReleaseSlots)) ++slot_fills_;
  }

  template <int kBlock>
  __device__ __forceinline__ void slot_block(Int<kBlock>, int blocks) {
    Scores128 S;
    if (kBlock == 0 && (flags_ & kSlotsFresh)) wait_unless(slots_ready_, kFullSlotK, slot_fills_);
    fetch_gates(S, kBlock);
    begin_products();
    device::pin(S);
    multiply_keys(S, kBlock, std::true_type{});
    if constexpr (kBlock == 0) {
      wait_first_values();
    } else if constexpr (kBlock == 1) {
      if (flags_ & kSlotsFresh) wait(kFullSlotV, slot_fills_);
    }
    device::wgmma_fence();
    multiply_values(kBlock == 0 ? first_place(flags_) : kBlock - 1, kBlock > 0, Int<128>{});
    end_products();
    device::wgmma_wait<1>();
    device::pin(S);
    if (kBlock + 1 == blocks && (flags_ & kReleaseSlots)) {
      release(kEmptyGate);
      if (!(flags_ & kReleaseLate)) release(kEmptySlotK);
    }
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (kBlock == 0 && (flags_ & kReleaseFirst)) release(kEmptyWindowV);
    weigh_later(S);
  }

  template <int kKeys, bool kIsDiagonal>
  __device__ __forceinline__ void last_block(int blocks) {
    float S[kKeys / 2];
    begin_products();
    multiply_keys(S, last_place(flags_), std::false_type{});
    device::wgmma_fence();
    multiply_values(blocks > 0 ? blocks - 1 : first_place(flags_), blocks > 0, Int<128>{});
    end_products();
    std::uint32_t const ready = test(kFullQ + wg_, tiles_);
    device::wgmma_wait<1>();
    device::pin(S);
    if (flags_ & kReleaseLast) release(kEmptyWindowK);
    if (releases_slots(flags_, true)) release(kEmptySlotK);
    if constexpr (kIsDiagonal) mask_future<kKeys == 64 ? 0 : 64>(S, 64 * half() + column_, 0);
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (blocks == 0 && (flags_ & kReleaseFirst)) release(kEmptyWindowV);
    if (releases_slots(flags_, false)) release(kEmptySlotV);
    if (flags_ & kMore) load_queries(ready);
    weigh_later(S);
    keys_in_last_ = kKeys;
  }

  // First block of the next tile together with the output of the last block of this one, which
  // finishes it.
  __device__ __forceinline__ void next_tile(int old_flags) {
    int const place = first_place(flags_), old_place = final_place(old_flags);
    bool const old_single = old_flags & kSingle;
    if (flags_ & kFirstIsFresh) wait_keys(place, flags_ & kFirstPhase);
    Scores128 S;
    begin_products();
    multiply_keys(S, place, std::false_type{});
    wait_final_values(old_flags);
    if (keys_in_last_ == 128) {
      device::wgmma_fence();
      multiply_values(old_place, !old_single, Int<128>{});
    } else {
      device::wgmma_fence();
      multiply_values(old_place, !old_single, Int<64>{});
    }
    end_products();
    slots_ready_ = test(kFullSlotK, slot_fills_);
    TilePlan const& old = plan(tiles_ - 2);
    finish(old, old_flags);
    device::wgmma_wait<1>();
    device::pin(S);
    after_first_scores();
    set_reference(S);
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (old_flags & kReleaseLast) release(kEmptyWindowV);
    if (releases_slots(old_flags, true)) release(kEmptySlotV);
    if (is_whole(old_flags)) {
      weigh_first(S, [&](int g) {
        if (g < kK16) stage(g);
      });
      device::fence_async_proxy();
    } else {
      weigh_first(S, [](int) {});
      store_rows(old, old_flags);
    }
    release(kEmptyQ + wg_);
    keys_in_last_ = 128;
  }

  // --- output ------------------------------------------------------------------------------------
  // Sums of the finished tile.
  __device__ __forceinline__ void finish(TilePlan const& old, int old_flags) {
    l0_ += __shfl_xor_sync(~0u, l0_, 1), l1_ += __shfl_xor_sync(~0u, l1_, 1);
    l0_ += __shfl_xor_sync(~0u, l0_, 2), l1_ += __shfl_xor_sync(~0u, l1_, 2);
    inverse0_ = l0_ > 0.f ? device::rcp_approx(l0_) : 0.f;
    inverse1_ = l1_ > 0.f ? device::rcp_approx(l1_) : 0.f;
    if (p_.lse && quad() == 0) {
      store_lse(old, 64 * half_of(old_flags) + column_, is_whole(old_flags));
    }
  }
  // Whether this warpgroup's 64 rows all exist, so that the copy engine can store them.
  __device__ __forceinline__ bool is_whole(int flags) const {
    return flags & (half_of(flags) ? kUpperWhole : kLowerWhole);
  }
  // 16 of the columns, to this warpgroup's part of Q.
  __device__ __forceinline__ void stage(int kk) {
    device::stmatrix_x4(queries_.step(kk),
                        device::pack2<T>(O_[8 * kk] * inverse0_, O_[8 * kk + 1] * inverse0_),
                        device::pack2<T>(O_[8 * kk + 2] * inverse1_, O_[8 * kk + 3] * inverse1_),
                        device::pack2<T>(O_[8 * kk + 4] * inverse0_, O_[8 * kk + 5] * inverse0_),
                        device::pack2<T>(O_[8 * kk + 6] * inverse1_, O_[8 * kk + 7] * inverse1_));
  }
  __device__ __forceinline__ void store_rows(TilePlan const& old, int old_flags) {
    int const r = row_of(old_flags);
    store_row(old, r, 0, inverse0_);
    store_row(old, r + 8, 2, inverse1_);
  }
  // Output of the last block of this block's last tile.
  __device__ __forceinline__ void last_output() {
    wait_final_values(flags_);
    if (keys_in_last_ == 64) {  // one product for both cases
#pragma unroll
      for (int i = 16; i < 32; ++i) P_[i] = 0;
    }
    device::pin(O_), device::pin(P_);
    device::wgmma_fence();
    multiply_values(final_place(flags_), !(flags_ & kSingle), Int<128>{});
    wait(kFullQ + wg_, tiles_);  // the output before has left the buffer
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_);
    TilePlan const& old = plan(tiles_ - 1);
    finish(old, flags_);
    if (is_whole(flags_)) {
#pragma unroll
      for (int kk = 0; kk < kK16; ++kk) stage(kk);
      device::fence_async_proxy();
    } else {
      store_rows(old, flags_);
    }
    release(kEmptyQ + wg_);
  }

  Staging queries_;
  std::uint32_t gates_;
  int column_;  // of the first row, within 64, minus the first column
  std::uint64_t desc_k_, desc_v_;
  float inverse0_, inverse1_;  // of the sums of the tile whose output is being finished
  int keys_in_last_ = 128;
  std::uint32_t tiles_ = 0, slot_fills_ = 0;
  std::uint32_t slots_ready_ = 0;  // whether the next fill of the slots was seen
};

}  // namespace sparsek::cuda::sm90
