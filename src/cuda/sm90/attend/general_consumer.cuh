// A consumer warpgroup in general mode: 64 query rows of a tile, one 128-key block after another.
//
// Every step issues the scores of one block together with the output product of the block before,
// across tiles and heads: first block, slots, last block, next tile's first block ... So the matrix
// units have work while the weights of a block are computed, and the two warpgroups take turns in
// issuing (named barriers 1 and 2). What can be done in the shadow of the products is done there:
// barriers are asked ahead, the next queries and plan are loaded, keys are masked, maxima found.
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

template <typename T, int kDim, bool kValueGate>
class GeneralConsumer : ConsumerBase<T, kDim, Layout<kDim, Mode::kGeneral>> {
  using Base = ConsumerBase<T, kDim, Layout<kDim, Mode::kGeneral>>;
  using Base::clear_sums, Base::end_products, Base::raise_reference;
  using Base::flags_, Base::half, Base::half_of, Base::row, Base::row_of;
  using Base::kOutRegs, Base::plan, Base::staging, Base::store_lse, Base::store_row;
  using Base::m0_, Base::m1_, Base::l0_, Base::l1_, Base::s0_, Base::s1_, Base::r0_, Base::r1_;
  using Base::O_, Base::P_, Base::p_, Base::Q_, Base::scale_, Base::smem_, Base::wg_;
  using Base::tid, Base::warp, Base::quad, Base::barrier, Base::wait, Base::release;
  using typename Base::L;
  using typename Base::Staging;
  static constexpr int kK16 = kDim / 16;  // 16-column steps of the score product
  template <int N>
  using Int = std::integral_constant<int, N>;
  using Scores128 = float[64];

  // A tile's first block sets the reference exponent kHeadroom above its row maximum. Of later
  // blocks the maximum is found before they are weighed; where it exceeds the reference, that is
  // set kHeadroom above it. (In aligned mode the weights' sums show whether a maximum is needed.
  // Here the gates need the registers in which the scores would wait for that.) Each warp decides
  // for itself.
  static constexpr float kHeadroom = 8.f;
  // Stands for the maximum of a row that has seen no key yet.
  static constexpr float kNoReference = -1e30f;

 public:
  __device__ __forceinline__ GeneralConsumer(Params const& p, std::uint32_t smem, char* generic,
                                             int wg)
      : Base(p, smem, generic, wg) {}

  __device__ __forceinline__ void run() {
    if (wg_ == 1) device::named_barrier_arrive(1, 256);
    wait(kFullQ + wg_, 0);
    load_queries();
    load_plan();
    next_plan();
    load_thresholds();
    first_tile();
    for (;;) {
      if (flags_ & kSingle) {
        if (!(flags_ & kMore)) break;
        wait(kFullQ + wg_, tiles_);
        load_queries();
        load_plan();
      } else {
        later_blocks();  // loads the next tile's queries and plan, if there is one
        if (!(flags_ & kMore)) break;
      }
      next_tile();
    }
    last_output();
  }

 private:
  // --- small things ------------------------------------------------------------------------------
  // Asks ahead; `wait_unless` waits unless the answer was yes.
  __device__ __forceinline__ std::uint32_t test(int i, std::uint32_t parity) const {
    return mbarrier_test(barrier(i), parity & 1);
  }
  __device__ __forceinline__ void wait_unless(std::uint32_t over, int i,
                                              std::uint32_t parity) const {
    mbarrier_wait_unless(over, barrier(i), parity & 1);
  }

