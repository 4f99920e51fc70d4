// A consumer warpgroup of the plain kernel (Pipeline::kPlain, aligned mode): 64 query rows of a
// tile, one 128-key block after another.
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
#include "cuda/sm90/attend/config.hpp"
#include "cuda/sm90/attend/consumer_base.cuh"
#include "cuda/sm90/attend/scores.cuh"

namespace sparsek::cuda::sm90 {

template <typename T, int kDim>
class Consumer : ConsumerBase<T, kDim, Mode::kAligned> {
  using Base = ConsumerBase<T, kDim, Mode::kAligned>;
  using Base::clear_sums, Base::raise_reference, Base::after_first_scores, Base::collect;
  using Base::flags_, Base::queries_pending_;
  using Base::half, Base::half_of, Base::row, Base::row_of;
  using Base::kOutRegs;
  using Base::m0_, Base::m1_, Base::l0_, Base::l1_, Base::s0_, Base::s1_, Base::r0_, Base::r1_;
  using Base::p_, Base::smem_, Base::generic_, Base::wg_;
  using Base::plan, Base::query_address, Base::end_products;
  using Base::scale_;
  using Base::store_lse, Base::store_row, Base::give_back_queries, Base::O_, Base::P_, Base::Q_;
  using Base::tid, Base::lane, Base::warp, Base::quad, Base::barrier, Base::wait, Base::release;
  using typename Base::L;
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
    desc_k_ = device::matrix_descriptor(smem, 16, 1024);
    desc_v_ = device::matrix_descriptor(smem, L::kHalfBytes, 1024);
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
      load_plan();
      next_tile();
    }
    last_output();
  }

 private:
  // --- queries -----------------------------------------------------------------------------------
  // Waits for the next tile's queries and plan. Registers `Q` hold the queries, so that their
  // buffer can stage the output.
  __device__ __forceinline__ void load_queries() {
    wait(kFullQ + wg_, tiles_);
    std::uint32_t r[4];
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      device::ldmatrix_x4(r, query_address(kk));
      Q_[4 * kk] = r[0], Q_[4 * kk + 1] = r[1], Q_[4 * kk + 2] = r[2], Q_[4 * kk + 3] = r[3];
    }
  }
  __device__ __forceinline__ void load_plan() {
    TilePlan const& next = plan(tiles_);
    // NOTE: broadcast, so that the compiler knows that the branches on them are uniform; else it
    // serialises the products.
    flags_ = __shfl_sync(~0u, next.flags, 0);
    blocks_ = __shfl_sync(~0u, next.num_blocks, 0);
    ++tiles_;
  }

  // --- products ----------------------------------------------------------------------------------
  __device__ __forceinline__ std::uint64_t key_descriptor(int base, int kk) const {
    return desc_k_ + (base >> 4) + (kk & 3) * 2 + (kk >> 2) * (L::kHalfBytes >> 4);
  }
  // S = Q K^T for 128 or 64 keys, or S += where the gates are in S already.
  template <int N, bool kAccumulate>
  __device__ __forceinline__ void multiply_keys(float (&S)[N], int base,
                                                std::bool_constant<kAccumulate>) {
    using Mma = device::Wgmma<T, N, device::BLayout::kKMajor>;
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      std::uint32_t const* const q = Q_ + 4 * kk;
      if (kk == 0 && !kAccumulate)
        Mma::first(S, q[0], q[1], q[2], q[3], key_descriptor(base, kk));
      else
        Mma::next(S, q[0], q[1], q[2], q[3], key_descriptor(base, kk), 1);
    }
    device::wgmma_commit();
  }
  // O (+)= P V for the first kKeys keys.
  template <int kKeys>
  __device__ __forceinline__ void multiply_values(int base, bool accumulate, Int<kKeys>) {
    using Mma = device::Wgmma<T, kOutRegs, device::BLayout::kNMajor>;
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      std::uint32_t const* const w = P_ + 4 * kk;
      Mma::next(O_, w[0], w[1], w[2], w[3], desc_v_ + (base >> 4) + kk * 128, kk > 0 || accumulate);
    }
    device::wgmma_commit();
  }
  template <typename Prepare>
  __device__ __forceinline__ void begin_products(Prepare&& prepare) {
    device::named_barrier_sync(1 + wg_, 256);
    prepare();
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

  // --- gates -------------------------------------------------------------------------------------
  // The gates enter as the initial value of the accumulators.
  __device__ __forceinline__ void fetch_gates(float (&X)[32], int block) const {
    std::uint32_t const address =
        smem_ + L::kGate + (slot_uses_ & 1) * L::kGateBytes + block * kTile * 4 + quad() * 16;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      float4 const x = device::load_shared_float4(address + 16 * i);
      X[i] = x.x, X[i + 1] = x.y, X[i + 2] = x.z, X[i + 3] = x.w;
    }
  }
  __device__ __forceinline__ static void spread_gates(Scores128& S, float (&X)[32]) {
    device::pin(X);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      S[4 * j] = S[4 * j + 2] = X[2 * j], S[4 * j + 1] = S[4 * j + 3] = X[2 * j + 1];
    }
  }

  // --- steps -------------------------------------------------------------------------------------
  // The window slot's next use: remembers the parity of its fill for V, waits for K.
  __device__ __forceinline__ void use_window(bool fresh) {
    if (fresh) ++window_fills_;
    wait(kFullWindowK, window_fills_ - 1);
  }

  // Masks a block of the window slot and gives the first reference exponent.
  template <int N>
  __device__ __forceinline__ void mask_first(float (&S)[N]) {
    if (flags_ & kDiagonalFirst) mask_future<0>(S, row(), quad());
  }
  __device__ __forceinline__ void set_reference(Scores128& S) {
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

  // The very first block, not overlapped with anything.
  __device__ __forceinline__ void first_tile() {
    use_window(true);
    Scores128 S;
    device::pin(Q_);
    device::wgmma_fence();
    multiply_keys(S, L::kWindowK, std::false_type{});
    device::wgmma_wait<0>();
    device::pin(S), device::pin(Q_);
    // NOTE: the queries' buffer is given back only now: the product has taken the registers, so
    // every load from it has arrived. A barrier alone does not order ldmatrix before a bulk copy
    // into the same place.
    if (flags_ & kMore) {
      device::named_barrier_sync(3 + wg_, 128);
      if (tid() == 0) device::mbarrier_arrive(barrier(kEmptyQ + wg_));
    }
    after_first_scores();
    mask_first(S);
    set_reference(S);
    weigh_first(S, [](int) {});
    keys_in_last_ = 128;
  }

  // Slots and last block of a tile.
  __device__ __forceinline__ void later_blocks() {
    std::uint32_t const first_fill = window_fills_ - 1;
    for (int block = 0; block < blocks_; ++block) {
      Scores128 S;
      int const k_base = L::kSlotK + block * L::kBlockBytes;
      float X[32];
      wait(kFullGate + (slot_uses_ & 1), slot_uses_ >> 1);
      fetch_gates(X, block);
      wait(kFullSlotK, slot_uses_);
      begin_products([&] { spread_gates(S, X); });
      multiply_keys(S, k_base, std::true_type{});
      if (block == 0)
        wait(kFullWindowV, first_fill);
      else
        wait(kFullSlotV, slot_uses_);
      device::wgmma_fence();
      multiply_values(block == 0 ? L::kWindowV : L::kSlotV + (block - 1) * L::kBlockBytes,
                      block > 0, Int<128>{});
      end_products();
      give_back_queries();
      device::wgmma_wait<1>();
      device::pin(S);
      if (block + 1 == blocks_ && (flags_ & kReleaseSlots)) release(kEmptySlotK);
      device::wgmma_wait<0>();
      device::pin(O_), device::pin(P_), device::pin(Q_);
      if (block == 0) release(kEmptyWindowV);
      weigh_later(S);
    }

    // The last block: the diagonal tile, or the window tile where the diagonal came first.
    if (blocks_ > 0)
      wait(kFullSlotV, slot_uses_);
    else
      wait(kFullWindowV, first_fill);
    int const v_base = blocks_ > 0 ? L::kSlotV + (blocks_ - 1) * L::kBlockBytes : L::kWindowV;
    use_window(true);
    if (flags_ & kDiagonalFirst) {
      last_block<128, false>(v_base);
    } else if (half() == 0) {  // keys 64 ... 127 are in these rows' future
      last_block<64, true>(v_base);
    } else {
      last_block<128, true>(v_base);
    }
  }

  template <int kKeys, bool kIsDiagonal>
  __device__ __forceinline__ void last_block(int v_base) {
    float S[kKeys / 2];
    bool const accumulate = blocks_ > 0;
    begin_products([] {});
    multiply_keys(S, L::kWindowK, std::false_type{});
    device::wgmma_fence();
    multiply_values(v_base, accumulate, Int<128>{});
    end_products();
    give_back_queries();
    device::wgmma_wait<1>();
    device::pin(S);
    if (flags_ & kReleaseLast) release(kEmptyWindowK);
    if constexpr (kIsDiagonal) mask_future<kKeys == 64 ? 0 : 64>(S, row(), quad());
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (blocks_ == 0)
      release(kEmptyWindowV);
    else if (flags_ & kReleaseSlots)
      release(kEmptySlotV);
    if (blocks_ > 0 && (flags_ & kReleaseSlots)) ++slot_uses_;
    if (flags_ & kMore) load_queries();
    weigh_later(S);
    keys_in_last_ = kKeys;
  }

  // First block of the next tile together with the output of the last block of this one, which
  // finishes it.
  __device__ __forceinline__ void next_tile() {
    TilePlan const& old = plan(tiles_ - 2);
    int const old_flags = __shfl_sync(~0u, old.flags, 0);
    bool const old_single = old_flags & kSingle, old_release = old_flags & kReleaseLast;
    std::uint32_t const old_fill = window_fills_ - 1;
    use_window(flags_ & kFirstIsFresh);
    Scores128 S;
    auto const products = [&](auto keys) {
      begin_products([] {});
      multiply_keys(S, L::kWindowK, std::false_type{});
      wait(kFullWindowV, old_fill);
      device::wgmma_fence();
      multiply_values(L::kWindowV, !old_single, keys);
    };
    if (keys_in_last_ == 128)
      products(Int<128>{});
    else
      products(Int<64>{});
    end_products();
    finish();
    device::wgmma_wait<1>();
    device::pin(S);
    after_first_scores();
    mask_first(S), set_reference(S);
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (old_release) release(kEmptyWindowV);
    bool const whole = stores_whole(old);
    weigh_first(S, [&](int g) {
      if (g < kK16 && whole) stage(g);
    });
    store(old, whole);
    keys_in_last_ = 128;
    if (flags_ & kSingle) give_back_queries();
  }

  // --- output ------------------------------------------------------------------------------------
  // Takes over the sums of the finished tile.
  __device__ __forceinline__ void finish() {
    l0_ += __shfl_xor_sync(~0u, l0_, 1), l1_ += __shfl_xor_sync(~0u, l1_, 1);
    l0_ += __shfl_xor_sync(~0u, l0_, 2), l1_ += __shfl_xor_sync(~0u, l1_, 2);
    done_.l0 = l0_, done_.l1 = l1_, done_.m0 = m0_, done_.m1 = m1_;
    done_.i0 = l0_ > 0.f ? __frcp_rn(l0_) : 0.f, done_.i1 = l1_ > 0.f ? __frcp_rn(l1_) : 0.f;
  }
  // Whether this warpgroup's 64 rows all exist, so that the copy engine can store them.
  __device__ __forceinline__ bool stores_whole(TilePlan const& old) const {
    int const begin = 64 * half_of(old.flags);
    return old.row_begin <= begin && old.row_end >= begin + 64;
  }
  // 16 of the columns, to this warpgroup's part of Q.
  __device__ __forceinline__ void stage(int kk) {
    device::stmatrix_x4(query_address(kk),
                        device::pack2<T>(O_[8 * kk] * done_.i0, O_[8 * kk + 1] * done_.i0),
                        device::pack2<T>(O_[8 * kk + 2] * done_.i1, O_[8 * kk + 3] * done_.i1),
                        device::pack2<T>(O_[8 * kk + 4] * done_.i0, O_[8 * kk + 5] * done_.i0),
                        device::pack2<T>(O_[8 * kk + 6] * done_.i1, O_[8 * kk + 7] * done_.i1));
  }
  __device__ __forceinline__ void store(TilePlan const& old, bool whole) {
    int const r = row_of(old.flags);
    if (p_.lse && quad() == 0) {
      store_lse(old, r, done_.l0, done_.m0);
      store_lse(old, r + 8, done_.l1, done_.m1);
    }
    if (whole) {
      device::fence_async_proxy();
      collect();
      if (tid() == 0) {
        int const position = old.q_position + 64 * half_of(old.flags);
        for (int half = 0; half < kDim / 64; ++half) {
          device::tma_store(&p_.out, smem_ + L::kQ + wg_ * L::kQBytes + half * (64 * 128),
                            half * 64, position, old.q_head, old.batch);
        }
        device::tma_store_commit();
      }
    } else {
      store_row(old, r, 0, done_.i0);
      store_row(old, r + 8, 2, done_.i1);
      collect();
    }
    queries_pending_ = flags_ & kMore;
  }
  // Output of the last block of this block's last tile.
  __device__ __forceinline__ void last_output() {
    TilePlan const& old = plan(tiles_ - 1);
    wait(kFullWindowV, window_fills_ - 1);
    bool const accumulate = !(flags_ & kSingle);
    if (keys_in_last_ == 64) {  // one product for both cases
#pragma unroll
      for (int i = 16; i < 32; ++i) P_[i] = 0;
    }
    device::pin(O_), device::pin(P_);
    device::wgmma_fence();
    multiply_values(L::kWindowV, accumulate, Int<128>{});
    if (tid() == 0) device::tma_store_wait_read();
    device::named_barrier_sync(3 + wg_, 128);
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_);
    finish();
    bool const whole = stores_whole(old);
    if (whole) {
#pragma unroll
      for (int kk = 0; kk < kK16; ++kk) stage(kk);
    }
    store(old, whole);
    if (tid() == 0) device::tma_store_wait();
  }

  std::uint64_t desc_k_, desc_v_;

  struct {
    float l0, l1, m0, m1, i0, i1;
  } done_;  // of the tile whose output is being finished
  int blocks_ = 0, keys_in_last_ = 128;
  std::uint32_t tiles_ = 0, window_fills_ = 0, slot_uses_ = 0;
};

}  // namespace sparsek::cuda::sm90
