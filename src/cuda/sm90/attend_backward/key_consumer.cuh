// dk, dv and the direct term of dscores: a consumer warpgroup of the key kernels, 64 resident keys,
// 64 queries at a time:
//     S^T = K Q^T, dP^T = V dO^T, P = m exp(S - lse), dS = P (dP - delta),
//     dV += P^T dO, dK += dS^T Q.
// P^T and dS^T come out of the products in the layout in which the next products take them, so they
// never leave the registers, and the two warpgroups never need each other.
#pragma once
#include "cuda/device/hopper.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/device/wgmma_shared.cuh"
#include "cuda/sm90/attend/consumer_thread.cuh"
#include "cuda/sm90/attend_backward/config.hpp"
#include "cuda/sm90/attend_backward/key_schedule.cuh"

namespace sparsek::cuda::sm90::backward {

// kSlots: the slot form, else the window form.
template <typename T, int kDim, Mode kMode, bool kValueGate, bool kSlots>
class KeyConsumer : ConsumerThread<BackwardParams, KeyLayout<kDim, kMode>> {
  using L = KeyLayout<kDim, kMode>;
  using Base = ConsumerThread<BackwardParams, L>;
  using Base::generic_, Base::p_, Base::scale_, Base::smem_, Base::wg_;
  using Base::tid, Base::lane, Base::warp, Base::quad, Base::barrier, Base::release, Base::wait;
  static constexpr int kK16 = kDim / 16;     // 16-column steps of S and dP
  static constexpr int kOutRegs = kDim / 2;  // accumulators of dK, and of dV
  static constexpr bool kGeneral = kMode == Mode::kGeneral;
  static constexpr bool kSumsGates = kSlots && !kGeneral;
  static constexpr bool kShifted = !kGeneral;  // the product dP^T starts at -delta

 public:
  __device__ __forceinline__ KeyConsumer(BackwardParams const& p, std::uint32_t smem, char* generic,
                                         int wg)
      : Base(p, smem, generic, wg) {
#pragma unroll
    for (int i = 0; i < kOutRegs; ++i) dK_[i] = dV_[i] = 0.f;
  }

  // --- window form: one key tile after another, with the queries of its own and the next tile ----
  __device__ __forceinline__ void run_window() {
    int fills = 0;
    KeyTileCursor cursor;
    for (cursor.start(p_); !cursor.done(p_); cursor.advance()) {
      KeyTile const keys = cursor.tile(p_);
      if (!keys.exists) continue;
      // NOTE: broadcast, so that the compiler knows that the branches on them are uniform; else it
      // serialises the products.
      int const begin = __shfl_sync(~0u, keys.begin(), 0), end = __shfl_sync(~0u, keys.end(), 0);
      if (begin >= end) {
        clear_rows(keys);
        continue;
      }
      int const buffer = fills & 1;
      int const half = wg_ ^ buffer;  // the lower half has less to do, so the warpgroups take turns
      wait(kFullKeys + buffer, fills / 2);
      set_keys(keys, half);
      Walk walk{keys.head, begin, end, keys.tile, half};
      run_pieces(walk, buffer * L::kBufferBytes, half * kPiece);
      store_tile(keys, buffer, half);
      ++fills;
    }
    if (tid() == 0) device::tma_store_wait();
  }

