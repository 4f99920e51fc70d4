// SparseK attention, forward, for every architecture since sm_80: mma.sync, ldmatrix and cp.async.
//
// A block of four warps computes kRows queries of one head. It goes through the keys in blocks of
// kKeys: first the contiguous ones (the window and the tile's own), then those of the tile's list,
// whose rows it gathers in pieces of 16 bytes. K of the next block arrives while the output product
// runs, V of this one while the scores are computed, as in FlashAttention-2 (arXiv 2307.08691).
//
//   load Q, K(0)
//   for each block n:
//     wait K(n) | load V(n) | S = Q K' | mask, weigh | wait V(n) | load K(n + 1) | O += P V
//
// The mask of query i and key j is j <= i < expiry_j; the gate of a key before the query's window
// is clip(u_j - tau, 0, 1). Where all of a tile's queries are in one chunk, no listed key needs a
// mask and each has one gate. Where they are not, both are evaluated for each pair.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/portable/attend/config.cuh"
#include "cuda/portable/attend/geometry.cuh"
#include "cuda/portable/attend/load_rows.cuh"

namespace sparsek::cuda::portable {

enum class Mask { kNone, kCausal, kPair };
enum class GateKind { kOne, kKey, kPair };

template <typename Config, typename T>
class AttendBlock {
  static constexpr int kHeadDim = Config::kHeadDim, kRows = Config::kRows, kKeys = Config::kKeys;
  static constexpr int kThreads = Config::kNumThreads;
  static constexpr int kRowTiles = Config::kRowsPerWarp / 16;  // of a warp's products
  static constexpr int kKeyTiles = kKeys / 8, kDimTiles = kHeadDim / 8;
  static constexpr int kRowBytes = Config::kRowBytes, kLanesPerRow = Config::kLanesPerRow;
  // Weights are 2^(s scale - reference) and must fit a float16, as must the sum of a thread's.
  static constexpr float kMaxWeight = 32768.f;
  using Storage = typename Config::SharedStorage;

 public:
  __device__ AttendBlock(AttendParams const& p, Storage& shared, int tile, int part, int q_head)
      : p_(p), shared_(shared), q_head_(q_head) {
    TileSpan const span = locate_tile(p, tile);
    Sequence const& s = span.sequence;
    begin_ = span.begin + part * kRows;
    first_ = max(span.first, begin_);
    last_ = min(span.last, begin_ + kRows);
    end_ = min(last_, s.length);
    if (first_ >= last_) return;
    one_chunk_ = !p.foreign && span.first / p.chunk_size == (end_ - 1) / p.chunk_size;
    block_.entry = -1;
    block_.first = p.source == KeySource::kLists ? list_end(p, span.first) : 0;
    std::int64_t const list = static_cast<std::int64_t>(q_head / p.group) * p.num_tiles + tile;
    if (p.source == KeySource::kLists) list_size_ = p.list_count[list];
    if (threadIdx.x == 0) set_constants(s, q_head / p.group, list);
    __syncthreads();
  }

  __device__ void run() {
    if (first_ >= last_) return;
    clear_accumulators();
    if (first_ < end_ && (p_.source == KeySource::kLists || find_live_group(0))) attend_to_keys();
    store();
  }

 private:
  // A block of keys: positions first ... first + kKeys, or entries of the list from `entry` on.
  struct KeyBlock {
    int first;
    int entry;  // -1: contiguous
  };

