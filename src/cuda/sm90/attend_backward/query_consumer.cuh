// dq: a consumer warpgroup of the query kernel, 64 query rows of a tile, 64 keys at a time:
//     S = Q K^T, dP = dO V^T, dS = m exp(S - lse) (dP - delta), dQ += dS K.
// dS comes out of the products in the layout in which the next product takes it.
//
// Q and dO stay in registers. They and O (for delta) pass through one buffer of 64 rows per
// warpgroup, all that the resident keys leave: the producer fills it with Q, the warpgroup itself
// with dO, then O, and then gives it back.
#pragma once
#include "cuda/device/hopper.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/device/wgmma_shared.cuh"
#include "cuda/sm90/attend/consumer_thread.cuh"
#include "cuda/sm90/attend_backward/config.hpp"

namespace sparsek::cuda::sm90::backward {

// The warpgroup's own barriers, besides those of the forward.
enum QueryBarrier : int { kFullGradient = kNumBarriers };
static_assert(kFullGradient + 2 <= 16);

template <typename T, int kDim, Mode kMode, bool kValueGate>
class QueryConsumer : TileConsumer<BackwardParams, Layout<kDim, kMode>> {
  using L = Layout<kDim, kMode>;
  using Base = TileConsumer<BackwardParams, L>;
  using Base::generic_, Base::p_, Base::scale_, Base::smem_, Base::wg_;
  using Base::half_of, Base::plan, Base::query_address, Base::release, Base::row_of;
  using Base::tid, Base::lane, Base::warp, Base::quad, Base::barrier, Base::wait;
  static constexpr int kK16 = kDim / 16;            // 16-column steps of S and dP
  static constexpr int kOutRegs = kDim / 2;         // accumulators of dQ
  static constexpr int kPieceBytes = kPiece * 128;  // 64 rows of one column half
  static constexpr bool kGeneral = kMode == Mode::kGeneral;

