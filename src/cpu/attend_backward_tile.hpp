// Gradients of one tile of query rows over a list of keys (AttendBackwardTile, kernels.hpp):
// FlashAttention-2's backward with the scores transposed, every product once.
//
//   S^T = K Q^T           [key][row]   words of k broadcast, vectors of q^T along rows
//   dP^T = V dO^T         [key][row]   likewise
//   P^T, dS^T             [key][row]   element by element: mask, gate, exp(s - lse)
//   dV += P^T dO          [key][d]     words of P^T broadcast, vectors of dO along d
//   dK += dS^T Q          [key][d]     likewise
//   dQ += dS K            [row][d]     words of dS broadcast, vectors of k along d
//
// As in the forward (attend_tile.hpp) k and v are read where they lie, and the mask and the gate
// cost a few instructions per vector of rows. dK and dV of a key are added up in float32 in a row
// that the key keeps as long as it is visible.
#pragma once
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

// Keys of one block, a multiple of kMicroRows and even.
constexpr int64_t kBackwardKeyBlock = 96;
static_assert(kBackwardKeyBlock % kMicroRows == 0 && kBackwardKeyBlock % 2 == 0);

// A row of the accumulators: dK and dV, each padded to whole vectors, and the gradient of the score
// as one vector whose lanes add up to it.
SPARSEK_INLINE int64_t gradient_width(int64_t head_dim) { return round_up_to(head_dim, kLanes); }
SPARSEK_INLINE int64_t gradient_row_size(int64_t head_dim) {
  return round_up_to(2 * gradient_width(head_dim) + kLanes, 16);
}

// What a block of kRowBlock rows carries over the blocks of keys. Rows beyond the last one are at
// position -1, where they see nothing.
struct BackwardRows {
  int32_t position[kRowBlock];
  int32_t pool_end[kRowBlock];
  float threshold[kRowBlock];
  float interior_end[kRowBlock];
  float lse[kRowBlock];    // in units of log 2
  float delta[kRowBlock];  // dout . out
  float gate_gradient[kRowBlock];
  int32_t vector_max_position[kRowBlock / kLanes];
  int32_t min_position, max_position, max_pool_end;
  int64_t num_rows;
  int num_vectors;
};

struct BackwardKeys {
  int64_t count;
  int32_t position[kBackwardKeyBlock];
  int32_t expiry[kBackwardKeyBlock];
  float score[kBackwardKeyBlock];  // only with a gate
  int32_t const* k[kBackwardKeyBlock];
  int32_t const* v[kBackwardKeyBlock];
  float* gradients[kBackwardKeyBlock];
};

// Pieces of the tile's workspace. Sizes in words; "words" is the words of a row, rounded up to
// kLanes.
struct BackwardScratch {
  BackwardRows* rows;          // [row blocks]
  int32_t* q_transposed;       // [row blocks][words][kRowBlock]
  int32_t* dout_transposed;    // [row blocks][words][kRowBlock]
  int32_t *q, *dout;           // [row blocks][slices][kRowBlock / kPerWord][up to kSliceWidth]
  float* dq;                   // [row blocks][kRowBlock][width]
  int32_t *k_words, *v_words;  // [kBackwardKeyBlock][words], where rows must be converted
  int32_t* k;                  // [slices][kBackwardKeyBlock / kPerWord][up to kSliceWidth]
  float* weights;              // P^T [kBackwardKeyBlock][kRowBlock], pairs of rows in a word
  float* ds;                   // dS^T likewise
  float* ds_by_keys;           // dS^T, pairs of keys in a word
  size_t bytes;
};

inline BackwardScratch make_backward_scratch(uint8_t* base, int64_t head_dim, int64_t num_rows) {
  int64_t const row_blocks = round_up_to(num_rows, kRowBlock) / kRowBlock;
  int64_t const width = gradient_width(head_dim);  // at least as many as the words of a row
  BackwardScratch s{};
  auto const take = [&](int64_t bytes) {
    uint8_t* const piece = base ? base + s.bytes : nullptr;
    s.bytes += round_up_to(bytes, kTileAlignment);
    return static_cast<void*>(piece);
  };
  auto const take_rows = [&] {
    return static_cast<int32_t*>(take(row_blocks * kRowBlock * width * 4));
  };
  auto const take_keys = [&] { return static_cast<int32_t*>(take(kBackwardKeyBlock * width * 4)); };
  auto const take_scores = [&] {
    return static_cast<float*>(take(kBackwardKeyBlock * kRowBlock * 4));
  };
  s.rows = static_cast<BackwardRows*>(take(row_blocks * sizeof(BackwardRows)));
  s.q_transposed = take_rows();
  s.dout_transposed = take_rows();
  s.q = take_rows();
  s.dout = take_rows();
  s.dq = reinterpret_cast<float*>(take_rows());
  s.k_words = take_keys();
  s.v_words = take_keys();
  s.k = take_keys();
  s.weights = take_scores();
  s.ds = take_scores();
  s.ds_by_keys = take_scores();
  return s;
}