  // --- which keys --------------------------------------------------------------------------------
  __device__ void set_constants(Sequence const& s, int kv_head, std::int64_t list) {
    BlockConstants& c = shared_.constants;
    c.sequence = s;
    c.k = static_cast<char const*>(p_.k) +
          2 * (p_.stride_k_batch * s.index + p_.stride_k_head * kv_head +
               p_.stride_k_position * s.first_key);
    c.v = static_cast<char const*>(p_.v) +
          2 * (p_.stride_v_batch * s.index + p_.stride_v_head * kv_head +
               p_.stride_v_position * s.first_key);
    c.expiry = expiry_row(p_, s, kv_head);
    c.scores = p_.scores + (p_.stride_scores_batch * s.index + p_.stride_scores_head * kv_head +
                            p_.stride_scores_position * s.first_key);
    std::int64_t const first_chunk = p_.cu_seqlens_k ? s.first_key / p_.chunk_size + s.index : 0;
    c.threshold = p_.threshold +
                  (p_.stride_chunk_batch * s.index + p_.stride_chunk_head * kv_head + first_chunk);
    c.list = p_.lists + list * p_.list_capacity;
    c.group_expiry = group_expiry_row(p_, s, kv_head);
  }

  __device__ bool find_next_block() {
    if (block_.entry >= 0) {
      block_.entry += kKeys;
      return block_.entry < list_size_;
    }
    block_.first += kKeys;
    if (p_.source == KeySource::kWalk) {
      if (block_.first % kKeyGroup != 0) return block_.first < end_;
      return find_live_group(block_.first / kKeyGroup);
    }
    if (block_.first < end_) return true;
    block_.entry = 0;
    return list_size_ > 0;
  }

  // Moves to the first group of keys from `group` on of which the block's first query may see a
  // key.
  __device__ bool find_live_group(int group) {
    std::int32_t const* const expiry = shared_.constants.group_expiry;
    int const groups = (end_ + kKeyGroup - 1) / kKeyGroup, lane = threadIdx.x % 32;
    for (; group < groups; group += 32) {
      bool const live = group + lane < groups && expiry[group + lane] > first_;
      unsigned const mask = __ballot_sync(~0u, live);
      if (mask) {
        block_.first = (group + __ffs(mask) - 1) * kKeyGroup;
        return true;
      }
    }
    return false;
  }

  // --- loads -------------------------------------------------------------------------------------
  __device__ void load_queries() {
    Sequence const& s = shared_.constants.sequence;
    char const* const q = static_cast<char const*>(p_.q) +
                          2 * (p_.stride_q_batch * s.index + p_.stride_q_head * q_head_ +
                               p_.stride_q_position * s.first_query);
    load_rows<Config, kRows>(p_, shared_.q, q, p_.stride_q_position, begin_ - s.query_offset(),
                             nullptr, first_ - begin_, end_ - begin_);
  }

  // Rows of the block of keys, from K or V.
  __device__ void load_keys(T (*destination)[Config::kRowElements], char const* base,
                            std::int64_t stride) const {
    if (block_.entry >= 0) {
      load_rows<Config, kKeys>(p_, destination, base, stride, 0, shared_.position[position_slot_],
                               0, list_size_ - block_.entry);
    } else {
      load_rows<Config, kKeys>(p_, destination, base, stride, block_.first, nullptr, 0,
                               end_ - block_.first);
    }
  }

  // Positions of the list's entries from `entry` on.
  __device__ void load_positions(int entry, int slot) {
    int const x = threadIdx.x;
    if (x < kKeys) {
      bool const valid = entry + x < list_size_;
      device::cp_async_4(device::shared_address(&shared_.position[slot][x]),
                         shared_.constants.list + (valid ? entry + x : 0), valid);
    }
  }

  // Expiry and score of the block's keys, where its mask or gate needs them: 0 for keys that do not
  // exist.
  __device__ void load_key_data() {
    int const x = threadIdx.x % kKeys, what = threadIdx.x / kKeys;
    if (what > (p_.scores ? 1 : 0)) return;
    bool valid;
    std::int64_t j;
    if (block_.entry >= 0) {
      valid = block_.entry + x < list_size_;
      j = shared_.position[position_slot_][x];
    } else {
      valid = block_.first + x < end_;
      j = valid ? block_.first + x : 0;
    }
    if (what == 0) {
      device::cp_async_4(device::shared_address(&shared_.expiry[x]), shared_.constants.expiry + j,
                         valid);
    } else {
      device::cp_async_4(device::shared_address(&shared_.score[x]),
                         shared_.constants.scores + p_.stride_scores_position * j, valid);
    }
  }

