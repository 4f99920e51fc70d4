// Attention of one tile of query rows over a list of keys (AttendTile, kernels.hpp):
// FlashAttention's online softmax with the scores transposed.
//
// Scores are computed as S^T [key][row]: vectors run along 64 query rows, and words of k are
// broadcast from where k lies in memory, one pointer per key. So selected keys need no gathering
// copy, maxima and sums over keys are plain vector operations, and the mask j <= i < expiry_j and
// the gate clip(u_j - tau_i, 0, 1) cost a few instructions per vector whatever the chunk size. The
// weights P^T [key][row] are then broadcast by the second product, whose vectors run along
// head_dim.
//
// Keys are processed in blocks. A block's v is packed once, for all rows of the tile (so for all
// query heads of a group).
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/elements.hpp"
#include "cpu/kernels.hpp"
#include "cpu/key_block.hpp"
#include "cpu/matmul.hpp"
#include "cpu/packing.hpp"
#include "cpu/simd.hpp"

namespace sparsek::cpu {
namespace {

// Keys of one block, a multiple of kMicroRows. NOTE: the slice of packed v that the second product
// reads again and again is kKeyBlock * kVecs * kLanes words, 24 KiB with AVX-512: half of an L1
// cache of 48 KiB, the weights pass through the other half. 66 to 264 keys differ by 3 % at most.
constexpr int64_t kKeyBlock = 96;
static_assert(kKeyBlock % kMicroRows == 0 && kKeyBlock % 2 == 0);

constexpr float kLog2E = 1.44269504088896340736F;
constexpr float kLn2 = 0.693147180559945309417F;

// What a block of kRowBlock rows carries over the blocks of keys. Rows beyond the last one repeat
// it.
struct RowBlock {
  int32_t position[kRowBlock];
  int32_t pool_end[kRowBlock];
  float threshold[kRowBlock];
  float max[kRowBlock];      // of the scores in units of log 2; -inf: no key seen yet
  float sum[kRowBlock];      // of the weights that p normalises, relative to 2^max
  float rescale[kRowBlock];  // 2^(old max - max) of the current block of keys
  int32_t vector_max_position[kRowBlock / kLanes];
  int32_t min_position, max_position, min_pool_end, max_pool_end;
  int64_t num_rows;
  int num_vectors;
  bool uniform_threshold;
  bool has_output;  // whether its rows of the accumulator are initialised
};

struct KeyBlock {
  int64_t count;
  int32_t position[kKeyBlock];
  int32_t row[kKeyBlock];
  int32_t expiry[kKeyBlock];
  float score[kKeyBlock];  // only with a gate
  int32_t const* k[kKeyBlock];
};

// Pieces of the tile's workspace.
struct Scratch {
  RowBlock* rows;      // [row blocks]
  int32_t* q;          // [row blocks][words of a row, rounded up to kLanes][kRowBlock]
  float* accumulator;  // [row blocks][kRowBlock][width]
  int32_t* k;          // [kKeyBlock][words of a row, rounded up to kLanes]
  int32_t* v;          // [slices][kKeyBlock / kPerWord][up to kVecs * kLanes]
  float* scores;       // [kKeyBlock][kRowBlock]; weights take its place
  size_t bytes;
};

// head_dim rounded up to whole vectors.
SPARSEK_INLINE int64_t padded_head_dim(int64_t head_dim) { return round_up_to(head_dim, kLanes); }

inline Scratch make_scratch(uint8_t* base, int64_t head_dim, int64_t num_rows) {
  int64_t const row_blocks = round_up_to(num_rows, kRowBlock) / kRowBlock;
  int64_t const width = padded_head_dim(head_dim);  // at least as many as the words of a row
  Scratch s{};
  auto const take = [&](int64_t bytes) {
    uint8_t* const piece = base ? base + s.bytes : nullptr;
    s.bytes += round_up_to(bytes, kTileAlignment);
    return static_cast<void*>(piece);
  };
  s.rows = static_cast<RowBlock*>(take(row_blocks * sizeof(RowBlock)));
  s.q = static_cast<int32_t*>(take(row_blocks * kRowBlock * width * 4));
  s.accumulator = static_cast<float*>(take(row_blocks * kRowBlock * width * 4));
  s.k = static_cast<int32_t*>(take(kKeyBlock * width * 4));
  s.v = static_cast<int32_t*>(take(kKeyBlock * width * 4));
  s.scores = static_cast<float*>(take(kKeyBlock * kRowBlock * 4));
  return s;
}

template <typename Words, typename Element>
class TileKernel {
 public:
  TileKernel(AttendTile const& tile)
      : t_(tile),
        scratch_(
            make_scratch(reinterpret_cast<uint8_t*>(tile.workspace), tile.head_dim, tile.num_rows)),
        row_blocks_(round_up_to(tile.num_rows, kRowBlock) / kRowBlock),
        width_(padded_head_dim(tile.head_dim)),
        words_((tile.head_dim + Words::kPerWord - 1) / Words::kPerWord),
        q_stride_(round_up_to(words_, kLanes) * kRowBlock),
        scale_(tile.sm_scale * kLog2E) {}

