// Attention of a few query rows over a list of keys (AttendTile, kernels.hpp): what a step of
// generation is.
//
// The tile kernel keeps rows in the lanes of a vector, which leaves most lanes idle where there are
// few of them. Here vectors run along head_dim: a dot product per row and key, kLanes of them summed
// over the lanes together, and keys in the lanes for masks, gates and the softmax. Each key and value
// is read once from memory and used by all rows (the query heads of a group) from the cache: a step
// runs at the speed of the memory that holds its keys.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/attend_tile.hpp"
#include "cpu/elements.hpp"
#include "cpu/kernels.hpp"
#include "cpu/key_block.hpp"
#include "cpu/matmul.hpp"
#include "cpu/packing.hpp"
#include "cpu/simd.hpp"

namespace sparsek::cpu {
namespace {

// Up to this many rows are few. NOTE: the work grows with every row, that of the tile kernel only
// with every kLanes rows. With AVX-512 and 512 keys of 128 floats one row takes 0.4 of the tile
// kernel's time, 4 rows 0.9, 8 rows 1.4.
constexpr int64_t kFewRows = kLanes / 4;

// Keys of one block, a multiple of kLanes. NOTE: k and v of a block of 128 floats per row take 64
// KiB together, of which the second product finds its half in the second-level cache.
constexpr int64_t kRowsKeyBlock = 64;
static_assert(kRowsKeyBlock % kLanes == 0);

// Pieces of the tile's workspace.
struct RowsScratch {
  float* q;            // [rows][width], scaled, in units of log 2
  float* accumulator;  // [rows][width]
  size_t bytes;
};

inline RowsScratch make_rows_scratch(uint8_t* base, int64_t head_dim) {
  int64_t const bytes = round_up_to(kFewRows * padded_head_dim(head_dim) * 4, kTileAlignment);
  RowsScratch s{};
  s.q = reinterpret_cast<float*>(base);
  s.accumulator = reinterpret_cast<float*>(base + (base ? bytes : 0));
  s.bytes = 2 * bytes;
  return s;
}

// Lane i of the result is the sum over the lanes of sums[i].
SPARSEK_INLINE VecF sum_lanes(VecF (&sums)[kLanes]) {
#pragma GCC unroll 4
  for (int count = kLanes; count > 1; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      VecI low, high;
      interleave((VecI)sums[i], (VecI)sums[i + count / 2], low, high, LaneIndices{});
      sums[i] = (VecF)low + (VecF)high;
    }
  }
  return sums[0];
}

SPARSEK_INLINE float largest_lane(VecF x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = larger_of(m, x[i]);
  return m;
}
SPARSEK_INLINE float sum_of_lanes(VecF x) {
  float sum = 0.0F;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

template <typename Element>
class RowsKernel {
 public:
  explicit RowsKernel(AttendTile const& tile)
      : t_(tile),
        scratch_(make_rows_scratch(reinterpret_cast<uint8_t*>(tile.workspace), tile.head_dim)),
        width_(padded_head_dim(tile.head_dim)) {}

  void run() {
    for (int64_t r = 0; r < t_.num_rows; ++r) init_row(r);
    for (int64_t first = 0; first < t_.num_keys; first += kRowsKeyBlock) {
      load_keys(first, smaller_of(kRowsKeyBlock, t_.num_keys - first));
      for (int64_t key = 0; key < count_; key += kLanes) compute_scores(key);
      for (int64_t r = 0; r < t_.num_rows; ++r) {
        switch (t_.gate) {
          case Gate::kNone:
            compute_weights<Gate::kNone>(r);
            break;
          case Gate::kValue:
            compute_weights<Gate::kValue>(r);
            break;
          case Gate::kSoftmax:
            compute_weights<Gate::kSoftmax>(r);
            break;
        }
        accumulate_output(r);
      }
    }
    for (int64_t r = 0; r < t_.num_rows; ++r) write_output(r);
  }

 private:
  void init_row(int64_t r) {
    max_[r] = -kInfinity;
    sum_[r] = 0.0F;
    for (int64_t d = 0; d < width_; d += kLanes) {
      VecF const q = load_floats(static_cast<Element const*>(t_.q[r]) + d, t_.head_dim - d);
      store(scratch_.q + r * width_ + d, q * (t_.sm_scale * kLog2E));
      store(scratch_.accumulator + r * width_ + d, VecF{});
    }
  }

  // Keys beyond the last one repeat it and are seen by no row.
  void load_keys(int64_t first, int64_t count) {
    count_ = count;
    for (int64_t t = 0; t < round_up_to(count, kLanes); ++t) {
      int64_t const key = first + smaller_of(t, count - 1);
      int32_t const position = t_.keys[key];
      int32_t const row = t_.key_rows ? t_.key_rows[key] : position;
      position_[t] = t < count ? position : INT32_MAX;
      expiry_[t] = t_.expiry ? t_.expiry[row] : INT32_MAX;
      key_score_[t] = t_.gate == Gate::kNone ? 0.0F : t_.scores[row * t_.stride_scores];
      k_[t] = static_cast<Element const*>(t_.k) + row * t_.stride_k;
      v_[t] = static_cast<Element const*>(t_.v) + row * t_.stride_v;
      prefetch_row(k_[t], t_.head_dim);
      prefetch_row(v_[t], t_.head_dim);
    }
  }

  // Scores of kLanes keys.
  void compute_scores(int64_t key) {
    for (int64_t r = 0; r < t_.num_rows; ++r) {
      float const* const q = scratch_.q + r * width_;
      VecF sums[kLanes] = {};
      for (int64_t d = 0; d < width_; d += kLanes) {
        VecF const x = load<VecF>(q + d);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          sums[i] += load_floats(k_[key + i] + d, t_.head_dim - d) * x;
        }
      }
      store(score_[r] + key, sum_lanes(sums));
    }
  }

  // From scores to weights, in place.
  template <Gate kGate>
  void compute_weights(int64_t r) {
    VecI const position = broadcast(t_.position[r]);
    VecF block_max = broadcast(-kInfinity);
    for (int64_t key = 0; key < count_; key += kLanes) {
      VecI const seen =
          (load<VecI>(position_ + key) <= position) & (position < load<VecI>(expiry_ + key));
      VecF const s = seen ? load<VecF>(score_[r] + key) : broadcast(-kInfinity);
      store(score_[r] + key, s);
      block_max = larger(s, block_max);
    }
    float const max = larger_of(max_[r], largest_lane(block_max));
    // Where nothing has been seen yet both are -inf: the difference would be NaN.
    float const finite_max = max > -kInfinity ? max : 0.0F;
    rescale_ = exp2_nonpositive(broadcast(max_[r] - finite_max))[0];
    max_[r] = max;

    VecF sum{};
    for (int64_t key = 0; key < count_; key += kLanes) {
      VecF const e = exp2_nonpositive(load<VecF>(score_[r] + key) - finite_max);
      VecF weight = e;
      if constexpr (kGate != Gate::kNone) {
        VecF const margin = load<VecF>(key_score_ + key) - t_.threshold[r];
        VecF const gate = smaller(broadcast(1.0F), larger(VecF{}, margin));
        VecI const in_pool = load<VecI>(position_ + key) < broadcast(t_.pool_end[r]);
        weight = e * (in_pool ? gate : broadcast(1.0F));
      }
      sum += kGate == Gate::kSoftmax ? weight : e;
      store(score_[r] + key, weight);
    }
    sum_[r] = sum_[r] * rescale_ + sum_of_lanes(sum);
  }

  // accumulator = accumulator * rescale + weights V, kSlice dimensions at a time.
  void accumulate_output(int64_t r) {
    float* const accumulator = scratch_.accumulator + r * width_;
    int64_t d = 0;
    for (; d + kSlice <= width_; d += kSlice) accumulate_slice<kVectors>(r, accumulator, d);
    for (; d < width_; d += kLanes) accumulate_slice<1>(r, accumulator, d);
  }

  template <int kCount>
  SPARSEK_INLINE void accumulate_slice(int64_t r, float* accumulator, int64_t first) {
    VecF sums[kCount];
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) {
      sums[c] = load<VecF>(accumulator + first + c * kLanes) * rescale_;
    }
    for (int64_t key = 0; key < count_; ++key) {
      VecF const weight = broadcast(score_[r][key]);
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) {
        int64_t const d = first + c * kLanes;
        sums[c] += weight * load_floats(v_[key] + d, t_.head_dim - d);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) store(accumulator + first + c * kLanes, sums[c]);
  }