  // Window and threshold of each query.
  __device__ void load_row_data() {
    if (threadIdx.x >= kRows) return;
    int const i = min(max(begin_ + static_cast<int>(threadIdx.x), first_), end_ - 1);
    shared_.window_begin[threadIdx.x] = p_.foreign ? INT_MAX : window_begin(p_, i);
    if (!p_.scores) return;
    shared_.threshold[threadIdx.x] = shared_.constants.threshold[i / p_.chunk_size];
  }

  // --- the loop ----------------------------------------------------------------------------------
  __device__ void attend_to_keys() {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const warp_row = warp * Config::kRowsPerWarp;
    // ldmatrix: A takes rows lane % 16 and column halves lane / 16; K the columns' halves first; V,
    // transposed, as A.
    std::uint32_t const q_address =
        device::shared_address(&shared_.q[warp_row + lane % 16][0]) + lane / 16 * 16;
    std::uint32_t const k_address =
        device::shared_address(&shared_.k[lane / 16 * 8 + lane % 8][0]) + lane / 8 % 2 * 16;
    std::uint32_t const v_address =
        device::shared_address(&shared_.v[lane % 16][0]) + lane / 16 * 16;
    if (p_.source == KeySource::kLists) {
      load_positions(0, 0);
      load_positions(kKeys, 1);
    }
    load_queries();
    load_row_data();
    load_keys(shared_.k, shared_.constants.k, p_.stride_k_position);
    load_key_data();

    bool more = true, adjust_queries = p_.q_and != ~0u || p_.q_xor != 0;
    while (more) {
      wait_for_copies();
      load_keys(shared_.v, shared_.constants.v, p_.stride_v_position);
      if (block_.entry >= 0)
        load_positions(block_.entry + 2 * kKeys, next_slot(next_slot(position_slot_)));
      if (adjust_queries) {
        apply_sign(warp_row);
        adjust_queries = false;
      }
      // Whether any query of the warp may see a key of the block.
      bool const visible =
          block_.entry >= 0 || block_.first < min(begin_ + warp_row + Config::kRowsPerWarp, end_);
      float s[kRowTiles][kKeyTiles][4];
      if (visible) {
        weigh(s, warp_row, q_address, k_address);
      }
      wait_for_copies();
      if (block_.entry >= 0) position_slot_ = next_slot(position_slot_);
      more = find_next_block();
      if (more) {
        load_keys(shared_.k, shared_.constants.k, p_.stride_k_position);
        load_key_data();
      }
      if (visible) multiply_values(s, v_address);
    }
  }

  __device__ static int next_slot(int slot) {
    return slot + 1 == Config::kPositionSlots ? 0 : slot + 1;
  }

  __device__ static void wait_for_copies() {
    device::cp_async_wait_all();
    __syncthreads();
  }