  void run() {
    for (int64_t r = 0; r < row_blocks_; ++r) {
      init_rows(r);
      auto const q = [&](int64_t i) {
        return static_cast<Element const*>(t_.q[r * kRowBlock + i]);
      };
      pack_transposed<Words, Element>(q, scratch_.rows[r].num_rows, t_.head_dim,
                                      scratch_.q + r * q_stride_);
    }
    int64_t const blocks = larger_of<int64_t>(1, (t_.num_keys + kKeyBlock - 1) / kKeyBlock);
    int64_t const block_size = round_up_to((t_.num_keys + blocks - 1) / blocks, kMicroRows);
    for (int64_t first = 0; first < t_.num_keys; first += block_size) {
      load_keys(first, smaller_of(block_size, t_.num_keys - first));
      pack_slices<Words, Element>([&](int64_t t) { return v_row(keys_.row[t]); }, keys_.count,
                                  t_.head_dim, kKeyBlock / Words::kPerWord, scratch_.v);
      for (int64_t r = 0; r < row_blocks_; ++r) {
        RowBlock& rows = scratch_.rows[r];
        int64_t const count = keys_up_to(rows.max_position);
        if (count == 0) continue;
        compute_scores(rows, scratch_.q + r * q_stride_, count);
        compute_weights(rows, count);
        accumulate_output(rows, scratch_.accumulator + r * kRowBlock * width_);
      }
    }
    for (int64_t r = 0; r < row_blocks_; ++r) write_output(r);
  }

 private:
  void init_rows(int64_t block) {
    RowBlock& rows = scratch_.rows[block];
    int64_t const first = block * kRowBlock;
    rows.num_rows = smaller_of<int64_t>(kRowBlock, t_.num_rows - first);
    rows.num_vectors = static_cast<int>((rows.num_rows + kLanes - 1) / kLanes);
    rows.uniform_threshold = true;
    rows.has_output = false;
    for (int64_t r = 0; r < kRowBlock; ++r) {
      int64_t const row = first + smaller_of(r, rows.num_rows - 1);
      int32_t const position = t_.position[row];
      rows.position[r] = position;
      rows.max[r] = -kInfinity;
      rows.sum[r] = 0.0F;
      rows.pool_end[r] = t_.gate == Gate::kNone ? 0 : t_.pool_end[row];
      rows.threshold[r] = t_.gate == Gate::kNone ? 0.0F : t_.threshold[row];
      rows.min_position = r ? smaller_of(rows.min_position, position) : position;
      rows.max_position = r ? larger_of(rows.max_position, position) : position;
      rows.min_pool_end = r ? smaller_of(rows.min_pool_end, rows.pool_end[r]) : rows.pool_end[r];
      rows.max_pool_end = r ? larger_of(rows.max_pool_end, rows.pool_end[r]) : rows.pool_end[r];
      int32_t& vector_max = rows.vector_max_position[r / kLanes];
      vector_max = r % kLanes ? larger_of(vector_max, position) : position;
      if (rows.threshold[r] != rows.threshold[0]) rows.uniform_threshold = false;
    }
  }

  Element const* k_row(int64_t row) const {
    return static_cast<Element const*>(t_.k) + row * t_.stride_k;
  }
  Element const* v_row(int64_t row) const {
    return static_cast<Element const*>(t_.v) + row * t_.stride_v;
  }

  void load_keys(int64_t first, int64_t count) {
    keys_.count = count;
    int64_t const row_words = round_up_to(words_, kLanes);
    for (int64_t t = 0; t < count; ++t) {
      int32_t const position = t_.keys[first + t];
      int32_t const row = t_.key_rows ? t_.key_rows[first + t] : position;
      keys_.position[t] = position;
      keys_.row[t] = row;
      keys_.expiry[t] = t_.expiry ? t_.expiry[row] : INT32_MAX;
      keys_.score[t] = t_.gate == Gate::kNone ? 0.0F : t_.scores[row * t_.stride_scores];
      Element const* const k = k_row(row);
      prefetch_row(k, t_.head_dim);
      prefetch_row(v_row(row), t_.head_dim);
      keys_.k[t] = words_of_row<Words>(k, t_.head_dim, scratch_.k + t * row_words);
    }
  }

  int32_t* v_slice(int64_t first) const {
    return scratch_.v + first * (kKeyBlock / Words::kPerWord);
  }

