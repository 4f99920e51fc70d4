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
  using Base::tid, Base::lane, Base::warp, Base::quad, Base::barrier, Base::wait;
  static constexpr int kK16 = kDim / 16;     // 16-column steps of S and dP
  static constexpr int kOutRegs = kDim / 2;  // accumulators of dK, and of dV
  static constexpr bool kGeneral = kMode == Mode::kGeneral;

 public:
  __device__ __forceinline__ KeyConsumer(BackwardParams const& p, std::uint32_t smem, char* generic,
                                         int wg)
      : Base(p, smem, generic, wg) {
    desc_row_ = device::matrix_descriptor(smem, 16, 1024);
    desc_column_ = device::matrix_descriptor(smem, L::kPieceHalfBytes, 1024);
#pragma unroll
    for (int i = 0; i < kOutRegs; ++i) dK_[i] = dV_[i] = 0.f;
  }

  // --- window form: one key tile after another, with the queries of its own and the next tile ----
  __device__ __forceinline__ void run_window(int num_items) {
    int fills = 0;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
      KeyTile keys;
      keys.set(p_, item);
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
      run_pieces<!kGeneral>(walk, buffer * L::kBufferBytes, half * kPiece);
      store_tile(keys, buffer, half);
      ++fills;
    }
    if (tid() == 0) device::tma_store_wait();
  }

  // --- slot form: the tiles of a range, keys come and go -----------------------------------------
  __device__ __forceinline__ void run_slots(SlotRange const& range) {
    int const first = __shfl_sync(~0u, range.first, 0), end = __shfl_sync(~0u, range.end, 0);
    int const slot = wg_ * kPiece + warp() * 16 + (lane() >> 2);
    bool alive[2] = {false, false};
    for (int t = first; t <= end; ++t) {
      int const n = t - first, buffer = n & 1;
      wait(kFullKeys + buffer, n / 2);
      int leaving[2];
      bool any = false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float2 const x = reinterpret_cast<float2 const*>(generic_ + L::kSlotData)[slot + 8 * r];
        leaving[r] = __float_as_int(x.x);
        any |= leaving[r] != kNobody;
        read_slot(x.y, slot + 8 * r, r, t);
      }
      __syncwarp();
      if (lane() == 0) device::mbarrier_arrive(barrier(kReadSlots));
      if (n > 0) {
        device::named_barrier_sync(3 + wg_, 128);  // the tile before is done with its rows
        if (p_.gate_gradients && __any_sync(~0u, any)) flush_scores(range, leaving, slot);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (leaving[r] == kInherited) store_inherited(range, slot + 8 * r, r);
          if (leaving[r] >= 0) stage_row(buffer ^ 1, slot + 8 * r, r);
          // NOTE: an empty slot's rows may hold anything, so its sums may be NaN.
          if (leaving[r] != kNobody || !alive[r]) clear_row(r);
        }
        device::fence_async_proxy();
        __syncwarp();
        if (lane() == 0) device::mbarrier_arrive(barrier(kEmptyKeys + (buffer ^ 1)));
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) alive[r] = is_alive(r);
      if (t == end) break;
      if (!__shfl_sync(~0u, range.uses(t), 0)) continue;
      tile_gradient_ = 0.f;
      Walk walk{range.head, t, t + 1, -1, 0};
      run_pieces<false>(walk, buffer * L::kBufferBytes, wg_ * kPiece);
      if (!kGeneral && p_.gate_gradients) store_tile_gradient(range, t);
    }
  }

 private:
  // --- a step ------------------------------------------------------------------------------------
  // S^T or dP^T: 64 rows of K or V times 64 rows of Q or dO.
  __device__ __forceinline__ void multiply_rows(float (&X)[32], int rows, int piece) const {
    using Mma = device::WgmmaShared64<T>;
#pragma unroll
    for (int kk = 0; kk < kK16; ++kk) {
      std::uint64_t const a = desc_row_ + ((rows + (kk >> 2) * L::kHalfBytes + (kk & 3) * 32) >> 4);
      std::uint64_t const b =
          desc_row_ + ((piece + (kk >> 2) * L::kPieceHalfBytes + (kk & 3) * 32) >> 4);
      if (kk == 0)
        Mma::first(X, a, b);
      else
        Mma::next(X, a, b);
    }
    device::wgmma_commit();
  }
  // dV or dK += A times a piece of dO or Q.
  __device__ __forceinline__ void accumulate(float (&sum)[kOutRegs], std::uint32_t (&A)[16],
                                             int piece) const {
    using Mma = device::Wgmma<T, kOutRegs, device::BLayout::kNMajor>;
#pragma unroll
    for (int kk = 0; kk < kPiece / 16; ++kk) {
      Mma::next(sum, A[4 * kk], A[4 * kk + 1], A[4 * kk + 2], A[4 * kk + 3],
                desc_column_ + ((piece + kk * 2048) >> 4), 1);
    }
    device::wgmma_commit();
  }

  // The pieces that pass by the keys: tiles begin ... end - 1, query heads, halves.
  struct Walk {
    KeyHead const& head;
    int t, end;
    int diagonal, half;  // the keys' own tile, or -1, and this warpgroup's half of it
    int g = 0, piece = 0;
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
      int const t = w.t, half = w.piece;
      if (++w.piece == 2) {
        w.piece = 0;
        if (++w.g == p_.group) w.g = 0, ++w.t;
      }
      // NOTE: broadcast, see above.
      if (!__shfl_sync(~0u, w.head.has_piece(t, half), 0)) continue;
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
    if (lane() == 0) device::mbarrier_arrive(barrier(kEmptyPiece + piece.stage));
  }

  // `buffer`: of K and V, bytes; `keys`: its first row of this warpgroup. kPairs: pieces go by two,
  // and the scores of the second are computed behind dK of the first.
  template <bool kPairs>
  __device__ __forceinline__ void run_pieces(Walk& walk, int buffer, int keys) {
    int const k = buffer + keys * 128;
    Piece first, second;
    while (next_piece(walk, first)) {
      bool const pair = kPairs && next_piece(walk, second);
      float S[32];
      wait_piece(first);
      device::pin(dK_), device::pin(dV_);
      device::wgmma_fence();
      multiply_rows(S, k, piece_base(first.stage));
      if (pair) {
        float S2[32];
        step<1>(S, k, first, [&] {
          wait_piece(second);
          device::wgmma_fence();
          multiply_rows(S2, k, piece_base(second.stage));
        });
        release_piece(first);
        finish_store();
        step<0>(S2, k, second, [] {});
        release_piece(second);
      } else {
        step<0>(S, k, first, [] {});
        release_piece(first);
        finish_store();
      }
    }
  }
  // The scores are being computed. `behind` issues kPending more groups behind dK.
  template <int kPending, typename Behind>
  __device__ __forceinline__ void step(float (&S)[32], int k, Piece const& piece, Behind&& behind) {
    int const q = piece_base(piece.stage), dout = q + L::kPieceBytes;
    std::uint32_t const rows = smem_ + L::kRows + piece.stage * L::kRowBytes + quad() * 8;
    if (kGeneral) set_piece(piece.t, piece.half);
    float X[32];
    device::wgmma_fence();
    multiply_rows(X, k + L::kBlockBytes, dout);
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
    behind();
    if (!kGeneral && kSlots && p_.gate_gradients) add_gate_gradients(D);
    device::wgmma_wait<kPending>();
    device::pin(dK_), device::pin(dV_), device::pin(P), device::pin(D);
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

  // P in 16 bits. What stays in S: the weights without gates where make_gradient needs them.
  __device__ __forceinline__ void weigh(std::uint32_t (&P)[16], float (&S)[32], std::uint32_t rows,
                                        bool masked) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 const lse = load_pair(rows + kRowLse * kArrayBytes + j * 32);
      float const g0 = kGeneral ? 0.f : log_gate_[0], g1 = kGeneral ? 0.f : log_gate_[1];
      S[4 * j] = device::exp2_approx(fmaf(S[4 * j], scale_, g0 - lse.x));
      S[4 * j + 1] = device::exp2_approx(fmaf(S[4 * j + 1], scale_, g0 - lse.y));
      S[4 * j + 2] = device::exp2_approx(fmaf(S[4 * j + 2], scale_, g1 - lse.x));
      S[4 * j + 3] = device::exp2_approx(fmaf(S[4 * j + 3], scale_, g1 - lse.y));
    }
    if (masked) {  // query 8 j + 2 quad (+ 1) does not see later keys
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
      float2 const delta = load_pair(rows + kRowDelta * kArrayBytes + j * 32);
      float y[4];
      if constexpr (kGeneral) {
        float m[4];
        bool interior[4];
        gates_of(m, interior, rows, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const e = S[4 * j + i], x = X[4 * j + i], d = i & 1 ? delta.y : delta.x;
          float const g = e * (kValueGate ? x : x - d);
          if (interior[i] && e > 0.f) score_gradient_[i >> 1] += g;
          y[i] = kValueGate ? e * fmaf(m[i], x, -d) : m[i] * g;
        }
      } else {
        float2 const a = device::unpack2<T>(P[2 * j]), b = device::unpack2<T>(P[2 * j + 1]);
        y[0] = a.x * (X[4 * j] - delta.x), y[1] = a.y * (X[4 * j + 1] - delta.y);
        y[2] = b.x * (X[4 * j + 2] - delta.x), y[3] = b.y * (X[4 * j + 3] - delta.y);
      }
      D[2 * j] = device::pack2<T>(y[0], y[1]), D[2 * j + 1] = device::pack2<T>(y[2], y[3]);
    }
  }

  // Aligned mode: within a tile the gate of a key is constant, and dS = m g. So the gradient of the
  // gate comes from sums of dS, in the shadow of the last product and from what it reads.
  __device__ __forceinline__ void add_gate_gradients(std::uint32_t (&D)[16]) {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 const a = device::unpack2<T>(D[2 * j]), b = device::unpack2<T>(D[2 * j + 1]);
      sum[0] += a.x + a.y, sum[1] += b.x + b.y;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Only gates strictly between 0 and 1: 1 itself is +0.0.
      bool const interior = log_gate_[r] > -INFINITY && __float_as_int(log_gate_[r]) < 0;
      sum[r] = interior ? sum[r] * device::exp2_approx(-log_gate_[r]) : 0.f;
      score_gradient_[r] += sum[r], tile_gradient_ += sum[r];
    }
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
  __device__ __forceinline__ bool is_alive(int r) const { return alive_[r]; }

  // Sums of keys that leave: one addition to what the window form wrote.
  __device__ __forceinline__ void flush_scores(SlotRange const& range, int const (&leaving)[2],
                                               int slot) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = score_gradient_[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (quad() == 0) {
        if (leaving[r] >= 0) atomicAdd(p_.dscores + range.head.dscore_at(p_, leaving[r]), sum);
        if (leaving[r] == kInherited) {
          p_.inherited_scores[range.inherited_at(p_, slot + 8 * r)] = sum;
        }
      }
      if (leaving[r] != kNobody) score_gradient_[r] = 0.f;
    }
  }
  // Lays a row of dK and dV down in the row of the key, which is not needed any more: columns in
  // order, for the producer to add to dk and dv.
  __device__ __forceinline__ void stage_row(int buffer, int slot, int r) const {
    std::uint32_t const to = smem_ + buffer * L::kBufferBytes + slot * 128 + quad() * 4;
#pragma unroll
    for (int j = 0; j < kOutRegs / 4; ++j) {
      int const i = 4 * j + 2 * r;
      std::uint32_t const at = to + (j >> 3) * L::kHalfBytes + (j & 7) * 16;
      store_shared(at, device::pack2<T>(dK_[i] * p_.sm_scale, dK_[i + 1] * p_.sm_scale));
      store_shared(at + L::kBlockBytes, device::pack2<T>(dV_[i], dV_[i + 1]));
    }
  }
  __device__ __forceinline__ static void store_shared(std::uint32_t address, std::uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
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
  __device__ __forceinline__ void store_tile_gradient(SlotRange const& range, int t) const {
    float sum = tile_gradient_;
#pragma unroll
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane() == 0) {
      std::int64_t const tile = static_cast<std::int64_t>(range.head.kv_head) * p_.num_key_tiles +
                                first_key_tile(p_, range.head.sequence, range.head.tiles.first_k) +
                                t;
      p_.gate_partials[(tile * p_.num_blocks + range.block) * 8 + wg_ * 4 + warp()] = sum;
    }
  }

  std::uint64_t desc_row_, desc_column_;

  float dK_[kOutRegs], dV_[kOutRegs];
  float log_gate_[2];                     // aligned mode, log2
  float score_gradient_[2] = {0.f, 0.f};  // of this thread's two keys
  float tile_gradient_ = 0.f;             // aligned mode: of all keys, this tile's queries
  float score_[2];                        // general mode
  int key_[2], expiry_[2], seen_until_[2];
  bool alive_[2] = {false, false};
  int pending_buffer_ = -1;
  std::uint32_t stage_ = 0, phase_ = 0;
};

}  // namespace sparsek::cuda::sm90::backward