template <typename Words, typename Element>
class BackwardTileKernel {
 public:
  BackwardTileKernel(AttendBackwardTile const& tile)
      : t_(tile),
        scratch_(make_backward_scratch(reinterpret_cast<uint8_t*>(tile.workspace), tile.head_dim,
                                       tile.num_rows)),
        row_blocks_(round_up_to(tile.num_rows, kRowBlock) / kRowBlock),
        width_(gradient_width(tile.head_dim)),
        words_((tile.head_dim + Words::kPerWord - 1) / Words::kPerWord),
        packed_words_(round_up_to(words_, kLanes)),
        scale_(tile.sm_scale * kLog2OfE) {}

  void run() {
    for (int64_t r = 0; r < row_blocks_; ++r) load_rows(r);
    int64_t const blocks =
        larger_of<int64_t>(1, (t_.num_keys + kBackwardKeyBlock - 1) / kBackwardKeyBlock);
    int64_t const block_size = round_up_to((t_.num_keys + blocks - 1) / blocks, kMicroRows);
    for (int64_t first = 0; first < t_.num_keys; first += block_size) {
      load_keys(first, smaller_of(block_size, t_.num_keys - first));
      for (int64_t r = 0; r < row_blocks_; ++r) {
        int64_t const count = keys_up_to(scratch_.rows[r].max_position);
        if (count == 0) continue;
        compute_score_gradients(r, count);
        add_key_gradients(r, count, scratch_.ds, scratch_.q, 0);
        add_key_gradients(r, count, scratch_.weights, scratch_.dout, width_);
        add_query_gradients(r);
      }
    }
    for (int64_t r = 0; r < row_blocks_; ++r) write_rows(r);
  }

 private:
  static constexpr int kPer = Words::kPerWord;
  static constexpr float kLog2OfE = 1.44269504088896340736F;

  void load_rows(int64_t block) {
    BackwardRows& rows = scratch_.rows[block];
    int64_t const first = block * kRowBlock;
    rows.num_rows = smaller_of<int64_t>(kRowBlock, t_.num_rows - first);
    rows.num_vectors = static_cast<int>((rows.num_rows + kLanes - 1) / kLanes);
    bool const gated = t_.gate != Gate::kNone;
    rows.max_position = rows.max_pool_end = -1;
    rows.min_position = rows.num_rows < kRowBlock ? -1 : t_.position[first];
    for (int64_t r = 0; r < kRowBlock; ++r) {
      bool const exists = r < rows.num_rows;
      int64_t const row = exists ? first + r : first;
      int32_t const position = exists ? t_.position[row] : -1;
      rows.position[r] = position;
      rows.lse[r] = t_.lse[row] * kLog2OfE;
      rows.delta[r] = exists ? dot(dout_row(row), out_row(row)) : 0.0F;
      rows.gate_gradient[r] = 0.0F;
      rows.pool_end[r] = gated ? t_.pool_end[row] : 0;
      rows.threshold[r] = gated ? t_.threshold[row] : 0.0F;
      rows.interior_end[r] = gated ? t_.interior_end[row] : 0.0F;
      rows.min_position = smaller_of(rows.min_position, position);
      rows.max_position = larger_of(rows.max_position, position);
      rows.max_pool_end = larger_of(rows.max_pool_end, rows.pool_end[r]);
      int32_t& vector_max = rows.vector_max_position[r / kLanes];
      vector_max = r % kLanes ? larger_of(vector_max, position) : position;
    }
    int64_t const offset = block * kRowBlock * width_;
    auto const q = [&](int64_t r) { return q_row(first + r); };
    auto const dout = [&](int64_t r) { return dout_row(first + r); };
    int64_t const n = rows.num_rows;
    pack_transposed<Words, Element>(q, n, t_.head_dim, scratch_.q_transposed + offset);
    pack_transposed<Words, Element>(dout, n, t_.head_dim, scratch_.dout_transposed + offset);
    pack_slices<Words, Element>(q, n, t_.head_dim, kRowBlock / kPer, scratch_.q + offset);
    pack_slices<Words, Element>(dout, n, t_.head_dim, kRowBlock / kPer, scratch_.dout + offset);
    for (int64_t i = 0; i < n * width_; i += kLanes) store(scratch_.dq + offset + i, VecF{});
  }

