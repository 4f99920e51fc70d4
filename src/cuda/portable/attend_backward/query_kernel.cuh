// dq, and of each query what the keys' gradients need: lse in base 2, delta = dout . out, and the sum
// of its gate gradients.
//
// As in the forward (attend/kernel.cuh) a block of warps owns kRows queries of one head and goes
// first through contiguous keys, then through those of the tile's list. For each block of keys:
//
//   load K(n + 1) | S = Q K(n)' | wait V(n) | dP = dO V(n)' | dS | load V(n + 1) | dQ += dS K(n) |
//   wait K(n + 1)
//
// With e = exp(s - lse), m the gate and g the gradient of m:
//   softmax gate  g = e (dP - delta)   dS = m g
//   value gate    g = e dP             dS = e (m dP - delta)
#pragma once
#include <math_constants.h>

#include <climits>
#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/portable/attend/load_rows.cuh"
#include "cuda/portable/attend_backward/config.cuh"
#include "cuda/portable/attend_backward/params.cuh"

namespace sparsek::cuda::portable {

template <typename Config, typename T>
class QueryBlock {
  static constexpr int kHeadDim = Config::kHeadDim, kRows = Config::kRows, kKeys = Config::kKeys;
  static constexpr int kRowTiles = Config::kRowsPerWarp / 16;  // of a warp's products
  static constexpr int kKeyTiles = kKeys / 8, kDimTiles = kHeadDim / 8;
  static constexpr int kRowBytes = Config::kRowBytes, kLanesPerRow = Config::kLanesPerRow;
  static constexpr int kKeyStageBytes = kKeys * kRowBytes;
  using Storage = typename Config::SharedStorage;

 public:
  __device__ QueryBlock(BackwardParams const& p, Storage& shared, int tile, int part, int q_head)
      : p_(p), a_(p.a), shared_(shared), q_head_(q_head), kv_head_(q_head / p.a.group) {
    TileSpan const span = locate_tile(a_, tile);
    sequence_ = span.sequence;
    begin_ = span.begin + part * kRows;
    first_ = max(span.first, begin_);
    last_ = min(span.last, begin_ + kRows);
    end_ = min(last_, sequence_.length);
    one_chunk_ =
        !a_.foreign && first_ < end_ &&
        span.first / a_.chunk_size == (min(span.last, sequence_.length) - 1) / a_.chunk_size;
    next_ = {a_.source == KeySource::kLists ? list_end(a_, span.first) : 0, -1};
    std::int64_t const list = static_cast<std::int64_t>(kv_head_) * a_.num_tiles + tile;
    if (a_.source == KeySource::kLists) list_size_ = a_.list_count[list];
    list_ = a_.lists + list * a_.list_capacity;
    if (threadIdx.x == 0) set_key_rows();
    __syncthreads();
  }

  __device__ void run() {
    if (first_ >= last_) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      gate_gradient_[m][0] = gate_gradient_[m][1] = 0.f;
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dq_[m][n][e] = 0.f;
    }
    if (first_ < end_) {
      load_queries();
      bool const any = a_.source == KeySource::kLists || find_live_group(0);
      if (any) start();
      device::cp_async_commit();
      wait_for_copies<0>();
      prepare_rows();
      __syncthreads();
      if (any) go_through_keys();
      store_gate_gradients();
    }
    store();
  }

 private:
  // A block of keys: positions first ... first + kKeys, or entries of the list from `entry` on.
  struct KeyBlock {
    int first;
    int entry;  // -1: contiguous
  };

  // --- which keys --------------------------------------------------------------------------------
  __device__ bool find_next_block() {
    if (next_.entry >= 0) {
      next_.entry += kKeys;
      return next_.entry < list_size_;
    }
    next_.first += kKeys;
    if (a_.source == KeySource::kWalk) {
      if (next_.first % kKeyGroup != 0) return next_.first < end_;
      return find_live_group(next_.first / kKeyGroup);
    }
    if (next_.first < end_) return true;
    next_.entry = 0;
    return list_size_ > 0;
  }