  // --- queries -----------------------------------------------------------------------------------
  // The next tile's queries, once they and its plan are there. Registers hold them, so that their
  // buffer can stage the output.
  __device__ __forceinline__ void load_queries() {
    Staging const buffer = staging();
    std::uint32_t r[4];
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      device::ldmatrix_x4(r, buffer.step(kk));
      Q_[4 * kk] = r[0], Q_[4 * kk + 1] = r[1], Q_[4 * kk + 2] = r[2], Q_[4 * kk + 3] = r[3];
    }
  }
  __device__ __forceinline__ void load_plan() {
    // NOTE: broadcast, so that the compiler knows that the branches on them are uniform; else it
    // serialises the products.
    next_flags_ = __shfl_sync(~0u, plan(tiles_).flags, 0);
    ++tiles_;
  }
  // The next tile becomes the current one.
  __device__ __forceinline__ void next_plan() { flags_ = next_flags_; }
  // Thresholds of this thread's two rows, and where their pools end relative to the window tile.
  __device__ __forceinline__ void load_thresholds() {
    TilePlan const& now = plan(tiles_ - 1);
    int const first = now.tile * kTile, last_row = max(now.row_end, 1) - 1;
    float const* const thresholds = p_.threshold + now.chunk_offset;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows that do not exist have the last one's.
      int const chunk = p_.chunks.quotient(first + min(row() + 8 * r, last_row));
      tau_[r] = p_.gated ? thresholds[chunk] : 0.f;
      pool_end_[r] = p_.gated ? chunk * p_.chunk_size - p_.window - first + kTile : -kTile;
    }
  }
  // Gives the queries' buffer back, once the output of the tile before has been read from it.
  __device__ __forceinline__ void give_back_queries() {
    if (!queries_pending_) return;
    queries_pending_ = false;
    if (tid() == 0) {
      device::tma_store_wait_read();
      device::mbarrier_arrive(barrier(kEmptyQ + wg_));
    }
  }
  __device__ __forceinline__ int blocks() const { return flags_ >> kBlocksShift; }

  // --- products ----------------------------------------------------------------------------------
  // Where the matrix units find a block, in units of 16 bytes. NOTE: broadcast, so that it lies in a
  // uniform register and the descriptors of a product's steps are not worked out by every lane.
  __device__ __forceinline__ std::uint32_t place_of(int base) const {
    return __shfl_sync(~0u, (smem_ + base) >> 4, 0);
  }
  // S = Q K^T for 128 or 64 keys.
  template <int N>
  __device__ __forceinline__ void multiply_keys(float (&S)[N], int base) {
    using Mma = device::Wgmma<T, N, device::BLayout::kKMajor>;
    std::uint32_t const first = place_of(base);
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      std::uint32_t const* const q = Q_ + 4 * kk;
      std::uint64_t const keys = device::matrix_descriptor<16, 1024>(
          first + (kk & 3) * 2 + (kk >> 2) * (L::kHalfBytes >> 4));
      if (kk == 0)
        Mma::first(S, q[0], q[1], q[2], q[3], keys);
      else
        Mma::next(S, q[0], q[1], q[2], q[3], keys, 1);
    }
    device::wgmma_commit();
  }
  // O (+)= P V for the first kKeys keys.
  template <int kKeys>
  __device__ __forceinline__ void multiply_values(int base, bool accumulate, Int<kKeys>) {
    using Mma = device::Wgmma<T, kOutRegs, device::BLayout::kNMajor>;
    std::uint32_t const first = place_of(base);
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      std::uint32_t const* const w = P_ + 4 * kk;
      std::uint64_t const values = device::matrix_descriptor<L::kHalfBytes, 1024>(first + kk * 128);
      Mma::next(O_, w[0], w[1], w[2], w[3], values, kk > 0 || accumulate);
    }
    device::wgmma_commit();
  }
  __device__ __forceinline__ void begin_products() {
    device::named_barrier_sync(1 + wg_, 256);
    device::pin(O_), device::pin(P_), device::pin(Q_);
    device::wgmma_fence();
  }

  // --- softmax -----------------------------------------------------------------------------------
  // Which gates weigh a block's columns.
  enum class Columns { kPlain, kSlots, kWindow, kDiagonal };

  // Gates of 4 columns (16 g + 2 q, + 1, + 8, + 9) for this thread's two rows.
  template <Columns kColumns>
  __device__ __forceinline__ void gates_of(int g, int block, float (&m)[2][4]) const {
    int const place = g * 16 + quad() * 4;
    int const base =
        kColumns == Columns::kSlots ? L::kSlotScore + block * kTile * 4 : L::kWindowScore;
    float4 const u = device::load_shared_float4(smem_ + base + place * 4);
    float const score[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        m[r][c] = __saturatef(score[c] - tau_[r]);
        if (kColumns != Columns::kSlots) {
          int const column = 16 * g + 2 * quad() + (c & 1) + (c >> 1) * 8 +
                             (kColumns == Columns::kDiagonal ? kTile : 0);
          if (column >= pool_end_[r]) m[r][c] = 1.f;
        }
      }
    }
  }

  // Weights of keys 16 g ... 16 g + 15.
  template <Columns kColumns, int N>
  __device__ __forceinline__ void weigh(float (&S)[N], int g, int block) {
    float m[2][4];
    constexpr bool kGated = kColumns != Columns::kPlain;
    if (kGated) gates_of<kColumns>(g, block, m);
#pragma unroll
    for (int i = 8 * g; i < 8 * g + 8; i += 4) {
      int const c = (i & 4) >> 1;
      float const a = device::exp2_approx(fmaf(S[i], scale_, -m0_));
      float const b = device::exp2_approx(fmaf(S[i + 1], scale_, -m0_));
      float const d = device::exp2_approx(fmaf(S[i + 2], scale_, -m1_));
      float const e = device::exp2_approx(fmaf(S[i + 3], scale_, -m1_));
      if (!kGated) {
        s0_ += a, r0_ += b, s1_ += d, r1_ += e;
        P_[i / 2] = device::pack2<T>(a, b), P_[i / 2 + 1] = device::pack2<T>(d, e);
      } else {
        float const ma = a * m[0][c], mb = b * m[0][c + 1], md = d * m[1][c], me = e * m[1][c + 1];
        // Value gate: the gate weighs the value, not the normaliser.
        s0_ += kValueGate ? a : ma, r0_ += kValueGate ? b : mb;
        s1_ += kValueGate ? d : md, r1_ += kValueGate ? e : me;
        P_[i / 2] = device::pack2<T>(ma, mb), P_[i / 2 + 1] = device::pack2<T>(md, me);
      }
    }
  }
  template <Columns kColumns, int N>
  __device__ __forceinline__ void weigh_block(float (&S)[N], int block) {
    clear_sums();
#pragma unroll
    for (int g = 0; g < N / 8; ++g) weigh<kColumns>(S, g, block);
  }
  // The block's maxima, in the shadow of the output product.
  template <int N>
  __device__ __forceinline__ void find_maxima(float (&S)[N]) {
    row_max(S, scale_, x0_, x1_);
    // The compiler would not leave them here by itself.
    asm volatile("" : "+f"(x0_), "+f"(x1_));
  }
  template <Columns kColumns, int N>
  __device__ __forceinline__ void weigh_later(float (&S)[N], int block) {
    if (__any_sync(~0u, x0_ > m0_ || x1_ > m1_)) {
      raise_reference(fmaxf(m0_, x0_ + kHeadroom), fmaxf(m1_, x1_ + kHeadroom));
    }
    weigh_block<kColumns>(S, block);
    l0_ += s0_ + r0_, l1_ += s1_ + r1_;
  }

  // --- masks -------------------------------------------------------------------------------------
  // A key is seen by rows before its expiry; `rows_before`: rows from the tile that the expiries
  // count from to this one.
  template <int N>
  __device__ __forceinline__ void mask_expired(float (&S)[N], int expiry_base,
                                               int rows_before) const {
    int const r = row() + rows_before;
#pragma unroll
    for (int g = 0; g < N / 8; ++g) {
      uint2 const e = device::load_shared_uint2(smem_ + expiry_base + (g * 16 + quad() * 4) * 2);
      int const until[4] = {static_cast<int>(e.x & 0xffff), static_cast<int>(e.x >> 16),
                            static_cast<int>(e.y & 0xffff), static_cast<int>(e.y >> 16)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int const i = 8 * g + (c >> 1) * 4 + (c & 1);
        if (r >= until[c]) S[i] = -INFINITY;
        if (r + 8 >= until[c]) S[i + 2] = -INFINITY;
      }
    }
  }

  // --- steps -------------------------------------------------------------------------------------
  // Masks a block of the window slot and gives the first reference exponent.
  template <int N>
  __device__ __forceinline__ void mask_first(float (&S)[N]) {
    if (flags_ & kDiagonalFirst) {
      mask_future<0>(S, row(), quad());
      if (!p_.diagonal_plain) mask_expired(S, L::kWindowExpiry, 0);
    } else {
      mask_expired(S, L::kWindowExpiry, kTile);
    }
  }
  __device__ __forceinline__ void set_reference(Scores128& S) {
    row_max(S, scale_, m0_, m1_);
    m0_ = fmaxf(m0_ + kHeadroom, kNoReference), m1_ = fmaxf(m1_ + kHeadroom, kNoReference);
  }
  // Weights of the first block; `between` runs after every 16 keys.
  template <typename Between>
  __device__ __forceinline__ void weigh_first(Scores128& S, Between&& between) {
    clear_sums();
    if (!(flags_ & kDiagonalFirst)) {
#pragma unroll
      for (int g = 0; g < 8; ++g) weigh<Columns::kWindow>(S, g, 0), between(g);
    } else if (!p_.diagonal_plain) {
#pragma unroll
      for (int g = 0; g < 8; ++g) weigh<Columns::kDiagonal>(S, g, 0), between(g);
    } else {
#pragma unroll
      for (int g = 0; g < 8; ++g) weigh<Columns::kPlain>(S, g, 0), between(g);
    }
    l0_ = s0_ + r0_, l1_ = s1_ + r1_;
  }

  // K of the window slot is free again once the first block's scores are there, unless the next
  // tile uses it too.
  __device__ __forceinline__ void after_first_scores() {
    if (!(flags_ & kSingle) || (flags_ & kReleaseLast)) release(kEmptyWindowK);
  }

  // The very first block, not overlapped with anything.
  __device__ __forceinline__ void first_tile() {
    wait(kFullWindowK, window_fills_++);
    Scores128 S;
    device::pin(Q_);
    device::wgmma_fence();
    multiply_keys(S, L::kWindowK);
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
    wait(kFullWindowV, window_fills_ - 1);
    mask_first(S);
    set_reference(S);
    weigh_first(S, [](int) {});
    keys_in_last_ = 128;
    slots_over_ = 0;
  }

  // Slots and last block of a tile.
  __device__ __forceinline__ void later_blocks() {
    for (int block = 0; block < blocks(); ++block) slot_block(block);
    // The last block: the diagonal tile, or the window tile where the diagonal came first.
    if (flags_ & kDiagonalFirst) {
      last_block<128, Columns::kWindow>();
    } else if (half() == 0) {  // keys 64 ... 127 are in these rows' future
      last_block<64, Columns::kDiagonal>();
    } else {
      last_block<128, Columns::kDiagonal>();
    }
  }

  __device__ __forceinline__ void slot_block(int block) {
    Scores128 S;
    if (block == 0) wait_unless(slots_over_, kFullSlotK, slot_uses_);
    begin_products();
    multiply_keys(S, L::kSlotK + block * L::kBlockBytes);
    if (block == 0) {
      if (flags_ & kFirstIsFresh) wait(kFullWindowV, window_fills_ - 1);
    } else if (block == 1) {
      wait_unless(slots_over_, kFullSlotV, slot_uses_);
    }
    device::wgmma_fence();
    multiply_values(block == 0 ? L::kWindowV : L::kSlotV + (block - 1) * L::kBlockBytes, block > 0,
                    Int<128>{});
    end_products();
    if (block == 0) give_back_queries();
    if (block == 0) slots_over_ = test(kFullSlotV, slot_uses_);
    device::wgmma_wait<1>();
    device::pin(S);
    if (block + 1 == blocks() && (flags_ & kReleaseSlots)) release(kEmptySlotK);
    if (block == 0) wait(kFullGate, slot_uses_);
    mask_expired(S, L::kSlotExpiry + block * kTile * 2, 0);
    find_maxima(S);
    device::pin(S);
    if (block + 1 == blocks()) window_over_ = test(kFullWindowK, window_fills_);
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (block == 0) release(kEmptyWindowV);
    if (p_.gated) {
      weigh_later<Columns::kSlots>(S, block);
    } else {
      weigh_later<Columns::kPlain>(S, block);
    }
  }

  template <int kKeys, Columns kColumns>
  __device__ __forceinline__ void last_block() {
    float S[kKeys / 2];
    bool const any = blocks() > 0;
    if (blocks() == 1) {
      wait_unless(slots_over_, kFullSlotV, slot_uses_);
    } else if (!any) {
      window_over_ = 0;
      if (flags_ & kFirstIsFresh) wait(kFullWindowV, window_fills_ - 1);
    }
    wait_unless(window_over_, kFullWindowK, window_fills_++);
    int const v_base = any ? L::kSlotV + (blocks() - 1) * L::kBlockBytes : L::kWindowV;
    begin_products();
    multiply_keys(S, L::kWindowK);
    device::wgmma_fence();
    multiply_values(v_base, any, Int<128>{});
    end_products();
    give_back_queries();
    std::uint32_t const queries_over = test(kFullQ + wg_, tiles_);
    device::wgmma_wait<1>();
    device::pin(S), device::pin(Q_);
    if (flags_ & kReleaseLast) release(kEmptyWindowK);
    if constexpr (kColumns == Columns::kDiagonal) {
      mask_future<kKeys == 64 ? 0 : 64>(S, row(), quad());
    }
    device::pin(S);
    auto const load_next = [&] {
      wait_unless(queries_over, kFullQ + wg_, tiles_);
      load_queries();
      load_plan();
    };
    // The score product is over, so its queries may be replaced. Without slots the next ones come
    // only after V of the window slot, whose place is not yet free.
    bool const more = flags_ & kMore;
    if (any && more) load_next();
    window_over_ = test(kFullWindowV, window_fills_ - 1);
    bool const plain = kColumns == Columns::kDiagonal && p_.diagonal_plain;
    // Expiries and scores of the window slot come with V, whose place is free only after the output
    // product where that reads it.
    if (!any) {
      device::wgmma_wait<0>();
      release(kEmptyWindowV);
    }
    if (!plain) {
      wait(kFullWindowV, window_fills_ - 1);
      mask_expired(S, L::kWindowExpiry, kColumns == Columns::kWindow ? kTile : 0);
    }
    find_maxima(S);
    device::pin(S);
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (any && (flags_ & kReleaseSlots)) {
      release(kEmptySlotV);
      ++slot_uses_;
    }
    if (!any && more) load_next();
    if (!plain && p_.gated)
      weigh_later<kColumns>(S, 0);
    else
      weigh_later<Columns::kPlain>(S, 0);
    keys_in_last_ = kKeys;
  }

  // First block of the next tile together with the output of the last block of this one, which
  // finishes it.
  __device__ __forceinline__ void next_tile() {
    bool const old_single = flags_ & kSingle, old_release = flags_ & kReleaseLast;
    next_plan();
    bool const fresh = flags_ & kFirstIsFresh;
    if (old_single) window_over_ = 0;
    if (fresh) wait(kFullWindowK, window_fills_);
    Scores128 S;
    auto const products = [&](auto keys) {
      begin_products();
      multiply_keys(S, L::kWindowK);
      wait_unless(window_over_, kFullWindowV, window_fills_ - 1);
      device::wgmma_fence();
      multiply_values(L::kWindowV, !old_single, keys);
    };
    if (keys_in_last_ == 128)
      products(Int<128>{});
    else
      products(Int<64>{});
    end_products();
    if (fresh) ++window_fills_;
    load_thresholds();
    finish();
    device::wgmma_wait<1>();
    device::pin(S);
    after_first_scores();
    // A fresh block's expiries come with V, whose place is free only after the output product.
    bool const late = fresh && !(flags_ & kDiagonalFirst && p_.diagonal_plain);
    if (late) {
      device::wgmma_wait<0>();
      if (old_release) release(kEmptyWindowV);
      wait(kFullWindowV, window_fills_ - 1);
    }
    mask_first(S), set_reference(S);
    // In the shadow of the output product, where the compiler would not leave it by itself.
    asm volatile("" : "+f"(m0_), "+f"(m1_));
    slots_over_ = test(kFullSlotK, slot_uses_);
    device::wgmma_wait<0>();
    device::pin(O_), device::pin(P_), device::pin(Q_);
    if (old_release && !late) release(kEmptyWindowV);
    TilePlan const& old = old_plan();
    Staging const buffer = staging();
    weigh_first(S, [&](int g) {
      if (g < kK16 && whole_) stage(buffer, g);
    });
    if (!whole_) store_rows(old);
    store_output(old);
    if (flags_ & kSingle) give_back_queries();
    keys_in_last_ = 128;
  }

  // --- output ------------------------------------------------------------------------------------
  // The finished tile: its output is written later, in the shadow of a product where there is one.
  __device__ __forceinline__ TilePlan const& old_plan() const { return plan(tiles_ - 2); }
  // Takes over the sums of the finished tile.
  __device__ __forceinline__ void finish() { finish(old_plan()); }
  __device__ __forceinline__ void finish(TilePlan const& old) {
    l0_ += __shfl_xor_sync(~0u, l0_, 1), l1_ += __shfl_xor_sync(~0u, l1_, 1);
    l0_ += __shfl_xor_sync(~0u, l0_, 2), l1_ += __shfl_xor_sync(~0u, l1_, 2);
    inverse_[0] = l0_ > 0.f ? device::rcp_approx(l0_) : 0.f;
    inverse_[1] = l1_ > 0.f ? device::rcp_approx(l1_) : 0.f;
    whole_ = __shfl_sync(~0u, static_cast<int>(stores_whole(old)), 0);
    if (p_.lse && quad() == 0) store_lse(old, row_of(old.flags), whole_);
  }
  // Whether this warpgroup's 64 rows all exist, so that the copy engine can store them.
  __device__ __forceinline__ bool stores_whole(TilePlan const& old) const {
    return old.flags & (half_of(old.flags) ? kUpperWhole : kLowerWhole);
  }
  // To this warpgroup's part of Q, or to memory where rows are missing.
  __device__ __forceinline__ void stage_output(TilePlan const& old) {
    if (whole_) {
      Staging const buffer = staging();
#pragma unroll
      for (int kk = 0; kk < kK16; ++kk) stage(buffer, kk);
    } else {
      store_rows(old);
    }
  }
  __device__ __forceinline__ void store_rows(TilePlan const& old) {
    int const r = row_of(old.flags);
    store_row(old, r, 0, inverse_[0]);
    store_row(old, r + 8, 2, inverse_[1]);
  }
  // 16 of the columns.
  __device__ __forceinline__ void stage(Staging buffer, int kk) {
    float const a = inverse_[0], b = inverse_[1];
    device::stmatrix_x4(buffer.step(kk), device::pack2<T>(O_[8 * kk] * a, O_[8 * kk + 1] * a),
                        device::pack2<T>(O_[8 * kk + 2] * b, O_[8 * kk + 3] * b),
                        device::pack2<T>(O_[8 * kk + 4] * a, O_[8 * kk + 5] * a),
                        device::pack2<T>(O_[8 * kk + 6] * b, O_[8 * kk + 7] * b));
  }
  // This warpgroup's first warp waits for the others: the output is staged, the plan read.
  __device__ __forceinline__ void collect() {
    if (warp() == 0)
      device::named_barrier_sync(3 + wg_, 128);
    else
      device::named_barrier_arrive(3 + wg_, 128);
  }
  __device__ __forceinline__ void store_output(TilePlan const& old) {
    device::fence_async_proxy();
    collect();
    if (whole_ && tid() == 0) {
      int const position = old.q_position + 64 * half_of(old.flags);
      for (int half = 0; half < kDim / 64; ++half) {
        device::tma_store(&p_.out, smem_ + L::kQ + wg_ * L::kQBytes + half * (64 * 128), half * 64,
                          position, old.q_head, old.batch);
      }
      device::tma_store_commit();
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
    finish(old);
    stage_output(old);
    store_output(old);
    if (tid() == 0) device::tma_store_wait();
  }

  bool queries_pending_ = false;
  float x0_, x1_;     // maxima of a block's rows
  float inverse_[2];  // of the sums of the tile whose output is being written
  float tau_[2];
  int pool_end_[2];
  int next_flags_ = 0, keys_in_last_ = 128;
  bool whole_ = false;
  // Answers of barriers that were asked ahead.
  std::uint32_t slots_over_ = 0, window_over_ = 0;
  std::uint32_t tiles_ = 0, window_fills_ = 0, slot_uses_ = 0;
};

}  // namespace sparsek::cuda::sm90
