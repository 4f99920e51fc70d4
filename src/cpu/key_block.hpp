// What the kernels that walk over blocks of keys share.
#pragma once
#include <stdint.h>

#include "cpu/simd.hpp"

namespace sparsek::cpu {
namespace {

// How many of `count` ascending positions are <= position. Most blocks lie wholly before it.
SPARSEK_INLINE int64_t count_up_to(int32_t const* positions, int64_t count, int32_t position) {
  int64_t low = 0, high = count;
  if (high > 0 && positions[high - 1] <= position) return high;
  while (low < high) {
    int64_t const middle = (low + high) / 2;
    if (positions[middle] <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// NOTE: rows of selected keys are scattered, and few query rows visit kLanes rows of keys side by
// side: orders that the hardware prefetchers do not follow.
template <typename Element>
SPARSEK_INLINE void prefetch_row(Element const* row, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(row + d);
}

}  // namespace
}  // namespace sparsek::cpu