  // --- slot form: the tiles of a range, keys come and go -----------------------------------------
  __device__ __forceinline__ void run_slots(SlotRange const& range) {
    int const first = __shfl_sync(~0u, range.first, 0), end = __shfl_sync(~0u, range.end, 0);
    int const slot = wg_ * kPiece + warp() * 16 + (lane() >> 2);
    for (int t = first; t <= end; ++t) {
      int const n = t - first, buffer = n & 1;
      wait(kFullKeys + buffer, n / 2);
      int leaving[2];
      bool cleared[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float2 const x = reinterpret_cast<float2 const*>(generic_ + L::kSlotData)[slot + 8 * r];
        leaving[r] = __float_as_int(x.x);
        // NOTE: a slot without a key has the row of a key that left; 0 times what lies there may be
        // NaN.
        cleared[r] = leaving[r] != kNobody || !alive_[r];
        read_slot(x.y, slot + 8 * r, r, t);
      }
      release(kReadSlots);
      if (n > 0) finish_keys(range, slot, leaving, cleared);
      if (t == end) break;
      if (__shfl_sync(~0u, range.uses(t), 0)) {
        Walk walk{range.head, t, t + 1, -1, 0};
        run_pieces(walk, buffer * L::kBufferBytes, wg_ * kPiece);
        release(kEmptyKeys + buffer);
        if (kSumsGates && p_.gate_gradients) finish_sums(range, t);
      } else {
        release(kEmptyKeys + buffer);
      }
    }
  }

 private:
  // --- a step ------------------------------------------------------------------------------------
  // S^T or dP^T: 64 rows of K or V times 64 rows of Q or dO, kAdd: added to what is there.
  template <bool kAdd>
  __device__ __forceinline__ static void multiply_rows(float (&X)[32], std::uint32_t rows,
                                                       std::uint32_t piece) {
    using Mma = device::WgmmaShared64<T>;
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      int const a_step = (kk >> 2) * L::kHalfBytes + (kk & 3) * 32;
      int const b_step = (kk >> 2) * L::kPieceHalfBytes + (kk & 3) * 32;
      std::uint64_t const a = device::matrix_descriptor<16, 1024>(rows + a_step / 16);
      std::uint64_t const b = device::matrix_descriptor<16, 1024>(piece + b_step / 16);
      if (kk == 0 && !kAdd)
        Mma::first(X, a, b);
      else
        Mma::next(X, a, b);
    }
    device::wgmma_commit();
  }
  // dV or dK += A times a piece of dO or Q.
  __device__ __forceinline__ static void accumulate(float (&sum)[kOutRegs], std::uint32_t (&A)[16],
                                                    std::uint32_t piece) {
    using Mma = device::Wgmma<T, kOutRegs, device::BLayout::kNMajor>;
#pragma unroll
    for (int kk = 0; kk < kPiece / 16; ++kk) {
      Mma::next(sum, A[4 * kk], A[4 * kk + 1], A[4 * kk + 2], A[4 * kk + 3],
                device::matrix_descriptor<L::kPieceHalfBytes, 1024>(piece + kk * 128), 1);
    }
    device::wgmma_commit();
  }
  // NOTE: products take descriptors from uniform registers. So places in shared memory are counted
  // in units of 16 bytes and broadcast once a step; a descriptor is then one addition of 32 bits.
  // Worked out in 64 bits from bytes in ordinary registers, descriptors were 40 % of a step's
  // instructions.
  __device__ __forceinline__ std::uint32_t place(int offset) const {
    return __shfl_sync(~0u, (smem_ + offset) >> 4, 0);
  }
  // 16 x 8 ones, not swizzled: two parts of 8 x 8, 128 bytes each.
  __device__ __forceinline__ std::uint64_t descriptor_of_ones() const {
    return std::uint64_t{128 >> 4} << 32 | (place(L::kOnes) + (128 >> 4 << 16));
  }