  // Moves to the first group of keys from `group` on of which the block's first query may see a
  // key.
  __device__ bool find_live_group(int group) {
    std::int32_t const* const expiry = group_expiry_row(a_, sequence_, kv_head_);
    int const groups = (end_ + kKeyGroup - 1) / kKeyGroup, lane = threadIdx.x % 32;
    for (; group < groups; group += 32) {
      bool const live = group + lane < groups && expiry[group + lane] > first_;
      unsigned const mask = __ballot_sync(~0u, live);
      if (mask) {
        next_.first = (group + __ffs(mask) - 1) * kKeyGroup;
        return true;
      }
    }
    return false;
  }

  // --- loads -------------------------------------------------------------------------------------
  __device__ void load_queries() {
    int const row = begin_ - sequence_.query_offset(), low = first_ - begin_, high = end_ - begin_;
    char const* const q = static_cast<char const*>(a_.q) +
                          row_bytes(a_.stride_q_batch, a_.stride_q_head, a_.stride_q_position,
                                    sequence_.index, q_head_, sequence_.first_query);
    load_rows<Config, kRows>(a_, shared_.q, q, a_.stride_q_position, row, nullptr, low, high);
    char const* const dout =
        static_cast<char const*>(p_.dout) + row_bytes(p_.stride_dout_batch, p_.stride_dout_head,
                                                      p_.stride_dout_position, sequence_.index,
                                                      q_head_, sequence_.first_query);
    load_rows<Config, kRows>(a_, shared_.dout, dout, p_.stride_dout_position, row, nullptr, low,
                             high);
  }

  __device__ void set_key_rows() {
    KeyRows& rows = shared_.keys;
    rows.k = static_cast<char const*>(a_.k) + row_bytes(a_.stride_k_batch, a_.stride_k_head,
                                                        a_.stride_k_position, sequence_.index,
                                                        kv_head_, sequence_.first_key);
    rows.v = static_cast<char const*>(a_.v) + row_bytes(a_.stride_v_batch, a_.stride_v_head,
                                                        a_.stride_v_position, sequence_.index,
                                                        kv_head_, sequence_.first_key);
    rows.expiry = expiry_row(a_, sequence_, kv_head_);
    rows.scores = a_.scores + a_.stride_scores_batch * sequence_.index +
                  a_.stride_scores_head * kv_head_ +
                  a_.stride_scores_position * sequence_.first_key;
  }

  // Rows of the next block of keys, from K or V.
  __device__ void load_keys(T (*destination)[Config::kRowElements], char const* base,
                            std::int64_t stride) const {
    if (next_.entry >= 0) {
      load_rows<Config, kKeys>(a_, destination, base, stride, 0,
                               shared_.position[stage_of(next_.entry)], 0,
                               list_size_ - next_.entry);
    } else {
      load_rows<Config, kKeys>(a_, destination, base, stride, next_.first, nullptr, 0,
                               end_ - next_.first);
    }
  }
  __device__ void load_k(int stage) const {
    load_keys(shared_.k[stage], shared_.keys.k, a_.stride_k_position);
  }
  __device__ void load_v() const { load_keys(shared_.v, shared_.keys.v, a_.stride_v_position); }

  // Positions of listed keys take turns in two buffers.
  __device__ static int stage_of(int entry) { return entry / kKeys % Config::kStages; }

  __device__ void load_positions(int entry) {
    int const x = threadIdx.x;
    if (x < kKeys) {
      bool const valid = entry + x < list_size_;
      device::cp_async_4(device::shared_address(&shared_.position[stage_of(entry)][x]),
                         list_ + (valid ? entry + x : 0), valid);
    }
  }

  // Expiry and score of the next block's keys: 0 for keys that do not exist.
  __device__ void load_key_data(int stage) {
    int const x = threadIdx.x % kKeys, what = threadIdx.x / kKeys;
    if (what > (a_.scores ? 1 : 0)) return;
    bool valid;
    std::int64_t j;
    if (next_.entry >= 0) {
      valid = next_.entry + x < list_size_;
      j = shared_.position[stage_of(next_.entry)][x];
    } else {
      valid = next_.first + x < end_;
      j = valid ? next_.first + x : 0;
    }
    if (what == 0) {
      device::cp_async_4(device::shared_address(&shared_.expiry[stage][x]), shared_.keys.expiry + j,
                         valid);
    } else {
      device::cp_async_4(device::shared_address(&shared_.score[stage][x]),
                         shared_.keys.scores + a_.stride_scores_position * j, valid);
    }
  }