  void write_output(int64_t r) {
    auto* const out = static_cast<Element*>(t_.out[r]);
    bool const empty = max_[r] == -kInfinity && sum_[r] == 0.0F;
    float const normalise = empty ? 0.0F : 1.0F / sum_[r];
    for (int64_t d = 0; d < t_.head_dim; d += kLanes) {
      VecF const o = load<VecF>(scratch_.accumulator + r * width_ + d) * normalise;
      store_floats(out + d, empty ? VecF{} : o, t_.head_dim - d);
    }
    if (t_.lse) *t_.lse[r] = empty ? -kInfinity : max_[r] * kLn2 + logf(sum_[r]);
  }

  // Accumulators of one slice: a multiply-add has a latency of 4 to 5 cycles on two pipes.
  static constexpr int kVectors = 8;
  static constexpr int64_t kSlice = kVectors * kLanes;

  AttendTile const& t_;
  RowsScratch const scratch_;
  int64_t const width_;
  int64_t count_ = 0;  // keys of the block
  float rescale_ = 1.0F;
  float max_[kFewRows], sum_[kFewRows];
  int32_t position_[kRowsKeyBlock], expiry_[kRowsKeyBlock];
  float key_score_[kRowsKeyBlock];
  Element const *k_[kRowsKeyBlock], *v_[kRowsKeyBlock];
  float score_[kFewRows][kRowsKeyBlock];
};

}  // namespace
}  // namespace sparsek::cpu