  // The pieces that pass by the keys: tiles begin ... end - 1, query heads, halves.
  struct Walk {
    KeyHead const& head;
    int t, end;
    int diagonal, half;  // the keys' own tile, or -1, and this warpgroup's half of it
    int halves = 0;      // bits of those of this tile and query head that are still to come
    int g = 0;
  };
  struct Piece {
    std::uint32_t stage, phase;
    int t, half;
    bool masked;  // it holds the very positions of the keys
  };
  // To the next piece that sees keys of this warpgroup; false at the end. Gives back those that do
  // not.
  __device__ __forceinline__ bool next_piece(Walk& w, Piece& piece) {
    while (w.t < w.end) {
      int const t = w.t;
      if (w.halves == 0) {
        // NOTE: broadcast, see above.
        w.halves = __shfl_sync(~0u, w.head.has_piece(t, 0) | w.head.has_piece(t, 1) << 1, 0);
        if (w.halves == 0) {
          ++w.t;
          continue;
        }
      }
      int const half = w.halves == 2;
      w.halves &= ~(1 << half);
      if (w.halves == 0 && ++w.g == p_.group) w.g = 0, ++w.t;
      piece = {stage_, phase_, t, half, t == w.diagonal && half == w.half};
      if (++stage_ == L::kStages) stage_ = 0, phase_ ^= 1;
      if (t != w.diagonal || half >= w.half) return true;
      wait_piece(piece);
      release_piece(piece);
    }
    return false;
  }
  __device__ __forceinline__ void wait_piece(Piece const& piece) const {
    wait(kFullPiece + piece.stage, piece.phase);
  }
  __device__ __forceinline__ void release_piece(Piece const& piece) const {
    release(kEmptyPiece + piece.stage);
  }

  // `buffer`: of K and V, bytes; `keys`: its first row of this warpgroup.
  __device__ __forceinline__ void run_pieces(Walk& walk, int buffer, int keys) {
    std::uint32_t const k = place(buffer + keys * 128);
    std::uint64_t const ones = kSumsGates ? descriptor_of_ones() : 0;
    Piece piece;
    while (next_piece(walk, piece)) {
      std::uint32_t const q = place(piece_base(piece.stage));
      wait_piece(piece);
      step(k, q, piece, ones);
      release_piece(piece);
      finish_store();
    }
  }
  // k, q: where K of this warpgroup and Q of the piece lie, see place().
  __device__ __forceinline__ void step(std::uint32_t k, std::uint32_t q, Piece const& piece,
                                       std::uint64_t ones) {
    std::uint32_t const dout = q + L::kPieceBytes / 16;
    std::uint32_t const rows = smem_ + L::kRows + piece.stage * L::kRowBytes + quad() * 8;
    if (kGeneral) set_piece(piece.t, piece.half);
    float S[32], X[32];  // S^T; dP^T, aligned mode: dP^T - delta
    // NOTE: loads behind S cost the window form 0.03 us per head.
    if (kShifted && !kSlots) load_shifts(X, rows);
    device::pin(dK_), device::pin(dV_), device::pin(sums_);
    device::wgmma_fence();
    multiply_rows<false>(S, k, q);
    if (kShifted && kSlots) {
      device::wgmma_wait<1>();  // tells the compiler that the registers of X are free; at once
      load_shifts(X, rows);
      device::wgmma_fence();
    }
    multiply_rows<kShifted>(X, k + L::kBlockBytes / 16, dout);
    device::wgmma_wait<1>();
    device::pin(S), device::pin(dK_), device::pin(dV_);
    std::uint32_t P[16], D[16];
    weigh(P, S, rows, piece.masked);
    device::pin(P);
    device::wgmma_fence();
    accumulate(dV_, P, dout);
    device::wgmma_wait<1>();
    device::pin(X);
    make_gradient(D, P, S, X, rows);
    device::pin(D);
    device::wgmma_fence();
    accumulate(dK_, D, q);
    if (kSumsGates) sum_rows(D, ones);
    device::wgmma_wait<0>();
    device::pin(dK_), device::pin(dV_), device::pin(sums_), device::pin(P), device::pin(D);
  }
  __device__ __forceinline__ static int piece_base(std::uint32_t stage) {
    return L::kPieces + stage * 2 * L::kPieceBytes;
  }

  __device__ __forceinline__ static float2 load_pair(std::uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
    return x;
  }
  static constexpr int kArrayBytes = kPiece * 4;