  Element const* q_row(int64_t row) const { return static_cast<Element const*>(t_.q[row]); }
  Element const* out_row(int64_t row) const { return static_cast<Element const*>(t_.out[row]); }
  Element const* dout_row(int64_t row) const { return static_cast<Element const*>(t_.dout[row]); }

  float dot(Element const* a, Element const* b) const {
    VecF sums{};
    for (int64_t d = 0; d < t_.head_dim; d += kLanes) {
      sums += load_floats(a + d, t_.head_dim - d) * load_floats(b + d, t_.head_dim - d);
    }
    float sum = 0.0F;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    return sum;
  }

  void load_keys(int64_t first, int64_t count) {
    keys_.count = count;
    auto const* const k = static_cast<Element const*>(t_.k);
    auto const* const v = static_cast<Element const*>(t_.v);
    for (int64_t t = 0; t < count; ++t) {
      int32_t const position = t_.keys[first + t];
      keys_.position[t] = position;
      keys_.expiry[t] = t_.expiry[position];
      keys_.score[t] = t_.gate == Gate::kNone ? 0.0F : t_.scores[position * t_.stride_scores];
      keys_.gradients[t] =
          t_.gradients + t_.gradient_rows[first + t] * gradient_row_size(t_.head_dim);
      prefetch_row(k + position * t_.stride_k, t_.head_dim);
      prefetch_row(v + position * t_.stride_v, t_.head_dim);
    }
    for (int64_t t = 0; t < count; ++t) {
      keys_.k[t] = words_of_row<Words>(k + keys_.position[t] * t_.stride_k, t_.head_dim,
                                       scratch_.k_words + t * packed_words_);
      keys_.v[t] = words_of_row<Words>(v + keys_.position[t] * t_.stride_v, t_.head_dim,
                                       scratch_.v_words + t * packed_words_);
    }
    pack_slices<Words, Element>([&](int64_t t) { return k + keys_.position[t] * t_.stride_k; },
                                count, t_.head_dim, kBackwardKeyBlock / kPer, scratch_.k);
  }

  // The number of keys of the block at positions <= position.
  int64_t keys_up_to(int32_t position) const {
    return count_up_to(keys_.position, keys_.count, position);
  }

  // Leading vectors whose rows all lie before key t: the upper triangle of the diagonal.
  int vectors_before(BackwardRows const& rows, int64_t t) const {
    int v = 0;
    while (v < rows.num_vectors && rows.vector_max_position[v] < keys_.position[t]) ++v;
    return v;
  }

  // P^T and dS^T of the first `count` keys.
  void compute_score_gradients(int64_t block, int64_t count) {
    switch (t_.gate) {
      case Gate::kNone:
        return compute_score_gradients<Gate::kNone>(block, count);
      case Gate::kValue:
        return compute_score_gradients<Gate::kValue>(block, count);
      case Gate::kSoftmax:
        return compute_score_gradients<Gate::kSoftmax>(block, count);
    }
  }

  template <Gate kGate>
  void compute_score_gradients(int64_t block, int64_t count) {
    BackwardRows& rows = scratch_.rows[block];
    int64_t const offset = block * kRowBlock * width_;
    for_row_blocks(count, [&](auto num_keys, int64_t t) {
      int const before = vectors_before(rows, t);
      for (int first = before; first < rows.num_vectors; first += kVecs) {
        with_vectors(smaller_of(kVecs, rows.num_vectors - first), [&](auto num_vectors) {
          constexpr int kKeys = num_keys.value, kCols = num_vectors.value;
          int64_t const column = first * kLanes;
          multiply_keys<kKeys, kCols>(keys_.k + t, scratch_.q_transposed + offset + column,
                                      scores_ + column);
          multiply_keys<kKeys, kCols>(keys_.v + t, scratch_.dout_transposed + offset + column,
                                      dweights_ + column);
        });
      }
      for (int i = 0; i < num_keys.value; i += kPer) {
        // Only dQ reads them: the sums over rows start at the first vector that sees a key.
        for (int v = 0; v < before; ++v) store(ds_by_keys(t + i, v), VecI{});
        for (int v = before; v < rows.num_vectors; ++v) {
          VecF ds[kPer];
#pragma GCC unroll 2
          for (int j = 0; j < kPer; ++j) {
            ds[j] = i + j < num_keys.value ? weigh_key<kGate>(rows, t, i + j, v) : VecF{};
          }
          store(ds_by_keys(t + i, v), Words::weight_words(ds));
        }
      }
    });
  }