 public:
  __device__ __forceinline__ QueryConsumer(BackwardParams const& p, std::uint32_t smem,
                                           char* generic, int wg)
      : Base(p, smem, generic, wg) {}

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kOutRegs; ++i) dQ_[i] = 0.f;
    take_queries();
    request_gradient();
    do {
      load_plan();
      take_gradient();
      convert_lse();
      walk_keys();
      store();
    } while (flags_ & kMore);
  }

 private:
  __device__ __forceinline__ int half() const { return half_of(flags_); }
  __device__ __forceinline__ int tile_parity() const { return counts_ & 1; }
  __device__ __forceinline__ std::uint32_t slot_uses() const { return counts_ >> 2; }
  // This thread's rows of the tile are row() and row() + 8.
  __device__ __forceinline__ int row() const { return row_of(flags_); }

  // --- the buffer --------------------------------------------------------------------------------
  // This lane's row. NOTE: worked out anew wherever it is needed; kept, it would be spilled, and
  // reading it again takes longer.
  __device__ __forceinline__ std::uint32_t row_address() const {
    std::uint32_t at = query_address(0);
    asm volatile("" : "+r"(at));
    return at;
  }
  // The same as query_address(kk).
  __device__ __forceinline__ static std::uint32_t step_address(std::uint32_t at, int kk) {
    return (at ^ (2 * kk & 7) << 4) + (kk >> 2) * kPieceBytes;
  }
  __device__ __forceinline__ void take(std::uint32_t (&A)[kDim / 4]) const {
    std::uint32_t const at = row_address();
    std::uint32_t r[4];
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      device::ldmatrix_x4(r, step_address(at, kk));
      A[4 * kk] = r[0], A[4 * kk + 1] = r[1], A[4 * kk + 2] = r[2], A[4 * kk + 3] = r[3];
    }
  }
  // NOTE: the copy engine is about to overwrite the buffer, and a barrier does not wait for
  // ldmatrix results that are still on their way. So every result is used first, in a way that the
  // compiler cannot drop.
  __device__ __forceinline__ static void settle(std::uint32_t (&A)[kDim / 4]) {
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0xfdfcfbfa;\n@p nanosleep.u32 1;\n}" ::"r"(
          A[4 * kk]));
    }
  }
  __device__ __forceinline__ void take_queries() {
    wait(kFullQ + wg_, tile_parity());
    take(Q_);
  }
  // ... and asks for O, which comes while the tile's first scores are computed.
  __device__ __forceinline__ void take_gradient() {
    wait(kFullGradient + wg_, 0);
    take(dO_);
    settle(dO_);
    request(&p_.out, plan(tile_parity() ^ 1));
  }
  // Fills the buffer, whose contents all threads have in use, with 64 rows of dO or O.
  __device__ __forceinline__ void request(CUtensorMap const* map, TilePlan const& tile) const {
    device::named_barrier_sync(3 + wg_, 128);
    if (tid() == 0) {
      std::uint32_t const full = barrier(kFullGradient + wg_);
      device::mbarrier_arrive_expect(full, L::kQBytes);
      int const position = tile.q_position + 64 * half_of(tile.flags);
      for (int c = 0; c < kDim / 64; ++c) {
        device::tma_load(smem_ + L::kQ + wg_ * L::kQBytes + c * kPieceBytes, map, full, c * 64,
                         position, tile.q_head, tile.batch);
      }
    }
  }
  __device__ __forceinline__ void request_gradient() {
    settle(Q_);
    TilePlan const& next = plan(tile_parity());
    request(&p_.dout, next);
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // needed when dO is there
      int const at = 64 * half_of(next.flags) + warp() * 16 + (lane() >> 2) + 8 * r;
      lse_[r] = -INFINITY;
      if (at >= next.row_begin && at < next.row_end) {
        lse_[r] = p_.lse[next.lse_offset + at * p_.stride_lse_position];
      }
    }
  }

  // --- a tile ------------------------------------------------------------------------------------
  __device__ __forceinline__ void load_plan() {
    TilePlan const& next = plan(tile_parity());
    // NOTE: broadcast, so that the compiler knows that the branches on them are uniform; else it
    // serialises the products.
    flags_ = __shfl_sync(~0u, next.flags | next.num_blocks << kBlocksShift, 0);
    counts_ ^= 1;
    int const tile = next.tile;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int const at = row() + 8 * r;
      if (kGeneral) {
        // The row's threshold, and where its pool ends relative to the window tile.
        // Rows that do not exist have the last one's.
        int const chunk = p_.chunks.quotient(tile * kTile + min(at, max(next.row_end, 1) - 1));
        tau_[r] = p_.gated ? p_.threshold[next.chunk_offset + chunk] : 0.f;
        pool_end_[r] = p_.gated ? chunk * p_.chunk_size - p_.window - (tile - 1) * kTile : kNoPool;
        gate_gradient_[r] = 0.f;
      }
    }
    prefetch_next(next);
  }

  // To base 2. A row that sees no key: every weight becomes 0.
  __device__ __forceinline__ void convert_lse() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      lse_[r] = lse_[r] == -INFINITY ? INFINITY : lse_[r] * 1.44269504f;
    }
  }

  // Brings what the next tile most likely reads to L2.
  __device__ __forceinline__ void prefetch_next(TilePlan const& now) const {
    if (tid() != 0 || !(now.flags & kMore)) return;
    bool const next_head = !(now.flags & kReleaseSlots);  // of the same group, same positions
    int const head = next_head ? now.q_head + 1 : now.q_head - (p_.group - 1);
    int const position =
        now.q_position + (next_head ? 0 : kTile) + 64 * half_of(now.flags ^ kSwapHalves);
    for (int c = 0; c < kDim / 64; ++c) {
      device::tma_prefetch(&p_.dout, c * 64, position, head, now.batch);
      device::tma_prefetch(&p_.out, c * 64, position, head, now.batch);
    }
  }

  // delta = dO . O, for this kernel and, with the normaliser, for the others.
  __device__ __forceinline__ void make_delta() {
    wait(kFullGradient + wg_, 1);
    std::uint32_t const at = row_address();
    delta_[0] = delta_[1] = 0.f;
    auto const dot = [](std::uint32_t x, std::uint32_t y, float sum) {
      float2 const a = device::unpack2<T>(x), b = device::unpack2<T>(y);
      return fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    };
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      std::uint32_t o[4];
      device::ldmatrix_x4(o, step_address(at, kk));
      delta_[0] = dot(o[0], dO_[4 * kk], dot(o[2], dO_[4 * kk + 2], delta_[0]));
      delta_[1] = dot(o[1], dO_[4 * kk + 1], dot(o[3], dO_[4 * kk + 3], delta_[1]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      delta_[r] += __shfl_xor_sync(~0u, delta_[r], 1);
      delta_[r] += __shfl_xor_sync(~0u, delta_[r], 2);
    }
    // NOTE: the sums above have used everything that was loaded from the buffer.
    device::named_barrier_sync(3 + wg_, 128);
    if (tid() == 0) device::mbarrier_arrive(barrier(kEmptyQ + wg_));
    TilePlan const& now = plan(tile_parity() ^ 1);
    if (quad() == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!exists(now, r)) continue;
        float* const out = row_data(now, r);
        out[kRowLse * p_.stride_row_array] = lse_[r];
        out[kRowShift * p_.stride_row_array] = -delta_[r];
        if (kGeneral) {
          out[kRowThreshold * p_.stride_row_array] = tau_[r];
          int const end = pool_end_[r] == kNoPool ? kNoPool : pool_end_[r] + (now.tile - 1) * kTile;
          out[kRowPoolEnd * p_.stride_row_array] = __int_as_float(end);
        }
      }
    }
  }
  __device__ __forceinline__ bool exists(TilePlan const& now, int r) const {
    return row() + 8 * r >= now.row_begin && row() + 8 * r < now.row_end;
  }
  __device__ __forceinline__ float* row_data(TilePlan const& now, int r) const {
    return p_.row_data + now.batch * p_.stride_row_batch + now.q_head * p_.stride_row_head +
           now.q_position + row() + 8 * r;
  }

  // 64 keys: where their rows lie, and how they are seen.
  struct Keys {
    int k, v;         // bytes
    int gate;         // aligned: bytes, gates of the slots; general: scores
    int expiry;       // general: bytes
    int rows_before;  // general: rows from the tile that the expiries count from to this one
    int column;       // general: of the first key, counted from the window tile; far left: slots
    bool masked;      // the very positions of these rows
  };
  __device__ __forceinline__ Keys window_keys(bool diagonal, int piece) const {
    int const skip = piece * kPieceBytes;
    return {L::kWindowK + skip,
            L::kWindowV + skip,
            L::kWindowScore + piece * kPiece * 4,
            L::kWindowExpiry + piece * kPiece * 2,
            diagonal ? 0 : kTile,
            (diagonal ? kTile : 0) + piece * kPiece,
            diagonal && piece == half()};
  }
  __device__ __forceinline__ Keys slot_keys(int piece) const {
    int const at = (piece >> 1) * L::kBlockBytes + (piece & 1) * kPieceBytes;
    int const gates = kGeneral ? L::kSlotScore : L::kGate + (slot_uses() & 1) * L::kGateBytes;
    return {L::kSlotK + at,
            L::kSlotV + at,
            gates + piece * kPiece * 4,
            L::kSlotExpiry + piece * kPiece * 2,
            0,
            kSlotColumn,
            false};
  }

  // The tile's keys in the producer's order: window or diagonal tile, slots, diagonal or window
  // tile.
  __device__ __forceinline__ void walk_keys() {
    bool const diagonal_first = flags_ & kDiagonalFirst, single = flags_ & kSingle;
    use_window(flags_ & kFirstIsFresh);
    walk_window(diagonal_first, true, single && (flags_ & kMore));
    if (!single || (flags_ & kReleaseLast)) release_window();
    if (int const blocks = flags_ >> kBlocksShift) {
      use_slots();
      for (int i = 0; i < 2 * blocks; ++i) step<true>(slot_keys(i), false, false);
      if (flags_ & kReleaseSlots) {
        release(kEmptySlotK), release(kEmptySlotV);
        counts_ += 4;
      }
    }
    if (single) return;
    use_window(true);
    walk_window(!diagonal_first, false, flags_ & kMore);
    if (flags_ & kReleaseLast) release_window();
  }
  // `opens`: the tile's first keys. `closes`: its last ones, and another tile follows.
  __device__ __forceinline__ void walk_window(bool diagonal, bool opens, bool closes) {
    int const pieces = diagonal ? 1 + half() : 2;
    for (int i = 0; i < pieces; ++i) {
      step<false>(window_keys(diagonal, i), opens && i == 0, closes && i + 1 == pieces);
    }
  }
  __device__ __forceinline__ void use_window(bool fresh) {
    if (!fresh) return;
    std::uint32_t const parity = counts_ >> 1;
    wait(kFullWindowK, parity), wait(kFullWindowV, parity);
    counts_ ^= 2;
  }
  __device__ __forceinline__ void release_window() const {
    release(kEmptyWindowK), release(kEmptyWindowV);
  }
  // The producer's threads arrive there last: gates and K are there, too.
  __device__ __forceinline__ void use_slots() const { wait(kFullSlotV, slot_uses()); }

  // --- a step ------------------------------------------------------------------------------------
  __device__ __forceinline__ std::uint32_t place(int offset) const { return (smem_ + offset) >> 4; }
  // S or dP: 64 rows in registers times 64 rows of keys.
  __device__ __forceinline__ void multiply_rows(float (&X)[32], std::uint32_t (&A)[kDim / 4],
                                                int base) const {
    using Mma = device::Wgmma<T, 32, device::BLayout::kKMajor>;
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      int const step = (kk >> 2) * L::kHalfBytes + (kk & 3) * 32;
      std::uint64_t const b = device::matrix_descriptor<16, 1024>(place(base) + step / 16);
      std::uint32_t const* const a = A + 4 * kk;
      if (kk == 0)
        Mma::first(X, a[0], a[1], a[2], a[3], b);
      else
        Mma::next(X, a[0], a[1], a[2], a[3], b, 1);
    }
    device::wgmma_commit();
  }

  // `opens`: the tile's first step. `closes`: its last one, and another tile follows.
  template <bool kSlots>
  __device__ __forceinline__ void step(Keys const& keys, bool opens, bool closes) {
    float S[32], X[32];
    device::pin(dQ_), device::pin(Q_);
    device::wgmma_fence();
    multiply_rows(S, Q_, keys.k);
    device::pin(dO_);
    device::wgmma_fence();
    multiply_rows(X, dO_, keys.v);
    device::wgmma_wait<1>();
    device::pin(S), device::pin(dQ_);
    weigh<kSlots>(S, keys);
    device::wgmma_wait<0>();
    device::pin(X), device::pin(Q_), device::pin(dO_);
    if (opens) make_delta();
    if (closes) take_queries();
    std::uint32_t D[16];
    make_gradient(D, S, X, keys);
    device::pin(D), device::pin(dQ_);
    device::wgmma_fence();
    using Mma = device::Wgmma<T, kOutRegs, device::BLayout::kNMajor>;
#pragma unroll
    for (int kk = 0; kk < kPiece / 16; ++kk) {
      Mma::next(dQ_, D[4 * kk], D[4 * kk + 1], D[4 * kk + 2], D[4 * kk + 3],
                device::matrix_descriptor<L::kHalfBytes, 1024>(place(keys.k) + kk * 128),
                kk > 0 || !opens);
    }
    device::wgmma_commit();
    if (closes) request_gradient();
    device::wgmma_wait<0>();
    device::pin(dQ_), device::pin(D);
  }

  // Weights from scores: exp(S - lse), with the gate in aligned mode, 0 where the row does not see
  // the key.
  template <bool kSlots>
  __device__ __forceinline__ void weigh(float (&S)[32], Keys const& keys) const {
    if (!kGeneral && kSlots) {
      std::uint32_t const address = smem_ + keys.gate + quad() * 16;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        float4 const x = device::load_shared_float4(address + 64 * g);
        float const gate[4] = {x.x, x.y, x.z, x.w};  // columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          int const i = 8 * g + (c >> 1) * 4 + (c & 1);
          S[i] = device::exp2_approx(fmaf(S[i], scale_, fmaf(gate[c], scale_, -lse_[0])));
          S[i + 2] = device::exp2_approx(fmaf(S[i + 2], scale_, fmaf(gate[c], scale_, -lse_[1])));
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        S[4 * j] = device::exp2_approx(fmaf(S[4 * j], scale_, -lse_[0]));
        S[4 * j + 1] = device::exp2_approx(fmaf(S[4 * j + 1], scale_, -lse_[0]));
        S[4 * j + 2] = device::exp2_approx(fmaf(S[4 * j + 2], scale_, -lse_[1]));
        S[4 * j + 3] = device::exp2_approx(fmaf(S[4 * j + 3], scale_, -lse_[1]));
      }
    }
    if (!kSlots && keys.masked) mask_future(S);
    if constexpr (kGeneral) mask_expired(S, keys);
  }
  __device__ __forceinline__ void mask_future(float (&S)[32]) const {
    int const last = warp() * 16 + (lane() >> 2) - 2 * quad();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (8 * j > last) S[4 * j] = 0.f;
      if (8 * j + 1 > last) S[4 * j + 1] = 0.f;
      if (8 * j > last + 8) S[4 * j + 2] = 0.f;
      if (8 * j + 1 > last + 8) S[4 * j + 3] = 0.f;
    }
  }
  __device__ __forceinline__ void mask_expired(float (&S)[32], Keys const& keys) const {
    int const r = row() + keys.rows_before;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      uint2 const e = device::load_shared_uint2(smem_ + keys.expiry + (g * 16 + quad() * 4) * 2);
      int const until[4] = {static_cast<int>(e.x & 0xffff), static_cast<int>(e.x >> 16),
                            static_cast<int>(e.y & 0xffff), static_cast<int>(e.y >> 16)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int const i = 8 * g + (c >> 1) * 4 + (c & 1);
        if (r >= until[c]) S[i] = 0.f;
        if (r + 8 >= until[c]) S[i + 2] = 0.f;
      }
    }
  }

  // dS, in 16 bits; in general mode also the rows' sums of the gates' gradients.
  __device__ __forceinline__ void make_gradient(std::uint32_t (&D)[16], float (&S)[32],
                                                float (&X)[32], Keys const& keys) {
    if constexpr (kGeneral) {
      float above[2];  // the smallest score whose gate is 1
#pragma unroll
      for (int r = 0; r < 2; ++r) above[r] = __fadd_ru(tau_[r], 1.f);
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        float4 const u = device::load_shared_float4(smem_ + keys.gate + (g * 16 + quad() * 4) * 4);
        float const score[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          int const column = keys.column + 16 * g + 2 * quad() + (c & 1) + (c >> 1) * 8;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            int const i = 8 * g + (c >> 1) * 4 + (c & 1) + 2 * r;
            bool const pooled = column < pool_end_[r];
            float const m = pooled ? __saturatef(score[c] - tau_[r]) : 1.f;
            bool const interior = pooled && score[c] > tau_[r] && score[c] < above[r];
            float const g_ij = S[i] * (kValueGate ? X[i] : X[i] - delta_[r]);
            if (interior) gate_gradient_[r] += g_ij;
            X[i] = kValueGate ? S[i] * fmaf(m, X[i], -delta_[r]) : m * g_ij;
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) X[i] = S[i] * (X[i] - delta_[(i >> 1) & 1]);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) D[i] = device::pack2<T>(X[2 * i], X[2 * i + 1]);
  }

  // --- results -----------------------------------------------------------------------------------
  __device__ __forceinline__ void store() const {
    TilePlan const& now = plan(tile_parity() ^ 1);
    if constexpr (kGeneral) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = gate_gradient_[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (quad() == 0 && exists(now, r)) {
          row_data(now, r)[kRowGateGradient * p_.stride_row_array] = sum;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!exists(now, r)) continue;
      char* const out =
          p_.dq_rows + now.batch * p_.stride_dq_batch + now.q_head * p_.stride_dq_head +
          static_cast<std::int64_t>(now.q_position + row() + 8 * r) * p_.stride_dq_position;
#pragma unroll
      for (int j = 0; j < kOutRegs / 4; ++j) {
        int const column = 8 * j + 2 * quad();
        if (column < p_.head_dim) {
          *reinterpret_cast<std::uint32_t*>(out + column * 2) = device::pack2<T>(
              dQ_[4 * j + 2 * r] * p_.sm_scale, dQ_[4 * j + 2 * r + 1] * p_.sm_scale);
        }
      }
    }
  }

  static constexpr int kNoPool = -(1 << 30);  // no key has a gate
  static constexpr int kSlotColumn = -(1 << 29);

  float dQ_[kOutRegs];
  std::uint32_t Q_[kDim / 4], dO_[kDim / 4];
  float lse_[2], delta_[2];
  float tau_[2], gate_gradient_[2];  // general mode
  int pool_end_[2];
  int flags_ = 0;  // of the tile, and from kBlocksShift on how many blocks of slots it uses
  // Of tiles (bit 0), fills of the window slot (bit 1), fills of the slots (the others): what the
  // phases of barriers need, in one register.
  std::uint32_t counts_ = 0;
};

}  // namespace sparsek::cuda::sm90::backward