  // -delta of the queries, where dP^T - delta will be.
  __device__ __forceinline__ static void load_shifts(float (&X)[32], std::uint32_t rows) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float2 const x = load_pair(rows + kRowShift * kArrayBytes + j * 32);
        X[4 * j + 2 * r] = x.x, X[4 * j + 2 * r + 1] = x.y;
      }
    }
    device::pin(X);
  }

  // P in 16 bits. What stays in S: the weights without gates where make_gradient needs them.
  __device__ __forceinline__ void weigh(std::uint32_t (&P)[16], float (&S)[32], std::uint32_t rows,
                                        bool masked) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 const lse = load_pair(rows + kRowLse * kArrayBytes + j * 32);
      float const l[4] = {lse.x, lse.y, lse.x, lse.y};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const shift = kSlots && !kGeneral ? log_gate_[i >> 1] - l[i] : -l[i];
        S[4 * j + i] = device::exp2_approx(fmaf(S[4 * j + i], scale_, shift));
      }
    }
    if (!kSlots && masked) {  // query 8 j + 2 quad (+ 1) does not see later keys
      int const key = warp() * 16 + (lane() >> 2) - 2 * quad();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (8 * j < key) S[4 * j] = 0.f;
        if (8 * j + 1 < key) S[4 * j + 1] = 0.f;
        if (8 * j < key + 8) S[4 * j + 2] = 0.f;
        if (8 * j + 1 < key + 8) S[4 * j + 3] = 0.f;
      }
    }
    if constexpr (kGeneral) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float m[4];
        bool interior[4];
        gates_of(m, interior, rows, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * j + 2 * quad() + (i & 1) >= seen_until_[i >> 1]) S[4 * j + i] = 0.f;
          m[i] *= S[4 * j + i];
        }
        P[2 * j] = device::pack2<T>(m[0], m[1]), P[2 * j + 1] = device::pack2<T>(m[2], m[3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) P[i] = device::pack2<T>(S[2 * i], S[2 * i + 1]);
    }
  }

  // General mode: gates of queries 8 j + 2 quad, + 1 for this thread's two keys, and whether they
  // have gradients.
  __device__ __forceinline__ void gates_of(float (&m)[4], bool (&interior)[4], std::uint32_t rows,
                                           int j) const {
    float2 const tau = load_pair(rows + kRowThreshold * kArrayBytes + j * 32);
    uint2 const end = device::load_shared_uint2(rows + kRowPoolEnd * kArrayBytes + j * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float const t = i & 1 ? tau.y : tau.x, u = score_[i >> 1];
      bool const pooled = key_[i >> 1] < static_cast<int>(i & 1 ? end.y : end.x);
      m[i] = pooled ? __saturatef(u - t) : 1.f;
      interior[i] = pooled && u > t && u < __fadd_ru(t, 1.f);
    }
  }

  // dS in 16 bits. Aligned mode takes the weights from P, which frees the registers of S.
  __device__ __forceinline__ void make_gradient(std::uint32_t (&D)[16], std::uint32_t (&P)[16],
                                                float (&S)[32], float (&X)[32],
                                                std::uint32_t rows) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float y[4];
      if constexpr (kGeneral) {
        float2 const shift = load_pair(rows + kRowShift * kArrayBytes + j * 32);
        float m[4];
        bool interior[4];
        gates_of(m, interior, rows, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const e = S[4 * j + i], x = X[4 * j + i], d = i & 1 ? shift.y : shift.x;
          float const g = e * (kValueGate ? x : x + d);
          if (interior[i] && e > 0.f) score_gradient_[i >> 1] += g;
          y[i] = kValueGate ? e * fmaf(m[i], x, d) : m[i] * g;
        }
      } else {
        float2 const a = device::unpack2<T>(P[2 * j]), b = device::unpack2<T>(P[2 * j + 1]);
        y[0] = a.x * X[4 * j], y[1] = a.y * X[4 * j + 1];
        y[2] = b.x * X[4 * j + 2], y[3] = b.y * X[4 * j + 3];
      }
      D[2 * j] = device::pack2<T>(y[0], y[1]), D[2 * j + 1] = device::pack2<T>(y[2], y[3]);
    }
  }

  // Aligned mode: within a tile the gate of a key is constant, and dS = m g. So the gate's gradient
  // comes from sums of dS over the tile's queries: products with ones.
  __device__ __forceinline__ void sum_rows(std::uint32_t (&D)[16], std::uint64_t ones) {
#pragma unroll
    for (int kk = 0; kk < kPiece / 16; ++kk) {
      device::Wgmma8<T>::next(sums_, D[4 * kk], D[4 * kk + 1], D[4 * kk + 2], D[4 * kk + 3], ones);
    }
    device::wgmma_commit();
  }

  // --- window form -------------------------------------------------------------------------------
  __device__ __forceinline__ int own_key(KeyTile const& keys, int half, int r) const {
    return keys.tile * kTile + half * kPiece + warp() * 16 + (lane() >> 2) + 8 * r;
  }
  __device__ __forceinline__ void set_keys(KeyTile const& keys, int half) {
    log_gate_[0] = log_gate_[1] = 0.f;
    score_gradient_[0] = score_gradient_[1] = 0.f;
    if constexpr (kGeneral) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        key_[r] = own_key(keys, half, r);
        expiry_[r] = 0, score_[r] = 0.f;
        if (key_[r] < keys.head.tiles.valid) {
          expiry_[r] = p_.expiry[keys.head.expiry_row(p_) + key_[r]];
          if (p_.gated) score_[r] = p_.scores[keys.head.score_at(p_, key_[r])];
        }
      }
    }
  }
  // General mode: until which row of the piece each key is seen.
  __device__ __forceinline__ void set_piece(int t, int piece) {
#pragma unroll
    for (int r = 0; r < 2; ++r) seen_until_[r] = expiry_[r] - (t * kTile + piece * kPiece);
  }

  // The tile's gradients take the place of this warpgroup's rows of K and V, and leave by the copy
  // engine; rows of a packed tile that ends within another sequence are stored one by one.
  __device__ __forceinline__ void store_tile(KeyTile const& keys, int buffer, int half) {
    finish_store();
    int const rows_begin = keys.tile * kTile + half * kPiece;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int const key = own_key(keys, half, r);
      if (key >= keys.head.tiles.valid) {
        clear_row(r);
        score_gradient_[r] = 0.f;
      }
      if (p_.dscores) {
        float sum = score_gradient_[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (quad() == 0 && key < keys.head.num_rows) {
          p_.dscores[keys.head.dscore_at(p_, key)] = kGeneral ? sum : 0.f;
        }
      }
    }
    bool const whole = !p_.cu_seqlens_k || rows_begin + kPiece <= keys.head.num_rows;
    device::named_barrier_sync(3 + wg_, 128);  // all products that read the rows are done
    if (__shfl_sync(~0u, whole, 0)) {
      std::uint32_t const to = smem_ + buffer * L::kBufferBytes + half * (kPiece * 128) +
                               (warp() * 16 + (lane() & 15)) * 128;
      std::uint32_t const chunk = (lane() >> 4) ^ (lane() & 7);
#pragma unroll
      for (int kk = 0; kk < kK16; ++kk) {
        std::uint32_t const at = to + ((chunk ^ (2 * kk & 7)) << 4) + (kk >> 2) * L::kHalfBytes;
        stage_16(at, dK_, kk, p_.sm_scale);
        stage_16(at + L::kBlockBytes, dV_, kk, 1.f);
      }
      device::fence_async_proxy();
      device::named_barrier_sync(3 + wg_, 128);
      if (tid() == 0) {
        int const position = keys.head.tiles.first_k + rows_begin;
        int const batch = keys.head.batch_coordinate(p_);
        for (int c = 0; c < kDim / 64; ++c) {
          std::uint32_t const from =
              smem_ + buffer * L::kBufferBytes + half * (kPiece * 128) + c * L::kHalfBytes;
          device::tma_store(&p_.dk, from, c * 64, position, keys.head.kv_head, batch);
          device::tma_store(&p_.dv, from + L::kBlockBytes, c * 64, position, keys.head.kv_head,
                            batch);
        }
        device::tma_store_commit();
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int const key = own_key(keys, half, r);
        if (key >= keys.head.num_rows) continue;
        store_row(keys.head.dk_row(p_, key), dK_, r, p_.sm_scale);
        store_row(keys.head.dv_row(p_, key), dV_, r, 1.f);
      }
    }
    clear_row(0), clear_row(1);
    pending_buffer_ = buffer;
  }
  // The buffer of the tile before, once its gradients have been read from it.
  __device__ __forceinline__ void finish_store() {
    if (pending_buffer_ < 0) return;
    if (tid() == 0) {
      device::tma_store_wait_read();
      device::mbarrier_arrive(barrier(kEmptyKeys + pending_buffer_));
    }
    pending_buffer_ = -1;
  }
  __device__ __forceinline__ static void stage_16(std::uint32_t at, float const (&x)[kOutRegs],
                                                  int kk, float scale) {
    device::stmatrix_x4(at, device::pack2<T>(x[8 * kk] * scale, x[8 * kk + 1] * scale),
                        device::pack2<T>(x[8 * kk + 2] * scale, x[8 * kk + 3] * scale),
                        device::pack2<T>(x[8 * kk + 4] * scale, x[8 * kk + 5] * scale),
                        device::pack2<T>(x[8 * kk + 6] * scale, x[8 * kk + 7] * scale));
  }
  __device__ __forceinline__ void store_row(char* row, float const (&x)[kOutRegs], int r,
                                            float scale) const {
#pragma unroll
    for (int j = 0; j < kOutRegs / 4; ++j) {
      int const column = 8 * j + 2 * quad();
      if (column < p_.head_dim) {
        *reinterpret_cast<std::uint32_t*>(row + column * 2) =
            device::pack2<T>(x[4 * j + 2 * r] * scale, x[4 * j + 2 * r + 1] * scale);
      }
    }
  }
  // Keys that no query finds in its diagonal or window tile.
  __device__ __forceinline__ void clear_rows(KeyTile const& keys) const {
    int const chunks = p_.head_dim / 8;
    int const first = keys.tile * kTile + wg_ * kPiece;
    int const count = min(kPiece, keys.head.num_rows - first);
    for (int i = tid(); i < count * chunks; i += 128) {
      int const key = first + i / chunks, chunk = i % chunks;
      reinterpret_cast<int4*>(keys.head.dk_row(p_, key))[chunk] = make_int4(0, 0, 0, 0);
      reinterpret_cast<int4*>(keys.head.dv_row(p_, key))[chunk] = make_int4(0, 0, 0, 0);
    }
    if (p_.dscores && tid() < count) p_.dscores[keys.head.dscore_at(p_, first + tid())] = 0.f;
  }
  __device__ __forceinline__ void clear_row(int r) {
#pragma unroll
    for (int j = 0; j < kOutRegs / 4; ++j) {
      dK_[4 * j + 2 * r] = dK_[4 * j + 2 * r + 1] = 0.f;
      dV_[4 * j + 2 * r] = dV_[4 * j + 2 * r + 1] = 0.f;
    }
  }

  // --- slot form ---------------------------------------------------------------------------------
  __device__ __forceinline__ void read_slot(float gate, int slot, int r, int t) {
    if constexpr (kGeneral) {
      score_[r] = gate;
      key_[r] = reinterpret_cast<int const*>(generic_ + L::kSlotKeys)[slot];
      expiry_[r] =
          t * kTile + reinterpret_cast<std::uint16_t const*>(generic_ + L::kSlotExpiry)[slot];
      alive_[r] = expiry_[r] > t * kTile;
    } else {
      log_gate_[r] = gate;
      alive_[r] = gate > -INFINITY;
    }
  }

  // Keys that leave: one addition to what the window form wrote.
  __device__ __forceinline__ void finish_keys(SlotRange const& range, int slot,
                                              int const (&leaving)[2], bool const (&cleared)[2]) {
    bool const any = leaving[0] != kNobody || leaving[1] != kNobody;
    if (p_.gate_gradients && __any_sync(~0u, any)) flush_scores(range, leaving, slot);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (leaving[r] == kInherited) store_inherited(range, slot + 8 * r, r);
      if (leaving[r] >= 0) add_row(range, leaving[r], r);
      if (__any_sync(~0u, cleared[r])) {  // else 64 instructions that do nothing
        if (cleared[r]) clear_row(r);
      }
    }
  }
  __device__ __forceinline__ void flush_scores(SlotRange const& range, int const (&leaving)[2],
                                               int slot) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = score_gradient_[r];
      if (!kSumsGates) {  // there every lane of the row has the whole sum
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
      }
      if (quad() == 0) {
        if (leaving[r] >= 0) atomicAdd(p_.dscores + range.head.dscore_at(p_, leaving[r]), sum);
        if (leaving[r] == kInherited) {
          p_.inherited_scores[range.inherited_at(p_, slot + 8 * r)] = sum;
        }
      }
      if (leaving[r] != kNobody) score_gradient_[r] = 0.f;
    }
  }
  __device__ __forceinline__ void add_row(SlotRange const& range, int key, int r) const {
    char* dk = range.head.dk_row(p_, key) + quad() * 4;
    char* dv = range.head.dv_row(p_, key) + quad() * 4;
    asm volatile("" : "+l"(dk), "+l"(dv));  // NOTE: else every address is worked out from scratch
#pragma unroll
    for (int j = 0; j < kOutRegs / 4; ++j) {
      int const i = 4 * j + 2 * r;
      bool const exists = 8 * j < p_.head_dim;
      std::uint32_t const k = device::pack2<T>(dK_[i] * p_.sm_scale, dK_[i + 1] * p_.sm_scale);
      device::add_2<T>(dk + 16 * j, k, exists);
      device::add_2<T>(dv + 16 * j, device::pack2<T>(dV_[i], dV_[i + 1]), exists);
    }
  }
  __device__ __forceinline__ void store_inherited(SlotRange const& range, int slot, int r) const {
    float* const row = p_.inherited_rows + range.inherited_at(p_, slot) * (2 * kDim);
#pragma unroll
    for (int j = 0; j < kOutRegs / 4; ++j) {
      int const i = 4 * j + 2 * r, column = 8 * j + 2 * quad();
      *reinterpret_cast<float2*>(row + column) =
          make_float2(dK_[i] * p_.sm_scale, dK_[i + 1] * p_.sm_scale);
      *reinterpret_cast<float2*>(row + kDim + column) = make_float2(dV_[i], dV_[i + 1]);
    }
  }
  // Aligned mode, the tile's sums: of each key, and over all.
  __device__ __forceinline__ void finish_sums(SlotRange const& range, int t) {
    float all = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Only gates strictly between 0 and 1: 1 itself is +0.0.
      bool const interior = log_gate_[r] > -INFINITY && __float_as_int(log_gate_[r]) < 0;
      float const sum = interior ? sums_[2 * r] * device::exp2_approx(-log_gate_[r]) : 0.f;
      score_gradient_[r] += sum, all += sum;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums_[i] = 0.f;
#pragma unroll
    for (int d = 4; d < 32; d *= 2) all += __shfl_xor_sync(~0u, all, d);
    if (lane() == 0) {
      std::int64_t const tile = static_cast<std::int64_t>(range.head.kv_head) * p_.num_key_tiles +
                                first_key_tile(p_, range.head.sequence, range.head.tiles.first_k) +
                                t;
      p_.gate_partials[(tile * p_.num_blocks + range.block) * 8 + wg_ * 4 + warp()] = all;
    }
  }

  float dK_[kOutRegs], dV_[kOutRegs];
  float log_gate_[2];                     // aligned mode, log2
  float score_gradient_[2] = {0.f, 0.f};  // of this thread's two keys
  float sums_[4] = {0.f, 0.f, 0.f, 0.f};  // aligned mode: sums of dS over this tile's queries
  float score_[2];                        // general mode
  int key_[2], expiry_[2], seen_until_[2];
  bool alive_[2] = {false, false};
  int pending_buffer_ = -1;
  std::uint32_t stage_ = 0, phase_ = 0;
};

}  // namespace sparsek::cuda::sm90::backward
