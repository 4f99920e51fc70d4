// dk, dv and the direct term of dscores.
//
// A block owns kKeys keys, whose K and V lie in shared memory and whose dk and dv are summed in
// registers, and goes through the queries that see them, kQueries at once; the query heads
// of a group one after another. S' = K Q' and dP' = V dO' come out with a key to each row; P' and
// dS', rounded to T, change hands through shared memory for dV += P' dO and dK += dS' Q.
//
// Two kernels, told apart by how the keys are chosen; together they see each pair once:
//   slots   listed keys, in the tiles of a piece (slots.cuh); runs first
//   window  consecutive keys, in the tiles that do not list them: their window, and what they are
//           selected for within such a tile. Writes every key, on top of what the slots gave.
#pragma once
#include <climits>
#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/portable/attend/load_rows.cuh"
#include "cuda/portable/attend_backward/config.cuh"
#include "cuda/portable/attend_backward/params.cuh"
#include "cuda/portable/attend_backward/slots.cuh"

namespace sparsek::cuda::portable {

template <typename Config, typename T>
class KeyBlock {
 protected:
  static constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys;
  static constexpr int kQueries = Config::kQueries;
  static constexpr int kKeyTiles = Config::kKeysPerWarp / 16;      // of a warp's products: rows
  static constexpr int kQueryTiles = Config::kQueriesPerWarp / 8;  // columns of S and dP
  static constexpr int kDimTiles = Config::kDimsPerWarp / 8;       // columns of dk and dv
  static constexpr int kRowBytes = Config::kRowBytes;
  static constexpr int kWeightBytes = Config::kWeightElements * 2;
  static constexpr int kPartsPerTile = kQueryTile / kQueries;
  using Storage = typename Config::SharedStorage;

  __device__ KeyBlock(BackwardParams const& p, Storage& shared, int kv_head)
      : p_(p), a_(p.a), shared_(shared), kv_head_(kv_head) {}

  // The queries of one step: a part of a tile, of one head.
  struct Step {
    int tile_first;  // position of the tile's first query
    int begin;       // of the part's row 0, a multiple of kQueries
    int first, end;  // positions of the queries that exist
    int low;         // keys from here on are not listed in the tile
    bool one_chunk;  // all of the tile's queries are in one chunk
    int q_head;
  };

  static constexpr int kColumnWarps = Config::kColumnWarps;
  static __device__ int warp_key() {
    return threadIdx.x / (32 * kColumnWarps) * Config::kKeysPerWarp;
  }
  static __device__ int warp_column() { return threadIdx.x / 32 % kColumnWarps; }
  static __device__ int warp_query() { return warp_column() * Config::kQueriesPerWarp; }
  static __device__ int warp_dim() { return warp_column() * Config::kDimsPerWarp; }
  // A thread's key: row tile m, half h. Its queries and columns of the head dimension: tile n, the
  // first of two.
  static __device__ int key_of(int m, int h) {
    return warp_key() + m * 16 + h * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  static __device__ int query_of(int n) {
    return warp_query() + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
  }
  static __device__ int dim_of(int n) {
    return warp_dim() + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
  }

  __device__ void clear_sums() {
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) clear_key(m, h);
  }
  __device__ void clear_key(int m, int h) {
    dscore_[m][h] = 0.f;
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) dk_[m][n][e] = dv_[m][n][e] = 0.f;
  }

  // Copies come in groups: q (and K, V of entering keys) first, then dout.
  template <int kPending>
  static __device__ void wait_for_copies() {
    device::cp_async_wait_group<kPending>();
    __syncthreads();
  }

  // --- loads -------------------------------------------------------------------------------------
  __device__ void load_query_rows(T (*destination)[Config::kRowElements], void const* tensor,
                                  std::int64_t stride_batch, std::int64_t stride_head,
                                  std::int64_t stride_position, Step const& step) const {
    char const* const base = static_cast<char const*>(tensor) +
                             row_bytes(stride_batch, stride_head, stride_position, sequence_.index,
                                       step.q_head, sequence_.first_query);
    load_rows<Config, kQueries>(a_, destination, base, stride_position,
                                step.begin - sequence_.query_offset(), nullptr,
                                step.first - step.begin, step.end - step.begin);
  }
  __device__ void load_q(Step const& step) const {
    load_query_rows(shared_.q, a_.q, a_.stride_q_batch, a_.stride_q_head, a_.stride_q_position,
                    step);
  }
  // dout and what else is known of each query. Rows that do not exist are zeros in q, dout and
  // delta, so they add nothing, whatever their weights.
  __device__ void load_dout(Step const& step) const {
    load_query_rows(shared_.dout, p_.dout, p_.stride_dout_batch, p_.stride_dout_head,
                    p_.stride_dout_position, step);
    int const x = threadIdx.x;
    if (x >= kQueries) return;
    int const i = step.begin + x;
    bool const exists = i >= step.first && i < step.end;
    std::int64_t const row =
        row_index(a_, sequence_, step.q_head, exists ? i - sequence_.query_offset() : 0);
    device::cp_async_4(device::shared_address(&shared_.lse2[x]), p_.lse2 + row, exists);
    device::cp_async_4(device::shared_address(&shared_.delta[x]), p_.delta + row, exists);
    if (!a_.scores) return;
    shared_.window_begin[x] = window_begin(a_, i);
    std::int64_t const chunk =
        a_.stride_chunk_batch * sequence_.index + a_.stride_chunk_head * kv_head_ +
        (a_.cu_seqlens_k ? sequence_.first_key / a_.chunk_size + sequence_.index : 0);
    device::cp_async_4(device::shared_address(&shared_.threshold[x]),
                       a_.threshold + chunk + (exists ? i / a_.chunk_size : 0), exists);
  }