  __device__ void clear_accumulators() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) reference_[m][h] = -CUDART_INF_F, sum_[m][h] = 0.f;
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[m][n][e] = 0.f;
    }
  }

  // A scale that is not positive: the sign goes to the warp's own queries, so that larger products
  // are larger scores.
  __device__ void apply_sign(int warp_row) {
    int const lane = threadIdx.x % 32;
    for (int x = lane; x < Config::kRowsPerWarp * (kHeadDim / 2); x += 32) {
      auto* const pair = reinterpret_cast<std::uint32_t*>(
          &shared_.q[warp_row + x / (kHeadDim / 2)][x % (kHeadDim / 2) * 2]);
      *pair = (*pair & p_.q_and) ^ p_.q_xor;
    }
    __syncwarp();
  }

  // S = Q K'.
  __device__ static void multiply_scores(float (&s)[kRowTiles][kKeyTiles][4],
                                         std::uint32_t q_address, std::uint32_t k_address) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = 0.f;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      std::uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        device::ldmatrix_x4(a[m], q_address + m * 16 * kRowBytes + d * 32);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        std::uint32_t b[4];
        device::ldmatrix_x4(b, k_address + n * 8 * kRowBytes + d * 32);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          device::mma_m16n8k16<T>(s[m][n], a[m], b[0], b[1]);
          device::mma_m16n8k16<T>(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // O += P V, with P rounded to T.
  __device__ void multiply_values(float const (&p)[kRowTiles][kKeyTiles][4],
                                  std::uint32_t v_address) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      std::uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        a[m][0] = device::pack2<T>(p[m][n][0], p[m][n][1]);
        a[m][1] = device::pack2<T>(p[m][n][2], p[m][n][3]);
        a[m][2] = device::pack2<T>(p[m][n + 1][0], p[m][n + 1][1]);
        a[m][3] = device::pack2<T>(p[m][n + 1][2], p[m][n + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < kDimTiles; d += 2) {
        std::uint32_t b[4];
        device::ldmatrix_x4_transposed(b, v_address + n * 8 * kRowBytes + d * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          device::mma_m16n8k16<T>(o_[m][d], a[m], b[0], b[1]);
          device::mma_m16n8k16<T>(o_[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // --- mask, softmax, gate -----------------------------------------------------------------------
  // The block's weights, 2^(s scale - reference) times the gate, and their sums.
  //
  // The reference is the row's maximum over the first block of which it sees a key. It need not be
  // the maximum of all, only near enough for a float16 to hold the weights. The sums tell when it
  // is not: then the block is computed once more, with the maximum raised and the output rescaled.
  // So most blocks neither look for their maximum nor rescale.
  __device__ void weigh(float (&s)[kRowTiles][kKeyTiles][4], int warp_row, std::uint32_t q_address,
                        std::uint32_t k_address) {
    // The warp's queries that exist, and what this block is to them.
    int const low = max(begin_ + warp_row, first_);
    bool const listed = block_.entry >= 0;
    Mask mask = Mask::kPair;
    GateKind gate = GateKind::kPair;
    if (listed) {
      if (one_chunk_) {
        gate = GateKind::kKey;
        if (block_.entry + kKeys <= list_size_) mask = Mask::kNone;
      }
    } else {
      // Of the window of the last query there is, all queries see what is not after them.
      int const window = shared_.window_begin[kRows - 1];
      if (block_.first >= window) {
        gate = GateKind::kOne;
        mask = block_.first + kKeys <= low + 1 ? Mask::kNone : Mask::kCausal;
      } else if (one_chunk_ && block_.first + kKeys <= window) {
        gate = GateKind::kKey;
      }
    }
    if (!p_.scores) gate = GateKind::kOne;

    bool without = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) without |= reference_[m][h] == -CUDART_INF_F;
    bool raise = __any_sync(~0u, without);
    float sum[kRowTiles][2];
    for (;;) {
      multiply_scores(s, q_address, k_address);
      if (mask != Mask::kNone) apply_mask(s, warp_row, mask, listed);
      if (raise) raise_reference(s);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) sum[m][0] = sum[m][1] = 0.f;
      if (gate == GateKind::kOne) {
        exponentiate(s, sum);
      } else if (gate == GateKind::kKey) {
        p_.value_gate ? exponentiate_key_gate<true>(s, sum) : exponentiate_key_gate<false>(s, sum);
      } else {
        exponentiate_pair_gate(s, sum, warp_row, listed);
      }
      bool large = false;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) large |= !(sum[m][h] <= kMaxWeight);
      if (raise || !__any_sync(~0u, large)) break;
      raise = true;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) sum_[m][h] += sum[m][h];
  }

  // Position of a thread's row: row tile m, half h.
  __device__ int row_of(int warp_row, int m, int h) const {
    return warp_row + m * 16 + h * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  // Column within the block of keys: key tile n, first of two.
  __device__ static int column_of(int n) { return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2; }

  __device__ void apply_mask(float (&s)[kRowTiles][kKeyTiles][4], int warp_row, Mask mask,
                             bool listed) const {
    // The last column that each row sees: listed keys are all in the past.
    int last[kRowTiles][2], position[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        position[m][h] = begin_ + row_of(warp_row, m, h);
        last[m][h] = listed ? kKeys : position[m][h] - block_.first;
      }
    if (mask == Mask::kCausal) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (column_of(n) + e % 2 > last[m][e / 2]) s[m][n][e] = -CUDART_INF_F;
      return;
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      int2 const expiry = *reinterpret_cast<int2 const*>(&shared_.expiry[column_of(n)]);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          bool const hidden = column_of(n) + e % 2 > last[m][e / 2] ||
                              position[m][e / 2] >= (e % 2 ? expiry.y : expiry.x);
          if (hidden) s[m][n][e] = -CUDART_INF_F;
        }
    }
  }

  // Raises the references to the maxima of this block and rescales what has been summed.
  __device__ void raise_reference(float const (&s)[kRowTiles][kKeyTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        x = fmaxf(x * p_.scale_log2, reference_[m][h]);
        // Without a key so far both are -inf and nothing has been summed.
        float const factor =
            reference_[m][h] == x ? 1.f : device::exp2_approx(reference_[m][h] - x);
        reference_[m][h] = x;
        sum_[m][h] *= factor;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n)
          o_[m][n][2 * h] *= factor, o_[m][n][2 * h + 1] *= factor;
      }
  }

  // What is subtracted in the exponent; a row that saw no key has only weights 2^-inf.
  __device__ float exponent_offset(int m, int h) const {
    return reference_[m][h] == -CUDART_INF_F ? 0.f : -reference_[m][h];
  }

  __device__ void exponentiate(float (&s)[kRowTiles][kKeyTiles][4], float (&sum)[kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float const offset = exponent_offset(m, h);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[m][n][e] = device::exp2_approx(fmaf(s[m][n][e], p_.scale_log2, offset));
            sum[m][h] += s[m][n][e];
          }
      }
  }

  // One gate for each key: all queries are in one chunk.
  template <bool kValueGate>
  __device__ void exponentiate_key_gate(float (&s)[kRowTiles][kKeyTiles][4],
                                        float (&sum)[kRowTiles][2]) {
    float const threshold = shared_.threshold[0];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      float2 const score = *reinterpret_cast<float2 const*>(&shared_.score[column_of(n)]);
      float const gate[2] = {__saturatef(score.x - threshold), __saturatef(score.y - threshold)};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float const weight =
              device::exp2_approx(fmaf(s[m][n][e], p_.scale_log2, exponent_offset(m, e / 2)));
          s[m][n][e] = weight * gate[e % 2];
          sum[m][e / 2] += kValueGate ? weight : s[m][n][e];
        }
    }
  }

  __device__ void exponentiate_pair_gate(float (&s)[kRowTiles][kKeyTiles][4],
                                         float (&sum)[kRowTiles][2], int warp_row, bool listed) {
    float threshold[kRowTiles][2];
    int window[kRowTiles][2];  // first column of the row's window
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int const row = row_of(warp_row, m, h);
        threshold[m][h] = shared_.threshold[row];
        window[m][h] = listed ? kKeys : shared_.window_begin[row] - block_.first;
      }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      float2 const score = *reinterpret_cast<float2 const*>(&shared_.score[column_of(n)]);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float const soft = __saturatef((e % 2 ? score.y : score.x) - threshold[m][e / 2]);
          float const gate = column_of(n) + e % 2 >= window[m][e / 2] ? 1.f : soft;
          float const weight =
              device::exp2_approx(fmaf(s[m][n][e], p_.scale_log2, exponent_offset(m, e / 2)));
          s[m][n][e] = weight * gate;
          sum[m][e / 2] += p_.value_gate ? weight : s[m][n][e];
        }
    }
  }

  // --- results -----------------------------------------------------------------------------------
  __device__ void store() {
    int const lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * Config::kRowsPerWarp;
    Sequence const& s = shared_.constants.sequence;
    __syncwarp();  // the warp's last products have read its queries
    std::int64_t const first_row =
        static_cast<std::int64_t>(begin_) - s.query_offset() + s.first_query;  // of the block, in q
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = sum_[m][h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        int const row = row_of(warp_row, m, h), i = begin_ + row;
        bool const empty = sum == 0.f || i >= end_;
        float const inverse = 1.f / sum;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) {
          float const x = empty ? 0.f : o_[m][n][2 * h] * inverse;
          float const y = empty ? 0.f : o_[m][n][2 * h + 1] * inverse;
          *reinterpret_cast<std::uint32_t*>(&shared_.q[row][column_of(n)]) = device::pack2<T>(x, y);
        }
        if (p_.lse && lane % 4 == 0 && i >= first_ && i < last_) {
          constexpr float kLn2 = 0.69314718055994531f;
          p_.lse[p_.stride_lse_batch * s.index + p_.stride_lse_head * q_head_ +
                 p_.stride_lse_position * (first_row + row)] =
              empty ? -CUDART_INF_F : (reference_[m][h] + log2f(sum)) * kLn2;
        }
      }
    __syncwarp();
    char* const out = static_cast<char*>(p_.out) +
                      2 * (p_.stride_out_batch * s.index + p_.stride_out_head * q_head_);
    int const lane_row = warp_row + lane / kLanesPerRow, lane_column = lane % kLanesPerRow * 8;