  // The number of keys of the block at positions <= position.
  int64_t keys_up_to(int32_t position) const {
    return count_up_to(keys_.position, keys_.count, position);
  }

  // S^T of the first `count` keys in units of log 2, -inf where a row does not see the key; and the
  // new maxima.
  void compute_scores(RowBlock& rows, int32_t const* q, int64_t count) {
    for (int first = 0; first < rows.num_vectors; first += kVecs) {
      int const end = smaller_of(first + kVecs, rows.num_vectors);
      VecF max[kVecs];
      for (int v = 0; v < kVecs; ++v) max[v] = broadcast(-kInfinity);
      for_row_blocks(count, [&](auto num_keys, int64_t t) {
        // Leading vectors whose rows all lie before these keys, the upper triangle of the diagonal.
        int begin = first;
        while (begin < end && rows.vector_max_position[begin] < keys_.position[t]) ++begin;
        for (int v = first; v < begin; ++v) {
          for (int i = 0; i < num_keys.value; ++i) {
            store(score(t + i, v), broadcast(-kInfinity));
          }
        }
        with_vectors(end - begin, [&](auto num_vectors) {
          score_block<num_keys.value, num_vectors.value>(rows, q, t, begin, max + (begin - first));
        });
      });
      for (int v = first; v < end; ++v) update_max(rows, v, max[v - first]);
    }
  }

  float* score(int64_t key, int vector) const {
    return scratch_.scores + key * kRowBlock + vector * kLanes;
  }

  template <int kKeys, int kCols>
  void score_block(RowBlock const& rows, int32_t const* q, int64_t t, int first_vector, VecF* max) {
    int32_t const* k[kKeys];
    int32_t min_expiry = keys_.expiry[t];
    for (int i = 0; i < kKeys; ++i) {
      k[i] = keys_.k[t + i];
      min_expiry = smaller_of(min_expiry, keys_.expiry[t + i]);
    }
    VecF sums[kKeys][kCols] = {};
    multiply_block<Words>(k, 1, q + first_vector * kLanes, kRowBlock, words_, sums);
    bool const all_seen =
        keys_.position[t + kKeys - 1] <= rows.min_position && rows.max_position < min_expiry;
#pragma GCC unroll 8
    for (int v = 0; v < kCols; ++v) {
      VecI const position = load<VecI>(rows.position + (first_vector + v) * kLanes);
      VecF block_max = max[v];
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        VecF s = sums[i][v] * scale_;
        if (!all_seen) {
          VecI const seen = (position >= broadcast(keys_.position[t + i])) &
                            (position < broadcast(keys_.expiry[t + i]));
          s = seen ? s : broadcast(-kInfinity);
        }
        block_max = larger(s, block_max);
        store(score(t + i, first_vector + v), s);
      }
      max[v] = block_max;
    }
  }

  static void update_max(RowBlock& rows, int vector, VecF block_max) {
    int const r = vector * kLanes;
    VecF const old_max = load<VecF>(rows.max + r);
    VecF const new_max = larger(block_max, old_max);
    // Where nothing has been seen yet both are -inf: the difference would be NaN.
    VecF const finite_max = new_max > broadcast(-kInfinity) ? new_max : VecF{};
    store(rows.rescale + r, exp2_nonpositive(old_max - finite_max));
    store(rows.max + r, new_max);
  }

  // From scores to weights, in place; their sums are taken before the weights are rounded to the
  // words' precision.
  void compute_weights(RowBlock& rows, int64_t count) {
    switch (t_.gate) {
      case Gate::kNone:
        return compute_gated_weights<Gate::kNone>(rows, count);
      case Gate::kValue:
        return compute_gated_weights<Gate::kValue>(rows, count);
      case Gate::kSoftmax:
        return compute_gated_weights<Gate::kSoftmax>(rows, count);
    }
  }

  template <Gate kGate>
  void compute_gated_weights(RowBlock& rows, int64_t count) {
    constexpr int kPer = Words::kPerWord;
    for (int first = 0; first < rows.num_vectors; first += kVecs) {
      with_vectors(smaller_of(kVecs, rows.num_vectors - first), [&](auto num_vectors) {
        constexpr int kCols = num_vectors.value;
        VecF max[kCols], sum[kCols];
        for (int v = 0; v < kCols; ++v) {
          int const r = (first + v) * kLanes;
          VecF const row_max = load<VecF>(rows.max + r);
          max[v] = row_max > broadcast(-kInfinity) ? row_max : VecF{};
          sum[v] = load<VecF>(rows.sum + r) * load<VecF>(rows.rescale + r);
        }
        for (int64_t t = 0; t < count; t += kPer) {
          VecF weights[kCols][kPer];
#pragma GCC unroll 2
          for (int i = 0; i < kPer; ++i) {
            if (t + i < count) {
              weigh_key<kGate, kCols, kPer>(rows, t + i, first, i, max, sum, weights);
            } else {
              for (int v = 0; v < kCols; ++v) weights[v][i] = VecF{};
            }
          }
          // NOTE: in place: the weights of keys t ... take row t / kPer of the same buffer, whose
          // scores have been read.
          for (int v = 0; v < kCols; ++v) {
            store(score(t / kPer, first + v), Words::weight_words(weights[v]));
          }
        }
        for (int v = 0; v < kCols; ++v) store(rows.sum + (first + v) * kLanes, sum[v]);
      });
    }
  }