  // out[key][row] = the products of a few keys' rows with vectors of transposed query rows.
  template <int kKeys, int kCols>
  void multiply_keys(int32_t const* const* keys, int32_t const* transposed, float* out) const {
    int32_t const* words[kKeys];
    for (int i = 0; i < kKeys; ++i) words[i] = keys[i];
    VecF sums[kKeys][kCols] = {};
    multiply_block<Words>(words, 1, transposed, kRowBlock, words_, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) store(out + i * kRowBlock + c * kLanes, sums[i][c]);
    }
  }

  // P^T and dS^T of key t + i and one vector of rows; returns dS.
  template <Gate kGate>
  SPARSEK_INLINE VecF weigh_key(BackwardRows& rows, int64_t t, int i, int vector) {
    int64_t const key = t + i;
    int const r = vector * kLanes;
    int32_t const position = keys_.position[key];
    VecF const delta = load<VecF>(rows.delta + r);
    VecF const dweight = load<VecF>(dweights_ + i * kRowBlock + r);
    VecF e = exp2_of(load<VecF>(scores_ + i * kRowBlock + r) * scale_ - load<VecF>(rows.lse + r));
    if (position > rows.min_position || rows.max_position >= keys_.expiry[key]) {
      VecI const row_position = load<VecI>(rows.position + r);
      VecI const seen =
          (row_position >= broadcast(position)) & (row_position < broadcast(keys_.expiry[key]));
      e = seen ? e : VecF{};
    }
    VecF weight = e, ds = e * (dweight - delta);
    if constexpr (kGate != Gate::kNone) {
      if (position < rows.max_pool_end) {
        weight = apply_gate<kGate>(rows, key, r, e, dweight, delta, ds);
      }
    }
    Words::store_row_words(row_words(scratch_.weights, key), r, weight);
    if constexpr (kPer > 1) Words::store_row_words(row_words(scratch_.ds, key), r, ds);
    return ds;
  }

  // m e for a key that some rows reach through the pool; also dS and the gates' gradients.
  template <Gate kGate>
  SPARSEK_INLINE VecF apply_gate(BackwardRows& rows, int64_t key, int r, VecF e, VecF dweight,
                                 VecF delta, VecF& ds) {
    VecF const one = broadcast(1.0F), u = broadcast(keys_.score[key]);
    VecF const threshold = load<VecF>(rows.threshold + r);
    VecI const in_pool = broadcast(keys_.position[key]) < load<VecI>(rows.pool_end + r);
    VecF gate = smaller(one, larger(VecF{}, u - threshold));
    gate = in_pool ? gate : one;
    VecF g;
    if constexpr (kGate == Gate::kValue) {
      g = e * dweight;
      ds = e * (gate * dweight - delta);
    } else {
      g = e * (dweight - delta);
      ds = gate * g;
    }
    if (t_.gate_gradient) {
      VecI const interior = in_pool & (u > threshold) & (u < load<VecF>(rows.interior_end + r));
      g = interior ? g : VecF{};
      store(rows.gate_gradient + r, load<VecF>(rows.gate_gradient + r) + g);
      float* const du = keys_.gradients[key] + 2 * width_;
      store(du, load<VecF>(du) + g);
    }
    return e * gate;
  }

  // 2^x, where x is positive by rounding, or because a gate below 1 is not in it.
  static SPARSEK_INLINE VecF exp2_of(VecF x) {
    return exp2_nonpositive(smaller(broadcast(127.0F), x));
  }

  // Row `key` of P^T or dS^T as the sums over rows read it: kRowBlock / kPer words.
  static int32_t* row_words(float* matrix, int64_t key) {
    return reinterpret_cast<int32_t*>(matrix) + key * (kRowBlock / kPer);
  }
  // dS^T as the sum over keys reads it, [key / kPer][row]. One buffer serves both if kPer is 1.
  int32_t* ds_by_keys(int64_t key, int vector) const {
    auto* const words = reinterpret_cast<int32_t*>(kPer > 1 ? scratch_.ds_by_keys : scratch_.ds);
    return words + key / kPer * kRowBlock + vector * kLanes;
  }

  // Adds (P^T dO) or (dS^T Q) of the block's rows to the keys' accumulators, at `column`.
  void add_key_gradients(int64_t block, int64_t count, float* weights, int32_t const* packed,
                         int64_t column) {
    BackwardRows const& rows = scratch_.rows[block];
    int64_t const end = (rows.num_rows + kPer - 1) / kPer;
    packed += block * kRowBlock * width_;
    for_each_slice([&](int64_t slice, auto num_vectors) {
      constexpr int kCols = num_vectors.value;
      int32_t const* const vectors = packed + slice * (kRowBlock / kPer);
      for_row_blocks(count, [&](auto num_keys, int64_t t) {
        constexpr int kKeys = num_keys.value;
        int64_t const begin = vectors_before(rows, t) * kLanes / kPer;
        int32_t const* words[kKeys];
        for (int i = 0; i < kKeys; ++i) words[i] = row_words(weights, t + i) + begin;
        VecF sums[kKeys][kCols] = {};
        multiply_block<Words>(words, 1, vectors + begin * kCols * kLanes, kCols * kLanes,
                              end - begin, sums);
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) {
          add_to(keys_.gradients[t + i] + column + slice, sums[i]);
        }
      });
    });
  }

  // dQ += dS K
  void add_query_gradients(int64_t block) {
    BackwardRows const& rows = scratch_.rows[block];
    float* const dq = scratch_.dq + block * kRowBlock * width_;
    for_each_slice([&](int64_t slice, auto num_vectors) {
      constexpr int kCols = num_vectors.value;
      int32_t const* const k = scratch_.k + slice * (kBackwardKeyBlock / kPer);
      for_row_blocks(rows.num_rows, [&](auto num_rows, int64_t r) {
        constexpr int kRows = num_rows.value;
        int32_t last = rows.position[r];
        int32_t const* words[kRows];
        for (int i = 0; i < kRows; ++i) {
          last = larger_of(last, rows.position[r + i]);
          words[i] = ds_by_keys(0, 0) + r + i;
        }
        VecF sums[kRows][kCols] = {};
        multiply_block<Words>(words, kRowBlock, k, kCols * kLanes,
                              (keys_up_to(last) + kPer - 1) / kPer, sums);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) add_to(dq + (r + i) * width_ + slice, sums[i]);
      });
    });
  }

  // Calls body(first column, number of vectors) for the slices of a row.
  template <typename Body>
  SPARSEK_INLINE void for_each_slice(Body const& body) const {
    for (int64_t slice = 0; slice < width_; slice += kSliceWidth) {
      int64_t const columns = smaller_of<int64_t>(kSliceWidth, width_ - slice);
      with_vectors(static_cast<int>(columns / kLanes),
                   [&](auto num_vectors) { body(slice, num_vectors); });
    }
  }

  template <int kCols>
  static SPARSEK_INLINE void add_to(float* out, VecF const (&sums)[kCols]) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      store(out + c * kLanes, load<VecF>(out + c * kLanes) + sums[c]);
    }
  }

  void write_rows(int64_t block) {
    BackwardRows const& rows = scratch_.rows[block];
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      int64_t const row = block * kRowBlock + r;
      auto* const dq = static_cast<Element*>(t_.dq[row]);
      for (int64_t d = 0; d < t_.head_dim; d += kLanes) {
        VecF const sum = load<VecF>(scratch_.dq + row * width_ + d);
        store_floats(dq + d, sum * t_.sm_scale, t_.head_dim - d);
      }
      if (t_.gate_gradient) t_.gate_gradient[row] = rows.gate_gradient[r];
    }
  }

  AttendBackwardTile const& t_;
  BackwardScratch const scratch_;
  int64_t const row_blocks_, width_, words_, packed_words_;
  float const scale_;
  BackwardKeys keys_;
  // Scores and gradients of the weights of the keys that are being computed.
  alignas(64) float scores_[kMicroRows * kRowBlock];
  alignas(64) float dweights_[kMicroRows * kRowBlock];
};

// Writes one row of the accumulators to where the gradients of its key belong.
template <typename Element>
SPARSEK_INLINE float write_gradient_row(int64_t head_dim, float sm_scale, float const* row,
                                        Element* dk, Element* dv) {
  int64_t const width = gradient_width(head_dim);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    store_floats(dk + d, load<VecF>(row + d) * sm_scale, head_dim - d);
    store_floats(dv + d, load<VecF>(row + width + d), head_dim - d);
  }
  float du = 0.0F;
  for (int lane = 0; lane < kLanes; ++lane) du += row[2 * width + lane];
  return du;
}

}  // namespace
}  // namespace sparsek::cpu