#pragma unroll 4
    for (int row = lane_row; row < warp_row + Config::kRowsPerWarp; row += 32 / kLanesPerRow) {
      if (begin_ + row < first_ || begin_ + row >= last_) continue;
      char* const target = out + 2 * p_.stride_out_position * (first_row + row);
#pragma unroll
      for (int column = lane_column; column < kHeadDim; column += kLanesPerRow * 8) {
        T const* const source = &shared_.q[row][column];
        if (p_.aligned_stores && column < p_.head_dim) {
          *reinterpret_cast<uint4*>(target + 2 * column) = *reinterpret_cast<uint4 const*>(source);
        } else {
          for (int e = 0; e < min(8, p_.head_dim - column); ++e)
            reinterpret_cast<T*>(target)[column + e] = source[e];
        }
      }
    }
  }

  AttendParams const& p_;
  Storage& shared_;
  int const q_head_;
  int begin_;         // position of the block's row 0
  int first_, last_;  // its queries
  int end_;         // those before the sequence's length end here, and so do the keys that they see
  bool one_chunk_;  // all of the tile's queries up to end_ are in one chunk
  int list_size_ = 0;
  KeyBlock block_;
  int position_slot_ = 0;
  float o_[kRowTiles][kDimTiles][4];
  float reference_[kRowTiles][2], sum_[kRowTiles][2];  // sum: of this thread's columns
};

// A block for each (query head, tile, part of a tile). Blocks that run together share keys: the
// query heads of a group come first, then the parts and tiles of a head, late tiles, which may see
// more keys, before early ones.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(AttendConfig<T, kHeadDim>::kNumThreads,
                                  AttendConfig<T, kHeadDim>::kBlocksPerProcessor)
    attend_kernel(__grid_constant__ AttendParams const p) {
  using Config = AttendConfig<T, kHeadDim>;
  extern __shared__ __align__(16) char storage[];
  constexpr int kParts = kQueryTile / Config::kRows;
  int x = blockIdx.x;
  int const in_group = x % p.group;
  x /= p.group;
  int const part = kParts - 1 - x % kParts;
  x /= kParts;
  int const tile = p.num_tiles - 1 - x % p.num_tiles;
  int const q_head = x / p.num_tiles * p.group + in_group;
  AttendBlock<Config, T>(p, *reinterpret_cast<typename Config::SharedStorage*>(storage), tile, part,
                         q_head)
      .run();
}

}  // namespace sparsek::cuda::portable
