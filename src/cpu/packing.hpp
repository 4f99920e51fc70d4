// Rows of q, k, v and gradients, rearranged into what multiply_block (matmul.hpp) reads.
#pragma once
#include <stdint.h>

#include "cpu/elements.hpp"
#include "cpu/matmul.hpp"
#include "cpu/simd.hpp"

namespace sparsek::cpu {
namespace {

SPARSEK_INLINE int64_t round_up_to(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Columns of one slice: the vectors that multiply_block keeps in registers.
constexpr int64_t kSliceWidth = kVecs * kLanes;

// One row as words, for broadcasting: where it lies in memory if that is what it consists of,
// otherwise converted into `packed`.
template <typename Words, typename Element>
SPARSEK_INLINE int32_t const* words_of_row(Element const* row, int64_t head_dim, int32_t* packed) {
  if (Words::is_row_of_words(row, head_dim)) return reinterpret_cast<int32_t const*>(row);
  int64_t const words = (head_dim + Words::kPerWord - 1) / Words::kPerWord;
  for (int64_t w = 0; w < words; w += kLanes) {
    store(packed + w, Words::row_words(row, w, head_dim));
  }
  return packed;
}

// The transpose of a block of at most kRowBlock rows, [word][kRowBlock]. Rows up to the next
// multiple of kLanes repeat the last one. row(r) points to row r.
template <typename Words, typename Element, typename Row>
SPARSEK_INLINE void pack_transposed(Row const& row, int64_t num_rows, int64_t head_dim,
                                    int32_t* packed) {
  int64_t const words = (head_dim + Words::kPerWord - 1) / Words::kPerWord;
  for (int64_t r0 = 0; r0 < num_rows; r0 += kLanes) {
    Element const* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = row(smaller_of<int64_t>(r0 + i, num_rows - 1));
    for (int64_t w = 0; w < words; w += kLanes) {
      VecI block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = Words::row_words(rows[i], w, head_dim);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(packed + (w + i) * kRowBlock + r0, block[i]);
    }
  }
}

// Rows by slices of kSliceWidth columns, so that a slice is contiguous: [slice][step][column]. A
// step is kPerWord rows; steps of a slice are followed by nothing up to `max_steps`. A row that
// fills up the last step is zero.
template <typename Words, typename Element, typename Row>
SPARSEK_INLINE void pack_slices(Row const& row, int64_t num_rows, int64_t head_dim,
                                int64_t max_steps, int32_t* packed) {
  constexpr int kPer = Words::kPerWord;
  int64_t const width = round_up_to(head_dim, kLanes);
  for (int64_t s = 0; s * kPer < num_rows; ++s) {
    Element const* rows[kPer];
    for (int i = 0; i < kPer; ++i) rows[i] = s * kPer + i < num_rows ? row(s * kPer + i) : nullptr;
    for (int64_t slice = 0; slice < width; slice += kSliceWidth) {
      int64_t const slice_width = smaller_of<int64_t>(kSliceWidth, width - slice);
      int32_t* const out = packed + slice * max_steps + s * slice_width;
      for (int64_t d = 0; d < slice_width; d += kLanes) {
        store(out + d, Words::key_words(rows, slice + d, head_dim));
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::cpu