  // All groups of copies but the last kPending.
  template <int kPending>
  __device__ static void wait_for_copies() {
    device::cp_async_wait_group<kPending>();
    __syncthreads();
  }

  // The first block of keys.
  __device__ void start() {
    if (a_.source == KeySource::kLists) {
      load_positions(0);
      load_positions(kKeys);
    }
    load_k(0);
    load_key_data(0);
    load_v();
  }

  // lse, delta, threshold and window of each query; the rows of dout have arrived. A warp's rows are
  // its own.
  __device__ void prepare_rows() {
    int const warp_row = threadIdx.x / 32 * Config::kRowsPerWarp, lane = threadIdx.x % 32;
    constexpr float kLog2E = 1.4426950408889634f;
    std::int64_t const offset = sequence_.query_offset();
    char const* const out =
        static_cast<char const*>(a_.out) + row_bytes(a_.stride_out_batch, a_.stride_out_head,
                                                     a_.stride_out_position, sequence_.index,
                                                     q_head_, sequence_.first_query);
#pragma unroll 4
    for (int r = 0; r < Config::kRowsPerWarp; ++r) {
      int const row = warp_row + r, i = begin_ + row;
      float sum = 0.f;
      if (i >= first_ && i < end_)
        sum =
            multiply_row(out + 2 * a_.stride_out_position * (i - offset), shared_.dout[row], lane);
#pragma unroll
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) shared_.delta[row] = sum;
    }
    __syncwarp();
    if (lane >= Config::kRowsPerWarp) return;
    int const row = warp_row + lane;
    bool const exists = begin_ + row >= first_ && begin_ + row < end_;
    int const i = min(max(begin_ + row, first_), end_ - 1);
    float lse2 = CUDART_INF_F;
    if (exists) {
      int const r = i - static_cast<int>(offset);
      float const lse =
          a_.lse[a_.stride_lse_batch * sequence_.index + a_.stride_lse_head * q_head_ +
                 a_.stride_lse_position * (sequence_.first_query + r)];
      if (lse != -CUDART_INF_F) lse2 = lse * kLog2E;
      std::int64_t const index = row_index(a_, sequence_, q_head_, r);
      p_.lse2[index] = lse2;
      p_.delta[index] = shared_.delta[row];
    }
    shared_.lse2[row] = lse2;
    shared_.window_begin[row] = a_.foreign ? INT_MAX : window_begin(a_, i);
    if (a_.scores) {
      std::int64_t const first_chunk =
          a_.cu_seqlens_k ? sequence_.first_key / a_.chunk_size + sequence_.index : 0;
      shared_.threshold[row] =
          a_.threshold[a_.stride_chunk_batch * sequence_.index + a_.stride_chunk_head * kv_head_ +
                       first_chunk + i / a_.chunk_size];
    }
  }

  // This lane's part of out . dout.
  __device__ float multiply_row(char const* out, T const* dout, int lane) const {
    float sum = 0.f;
    if (p_.aligned_out) {
      for (int d = lane * 4; d < a_.head_dim; d += 128) {
        uint2 const x = *reinterpret_cast<uint2 const*>(out + 2 * d);
        uint2 const y = *reinterpret_cast<uint2 const*>(dout + d);
        T const* const u = reinterpret_cast<T const*>(&x);
        T const* const w = reinterpret_cast<T const*>(&y);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum = fmaf(static_cast<float>(u[e]), static_cast<float>(w[e]), sum);
      }
    } else {
      for (int d = lane; d < a_.head_dim; d += 32) {
        sum = fmaf(static_cast<float>(reinterpret_cast<T const*>(out)[d]),
                   static_cast<float>(dout[d]), sum);
      }
    }
    return sum;
  }

  // --- the loop ----------------------------------------------------------------------------------
  __device__ void go_through_keys() {
    int const lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * Config::kRowsPerWarp;
    // ldmatrix: A takes rows lane % 16 and column halves lane / 16; K and V, for S and dP, the
    // columns' halves first; K for dQ, transposed, as A.
    int const a_offset = lane % 16 * kRowBytes + lane / 16 * 16;
    int const b_offset = (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
    std::uint32_t const q_address = device::shared_address(&shared_.q[warp_row][0]) + a_offset;
    std::uint32_t const dout_address =
        device::shared_address(&shared_.dout[warp_row][0]) + a_offset;
    std::uint32_t const v_address = device::shared_address(&shared_.v[0][0]) + b_offset;
    std::uint32_t const k_base = device::shared_address(&shared_.k[0][0][0]);

    bool more = true;
    for (int stage = 0; more; stage ^= 1) {
      KeyBlock const block = next_;
      more = find_next_block();
      if (more) {
        load_k(stage ^ 1);
        load_key_data(stage ^ 1);
        // Into the buffer whose positions this block was loaded from.
        if (block.entry >= 0) load_positions(block.entry + 2 * kKeys);
      }
      device::cp_async_commit();
      // Whether any query of the warp may see a key of the block.
      bool const visible =
          block.entry >= 0 || block.first < min(begin_ + warp_row + Config::kRowsPerWarp, end_);
      float s[kRowTiles][kKeyTiles][4], dp[kRowTiles][kKeyTiles][4];
      if (visible) multiply_rows(s, q_address, k_base + stage * kKeyStageBytes + b_offset);
      wait_for_copies<1>();  // V(n)
      if (visible) {
        multiply_rows(dp, dout_address, v_address);
        differentiate(s, dp, block, stage, warp_row);
      }
      __syncthreads();
      if (more) load_v();
      device::cp_async_commit();
      if (visible) multiply_keys(s, k_base + stage * kKeyStageBytes + a_offset);
      wait_for_copies<1>();  // K(n + 1)
    }
    device::cp_async_wait_all();
  }

  // c = A B' over the head dimension.
  __device__ static void multiply_rows(float (&c)[kRowTiles][kKeyTiles][4], std::uint32_t a_address,
                                       std::uint32_t b_address) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n][e] = 0.f;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      std::uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        device::ldmatrix_x4(a[m], a_address + m * 16 * kRowBytes + d * 32);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        std::uint32_t b[4];
        device::ldmatrix_x4(b, b_address + n * 8 * kRowBytes + d * 32);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          device::mma_m16n8k16<T>(c[m][n], a[m], b[0], b[1]);
          device::mma_m16n8k16<T>(c[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // dQ += dS K, with dS rounded to T.
  __device__ void multiply_keys(float const (&ds)[kRowTiles][kKeyTiles][4],
                                std::uint32_t k_address) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      std::uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        a[m][0] = device::pack2<T>(ds[m][n][0], ds[m][n][1]);
        a[m][1] = device::pack2<T>(ds[m][n][2], ds[m][n][3]);
        a[m][2] = device::pack2<T>(ds[m][n + 1][0], ds[m][n + 1][1]);
        a[m][3] = device::pack2<T>(ds[m][n + 1][2], ds[m][n + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < kDimTiles; d += 2) {
        std::uint32_t b[4];
        device::ldmatrix_x4_transposed(b, k_address + n * 8 * kRowBytes + d * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          device::mma_m16n8k16<T>(dq_[m][d], a[m], b[0], b[1]);
          device::mma_m16n8k16<T>(dq_[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // --- the softmax's and the gates' derivatives ----------------------------------------------------
  // Position of a thread's row within the block: row tile m, half h.
  __device__ static int row_of(int warp_row, int m, int h) {
    return warp_row + m * 16 + h * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  // Column within the block of keys: key tile n, first of two.
  __device__ static int column_of(int n) { return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2; }

  // S becomes dS; the rows' gate gradients are summed.
  __device__ void differentiate(float (&s)[kRowTiles][kKeyTiles][4],
                                float const (&dp)[kRowTiles][kKeyTiles][4], KeyBlock const& block,
                                int stage, int warp_row) {
    int const low = max(begin_ + warp_row, first_);  // the warp's first query that exists
    int const window = shared_.window_begin[kRows - 1];
    PairKind kind = PairKind::kGeneral;
    if (block.entry >= 0) {
      if (one_chunk_ && block.entry + kKeys <= list_size_)
        kind = a_.scores ? PairKind::kKeyGate : PairKind::kPlain;
    } else if (block.first >= window) {
      // Of the window of the last query there is, all queries see what is not after them.
      kind = block.first + kKeys <= low + 1 ? PairKind::kPlain : PairKind::kCausal;
    }
    switch (kind) {
      case PairKind::kPlain:
        return differentiate<PairKind::kPlain, false>(s, dp, block, stage, warp_row);
      case PairKind::kCausal:
        return differentiate<PairKind::kCausal, false>(s, dp, block, stage, warp_row);
      case PairKind::kKeyGate:
        return a_.value_gate
                   ? differentiate<PairKind::kKeyGate, true>(s, dp, block, stage, warp_row)
                   : differentiate<PairKind::kKeyGate, false>(s, dp, block, stage, warp_row);
      case PairKind::kGeneral:
        return a_.value_gate
                   ? differentiate<PairKind::kGeneral, true>(s, dp, block, stage, warp_row)
                   : differentiate<PairKind::kGeneral, false>(s, dp, block, stage, warp_row);
    }
  }

  // What a row's pairs have in common; columns count from the block's first key.
  struct RowData {
    float lse2, delta;
    float threshold, ceiling;  // of the score of a key with a gate between 0 and 1
    int position;
    int last_column;   // that the row may see
    int window_begin;  // columns before it are gated
  };

  template <PairKind kKind>
  __device__ RowData load_row(KeyBlock const& block, int row) const {
    RowData r{};
    r.lse2 = shared_.lse2[row];
    r.delta = shared_.delta[row];
    r.position = begin_ + row;
    bool const listed = block.entry >= 0;
    r.last_column = listed ? kKeys : r.position - block.first;
    if constexpr (kKind == PairKind::kGeneral) {
      r.window_begin = !a_.scores ? INT_MIN
                       : listed   ? kKeys
                                  : shared_.window_begin[row] - block.first;
      r.threshold = shared_.threshold[row];
      r.ceiling = __fadd_ru(r.threshold, 1.f);
    }
    return r;
  }

  template <PairKind kKind, bool kValueGate>
  __device__ void differentiate(float (&s)[kRowTiles][kKeyTiles][4],
                                float const (&dp)[kRowTiles][kKeyTiles][4], KeyBlock const& block,
                                int stage, int warp_row) {
    constexpr bool kGated = kKind == PairKind::kKeyGate || kKind == PairKind::kGeneral;
    RowData row[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) row[m][h] = load_row<kKind>(block, row_of(warp_row, m, h));
    float const chunk_threshold =
        kKind == PairKind::kKeyGate ? shared_.threshold[first_ - begin_] : 0.f;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        int const column = column_of(n) + x;
        float const score = kGated ? shared_.score[stage][column] : 0.f;
        int const expiry = kKind == PairKind::kGeneral ? shared_.expiry[stage][column] : 0;
        float gate = 1.f, counted = 0.f;
        if constexpr (kKind == PairKind::kKeyGate) {
          gate = __saturatef(score - chunk_threshold);
          counted = is_interior(score, chunk_threshold) ? 1.f : 0.f;
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            RowData const& r = row[m][h];
            float const e = device::exp2_approx(fmaf(s[m][n][2 * h + x], p_.scale_log2, -r.lse2));
            float const dpx = dp[m][n][2 * h + x];
            bool visible = true, interior = false;
            if constexpr (kKind == PairKind::kCausal) {
              visible = column <= r.last_column;
            } else if constexpr (kKind == PairKind::kGeneral) {
              visible = column <= r.last_column && r.position < expiry;
              bool const soft = column < r.window_begin;
              gate = soft ? __saturatef(score - r.threshold) : 1.f;
              interior = visible && soft && score > r.threshold && score < r.ceiling;
            }
            float const g = kValueGate ? e * dpx : e * (dpx - r.delta);
            float const ds = kValueGate ? e * fmaf(gate, dpx, -r.delta) : kGated ? gate * g : g;
            s[m][n][2 * h + x] = visible ? ds : 0.f;
            if constexpr (kKind == PairKind::kKeyGate) {
              gate_gradient_[m][h] = fmaf(counted, g, gate_gradient_[m][h]);
            } else if constexpr (kKind == PairKind::kGeneral) {
              if (interior) gate_gradient_[m][h] += g;
            }
          }
      }
  }

  // --- results -----------------------------------------------------------------------------------
  __device__ void store_gate_gradients() {
    if (!p_.gate_gradient) return;
    int const warp_row = threadIdx.x / 32 * Config::kRowsPerWarp;
    std::int64_t const index = row_index(a_, sequence_, q_head_, begin_ - sequence_.query_offset());
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = gate_gradient_[m][h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        int const row = row_of(warp_row, m, h), i = begin_ + row;
        if (threadIdx.x % 4 == 0 && i >= first_ && i < end_) p_.gate_gradient[index + row] = sum;
      }
  }

  __device__ void store() {
    int const lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * Config::kRowsPerWarp;
    __syncwarp();  // the warp's last products have read its queries
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int const row = row_of(warp_row, m, h);
        float const scale = begin_ + row < end_ ? p_.sm_scale : 0.f;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n)
          *reinterpret_cast<std::uint32_t*>(&shared_.q[row][column_of(n)]) =
              device::pack2<T>(dq_[m][n][2 * h] * scale, dq_[m][n][2 * h + 1] * scale);
      }
    __syncwarp();
    char* const dq =
        static_cast<char*>(p_.dq) +
        row_bytes(p_.stride_dq_batch, p_.stride_dq_head, p_.stride_dq_position, sequence_.index,
                  q_head_, sequence_.first_query + begin_ - sequence_.query_offset());
    int const column = lane % kLanesPerRow * 8;
#pragma unroll 4
    for (int row = warp_row + lane / kLanesPerRow; row < warp_row + Config::kRowsPerWarp;
         row += 32 / kLanesPerRow) {
      if (begin_ + row < first_ || begin_ + row >= last_) continue;
      char* const target = dq + 2 * p_.stride_dq_position * row;
      T const* const source = &shared_.q[row][column];
      if (p_.aligned_gradients && column < a_.head_dim) {
        *reinterpret_cast<uint4*>(target + 2 * column) = *reinterpret_cast<uint4 const*>(source);
      } else {
        for (int e = 0; e < min(8, a_.head_dim - column); ++e)
          reinterpret_cast<T*>(target)[column + e] = source[e];
      }
    }
  }

  BackwardParams const& p_;
  AttendParams const& a_;
  Storage& shared_;
  int const q_head_, kv_head_;
  Sequence sequence_;
  int begin_;         // position of the block's row 0
  int first_, last_;  // its queries
  int end_;           // those before the sequence's length end here, and so do the keys they see
  bool one_chunk_;    // all of the tile's queries up to the length are in one chunk
  int list_size_ = 0;
  std::int32_t const* list_;
  KeyBlock next_;
  float dq_[kRowTiles][kDimTiles][4];
  float gate_gradient_[kRowTiles][2];  // of this thread's columns
};

// Blocks in the forward's order: the query heads of a group are neighbours and share keys.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(QueryConfig<T, kHeadDim>::kNumThreads,
                                  QueryConfig<T, kHeadDim>::kBlocksPerProcessor)
    query_gradient_kernel(__grid_constant__ BackwardParams const p) {
  using Config = QueryConfig<T, kHeadDim>;
  extern __shared__ __align__(16) char storage[];
  constexpr int kParts = kQueryTile / Config::kRows;
  int x = blockIdx.x;
  int const in_group = x % p.a.group;
  x /= p.a.group;
  int const part = kParts - 1 - x % kParts;
  x /= kParts;
  int const tile = p.a.num_tiles - 1 - x % p.a.num_tiles;
  int const q_head = x / p.a.num_tiles * p.a.group + in_group;
  QueryBlock<Config, T>(p, *reinterpret_cast<typename Config::SharedStorage*>(storage), tile, part,
                        q_head)
      .run();
}

}  // namespace sparsek::cuda::portable