  template <Gate kGate, int kCols, int kPer>
  SPARSEK_INLINE void weigh_key(RowBlock const& rows, int64_t t, int first_vector, int slot,
                                VecF const (&max)[kCols], VecF (&sum)[kCols],
                                VecF (&weights)[kCols][kPer]) {
    int32_t const position = keys_.position[t];
    bool const gated = kGate != Gate::kNone && position < rows.max_pool_end;
    bool const same_gate = rows.uniform_threshold && position < rows.min_pool_end;
    float const u = keys_.score[t];
    float const shared = smaller_of(larger_of(u - rows.threshold[0], 0.0F), 1.0F);
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v) {
      int const r = (first_vector + v) * kLanes;
      VecF const e = exp2_nonpositive(load<VecF>(score(t, first_vector + v)) - max[v]);
      VecF weight = e;
      if (gated) {
        VecF gate = broadcast(shared);
        if (!same_gate) {
          VecF const margin = u - load<VecF>(rows.threshold + r);
          VecI const in_pool = broadcast(position) < load<VecI>(rows.pool_end + r);
          gate = smaller(broadcast(1.0F), larger(VecF{}, margin));
          gate = in_pool ? gate : broadcast(1.0F);
        }
        weight = e * gate;
      }
      sum[v] += kGate == Gate::kSoftmax ? weight : e;
      weights[v][slot] = weight;
    }
  }

  // accumulator = accumulator * rescale + P V
  void accumulate_output(RowBlock& rows, float* accumulator) {
    constexpr int kPer = Words::kPerWord;
    auto const* const weights = reinterpret_cast<int32_t const*>(scratch_.scores);
    for (int64_t slice = 0; slice < width_; slice += kSliceWidth) {
      int const slice_vectors =
          static_cast<int>(smaller_of<int64_t>(kSliceWidth, width_ - slice) / kLanes);
      int32_t const* const v = v_slice(slice);
      for_row_blocks(rows.num_rows, [&](auto num_rows, int64_t r) {
        constexpr int kRows = num_rows.value;
        int32_t last = rows.position[r];
        int32_t const* words[kRows];
        for (int i = 0; i < kRows; ++i) {
          last = larger_of(last, rows.position[r + i]);
          words[i] = weights + r + i;
        }
        int64_t const steps = (keys_up_to(last) + kPer - 1) / kPer;
        with_vectors(slice_vectors, [&](auto num_vectors) {
          constexpr int kCols = num_vectors.value;
          VecF sums[kRows][kCols] = {};
          multiply_block<Words>(words, kRowBlock, v, kCols * kLanes, steps, sums);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            float* const out = accumulator + (r + i) * width_ + slice;
            VecF const rescale = broadcast(rows.rescale[r + i]);
#pragma GCC unroll 8
            for (int c = 0; c < kCols; ++c) {
              VecF const before = rows.has_output ? load<VecF>(out + c * kLanes) * rescale : VecF{};
              store(out + c * kLanes, before + sums[i][c]);
            }
          }
        });
      });
    }
    rows.has_output = true;
  }

  void write_output(int64_t block) {
    RowBlock const& rows = scratch_.rows[block];
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      int64_t const row = block * kRowBlock + r;
      auto* const out = static_cast<Element*>(t_.out[row]);
      bool const empty = rows.max[r] == -kInfinity && rows.sum[r] == 0.0F;
      float const* const accumulator = scratch_.accumulator + row * width_;
      float const normalise = empty ? 0.0F : 1.0F / rows.sum[r];
      for (int64_t d = 0; d < t_.head_dim; d += kLanes) {
        VecF const o = empty ? VecF{} : load<VecF>(accumulator + d) * normalise;
        store_floats(out + d, o, t_.head_dim - d);
      }
      if (t_.lse) {
        *t_.lse[row] = empty ? -kInfinity : rows.max[r] * kLn2 + logf(rows.sum[r]);
      }
    }
  }

  AttendTile const& t_;
  Scratch const scratch_;
  int64_t const row_blocks_, width_, words_, q_stride_;
  float const scale_;
  KeyBlock keys_;
};

}  // namespace
}  // namespace sparsek::cpu