  // --- products ----------------------------------------------------------------------------------
  // P' and dS' of a step, to shared memory. `visible`: whether any query of the warp sees a key of
  // it. On the way the copies of dout are waited for.
  __device__ void weigh(Step const& step, PairKind kind, bool visible) {
    float s[kKeyTiles][kQueryTiles][4], dp[kKeyTiles][kQueryTiles][4];
    int const lane = threadIdx.x % 32;
    int const a_offset = (warp_key() + lane % 16) * kRowBytes + lane / 16 * 16;
    int const b_offset = (warp_query() + lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
    if (visible) {
      multiply_rows(s, device::shared_address(&shared_.k[0][0]) + a_offset,
                    device::shared_address(&shared_.q[0][0]) + b_offset);
    }
    wait_for_copies<0>();
    if (!visible) return weigh_nothing();
    multiply_rows(dp, device::shared_address(&shared_.v[0][0]) + a_offset,
                  device::shared_address(&shared_.dout[0][0]) + b_offset);
    switch (kind) {
      case PairKind::kPlain:
        return weigh<PairKind::kPlain, false>(s, dp, step);
      case PairKind::kCausal:
        return weigh<PairKind::kCausal, false>(s, dp, step);
      case PairKind::kKeyGate:
        return a_.value_gate ? weigh<PairKind::kKeyGate, true>(s, dp, step)
                             : weigh<PairKind::kKeyGate, false>(s, dp, step);
      case PairKind::kGeneral:
        return a_.value_gate ? weigh<PairKind::kGeneral, true>(s, dp, step)
                             : weigh<PairKind::kGeneral, false>(s, dp, step);
    }
  }

  __device__ void weigh_nothing() {
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
          store_weights(key_of(m, h), query_of(n), 0.f, 0.f, 0.f, 0.f);
  }

  // c = A B' over the head dimension.
  static __device__ void multiply_rows(float (&c)[kKeyTiles][kQueryTiles][4],
                                       std::uint32_t a_address, std::uint32_t b_address) {
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n][e] = 0.f;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      std::uint32_t a[kKeyTiles][4];
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
        device::ldmatrix_x4(a[m], a_address + m * 16 * kRowBytes + d * 32);
#pragma unroll
      for (int n = 0; n < kQueryTiles; n += 2) {
        std::uint32_t b[4];
        device::ldmatrix_x4(b, b_address + n * 8 * kRowBytes + d * 32);
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {
          device::mma_m16n8k16<T>(c[m][n], a[m], b[0], b[1]);
          device::mma_m16n8k16<T>(c[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // c += A B over the step's queries: A are weights, B rows of q or dout.
  __device__ void multiply_weights(float (&c)[kKeyTiles][kDimTiles][4],
                                   T const (*weights)[Config::kWeightElements],
                                   T const (*rows)[Config::kRowElements]) {
    int const lane = threadIdx.x % 32;
    std::uint32_t const a_address =
        device::shared_address(&weights[warp_key() + lane % 16][lane / 16 * 8]);
    std::uint32_t const b_address =
        device::shared_address(&rows[lane % 16][warp_dim() + lane / 16 * 8]);
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      std::uint32_t a[kKeyTiles][4];
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
        device::ldmatrix_x4(a[m], a_address + m * 16 * kWeightBytes + i * 32);
#pragma unroll
      for (int d = 0; d < kDimTiles; d += 2) {
        std::uint32_t b[4];
        device::ldmatrix_x4_transposed(b, b_address + i * 16 * kRowBytes + d * 16);
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {
          device::mma_m16n8k16<T>(c[m][d], a[m], b[0], b[1]);
          device::mma_m16n8k16<T>(c[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // --- the softmax's and the gates' derivatives ----------------------------------------------------
  __device__ void store_weights(int key, int query, float p0, float p1, float ds0, float ds1) {
    *reinterpret_cast<std::uint32_t*>(&shared_.p[key][query]) = device::pack2<T>(p0, p1);
    *reinterpret_cast<std::uint32_t*>(&shared_.ds[key][query]) = device::pack2<T>(ds0, ds1);
  }

  // What a key's pairs have in common.
  struct KeyData {
    int position, expiry;
    float score;
    float gate, counted;  // one for all queries of the tile: the gate, and 1 if between 0 and 1
  };

  template <PairKind kKind>
  __device__ KeyData load_key(int key, Step const& step) const {
    KeyData k{};
    if constexpr (kKind == PairKind::kCausal || kKind == PairKind::kGeneral)
      k.position = shared_.position[key];
    if constexpr (kKind == PairKind::kGeneral) {
      k.expiry = shared_.expiry[key];
      k.score = shared_.score[key];
    }
    if constexpr (kKind == PairKind::kKeyGate) {
      float const score = shared_.score[key];
      float const threshold = shared_.threshold[step.first - step.begin];
      k.gate = __saturatef(score - threshold);
      k.counted = is_interior(score, threshold) ? 1.f : 0.f;
    }
    return k;
  }

  // The formulas: query_kernel.cuh. What multiplies dout in dv is m e under both gates.
  template <PairKind kKind, bool kValueGate>
  __device__ void weigh(float const (&s)[kKeyTiles][kQueryTiles][4],
                        float const (&dp)[kKeyTiles][kQueryTiles][4], Step const& step) {
    constexpr bool kGeneral = kKind == PairKind::kGeneral;
    constexpr bool kGated = kKind == PairKind::kKeyGate || kGeneral;
    KeyData key[kKeyTiles][2];
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) key[m][h] = load_key<kKind>(key_of(m, h), step);
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      int const query = query_of(n);
      auto const load2 = [&](float const* values) {
        return *reinterpret_cast<float2 const*>(values + query);
      };
      float2 const lse2_pair = load2(shared_.lse2), delta_pair = load2(shared_.delta);
      float const lse2[2] = {lse2_pair.x, lse2_pair.y}, delta[2] = {delta_pair.x, delta_pair.y};
      float threshold[2], ceiling[2];
      int window[2];
      if constexpr (kGeneral) {
        float2 const pair = load2(shared_.threshold);
        threshold[0] = pair.x, threshold[1] = pair.y;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          ceiling[x] = __fadd_ru(threshold[x], 1.f);
          window[x] = a_.scores ? shared_.window_begin[query + x] : INT_MIN;
        }
      }
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          KeyData const& k = key[m][h];
          float p[2], ds[2];
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            float const e = device::exp2_approx(fmaf(s[m][n][2 * h + x], p_.scale_log2, -lse2[x]));
            float const dpx = dp[m][n][2 * h + x];
            int const i = step.begin + query + x;
            bool visible = true, interior = false;
            float gate = k.gate;
            if constexpr (kKind == PairKind::kCausal) {
              visible = k.position <= i;
            } else if constexpr (kGeneral) {
              visible = k.position <= i && i < k.expiry && k.position >= step.low &&
                        i >= step.first && i < step.end;
              bool const soft = k.position < window[x];
              gate = soft ? __saturatef(k.score - threshold[x]) : 1.f;
              interior = visible && soft && k.score > threshold[x] && k.score < ceiling[x];
            }
            float const g = kValueGate ? e * dpx : e * (dpx - delta[x]);
            float const derivative = kValueGate ? e * fmaf(gate, dpx, -delta[x])
                                     : kGated   ? gate * g
                                                : g;
            ds[x] = visible ? derivative : 0.f;
            p[x] = visible ? (kGated ? gate * e : e) : 0.f;
            if constexpr (kKind == PairKind::kKeyGate) {
              dscore_[m][h] = fmaf(k.counted, g, dscore_[m][h]);
            } else if constexpr (kGeneral) {
              if (interior) dscore_[m][h] += g;
            }
          }
          store_weights(key_of(m, h), query, p[0], p[1], ds[0], ds[1]);
        }
    }
  }

  // The keys' dscores so far, to shared memory: parts of the warps with either half of the queries.
  __device__ void gather_dscores() {
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = dscore_[m][h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (threadIdx.x % 4 == 0) shared_.dscores[warp_column()][key_of(m, h)] = sum;
      }
  }

  __device__ float gathered_dscores(int key) const {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) sum += shared_.dscores[w][key];
    return sum;
  }

  // --- results -----------------------------------------------------------------------------------
  __device__ T* dk_row(int j) const {
    return reinterpret_cast<T*>(static_cast<char*>(p_.dk) +
                                row_bytes(p_.stride_dk_batch, p_.stride_dk_head,
                                          p_.stride_dk_position, sequence_.index, kv_head_,
                                          sequence_.first_key + j));
  }
  __device__ T* dv_row(int j) const {
    return reinterpret_cast<T*>(static_cast<char*>(p_.dv) +
                                row_bytes(p_.stride_dv_batch, p_.stride_dv_head,
                                          p_.stride_dv_position, sequence_.index, kv_head_,
                                          sequence_.first_key + j));
  }
  // Sums on their way to memory: the threads of a row take eight dims each.
  struct alignas(16) Octet {
    float x[8];
  };
  static constexpr int kLanesPerRow = kHeadDim / 8, kRowGroups = Config::kNumThreads / kLanesPerRow;
  static constexpr int kStageStride = kHeadDim + 4;  // floats
  static __device__ int row_group() { return threadIdx.x / kLanesPerRow; }
  static __device__ int lane_dim() { return threadIdx.x % kLanesPerRow * 8; }

  // Scaled sums of the keys whose bit is set, to the memory of q and dout, which must be free: each
  // row of 32-bit sums has the room of two 16-bit rows.
  __device__ void stage(float const (&sums)[kKeyTiles][kDimTiles][4], float scale,
                        std::uint64_t keys) {
    static_assert(kKeys * kStageStride * 4 <= sizeof(shared_.q) + sizeof(shared_.dout));
    float* const target = reinterpret_cast<float*>(&shared_.q[0][0]);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int const key = key_of(m, h);
        if (!(keys >> key & 1)) continue;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n)
          *reinterpret_cast<float2*>(target + key * kStageStride + dim_of(n)) =
              make_float2(sums[m][n][2 * h] * scale, sums[m][n][2 * h + 1] * scale);
      }
    __syncthreads();
  }
  __device__ Octet const& staged(int key) const {
    return *reinterpret_cast<Octet const*>(reinterpret_cast<float const*>(&shared_.q[0][0]) +
                                           key * kStageStride + lane_dim());
  }

  // This thread's dims of a row of dk or dv.
  __device__ void store_octet(T* row, Octet const& octet) const {
    int const d = lane_dim();
    if (p_.aligned_gradients) {
      if (d >= a_.head_dim) return;
      *reinterpret_cast<uint4*>(row + d) = make_uint4(
          device::pack2<T>(octet.x[0], octet.x[1]), device::pack2<T>(octet.x[2], octet.x[3]),
          device::pack2<T>(octet.x[4], octet.x[5]), device::pack2<T>(octet.x[6], octet.x[7]));
    } else {
      for (int e = 0; e < 8 && d + e < a_.head_dim; ++e) row[d + e] = T(octet.x[e]);
    }
  }

  // Adds this thread's dims of a row of dk or dv.
  __device__ void add_octet(Octet& octet, T const* row) const {
    int const d = lane_dim();
    if (p_.aligned_gradients) {
      if (d >= a_.head_dim) return;
      uint4 const packed = *reinterpret_cast<uint4 const*>(row + d);
      T const* const values = reinterpret_cast<T const*>(&packed);
#pragma unroll
      for (int e = 0; e < 8; ++e) octet.x[e] += static_cast<float>(values[e]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (d + e < a_.head_dim) octet.x[e] += static_cast<float>(row[d + e]);
    }
  }

  __device__ float* dscores_at(int j) const {
    return p_.dscores + p_.stride_dscores_batch * sequence_.index +
           p_.stride_dscores_head * kv_head_ +
           p_.stride_dscores_position * (sequence_.first_key + j);
  }
  __device__ std::int32_t const* expiry_of_keys() const {
    return expiry_row(a_, sequence_, kv_head_);
  }
  // The latest expiry of the keys around position j.
  __device__ int group_expiry_of(int j) const {
    return group_expiry_row(a_, sequence_, kv_head_)[j / kKeyGroup];
  }
  __device__ float const* score_of(int j) const {
    return a_.scores + a_.stride_scores_batch * sequence_.index + a_.stride_scores_head * kv_head_ +
           a_.stride_scores_position * (sequence_.first_key + j);
  }

  BackwardParams const& p_;
  AttendParams const& a_;
  Storage& shared_;
  int const kv_head_;
  Sequence sequence_;
  float dk_[kKeyTiles][kDimTiles][4], dv_[kKeyTiles][kDimTiles][4];
  float dscore_[kKeyTiles][2];  // of this thread's queries
};

}  // namespace sparsek::cuda::portable
