// The two matrix products of attention on words (elements.hpp), blocked for registers.
//
// Both keep a kMicroRows x kVecs block of vector accumulators and, per step, load kVecs vectors and
// broadcast kMicroRows words: kMicroRows * kVecs multiply-adds for kMicroRows + kVecs loads. NOTE:
// with 32 registers 6 x 4 leaves 8 for operands; with 16 (AVX2, SSE) 6 x 2 leaves 4. One
// multiply-add has a latency of 4 to 5 cycles on two pipes, so at least 10 accumulators must be in
// flight.
#pragma once
#include <stdint.h>

#include "cpu/elements.hpp"
#include "cpu/simd.hpp"

namespace sparsek::cpu {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVecs = 4;
#else
constexpr int kVecs = 2;
#endif
constexpr int kMicroRows = 6;

// Query rows of one block: the vectors of a block of scores, [key][kRowBlock].
constexpr int kRowBlock = 64;
static_assert(kRowBlock % (kVecs * kLanes) == 0);

// accumulators[i][v] += sum_s vectors[s * vector_stride + v * kLanes ...] * words[i][s *
// word_stride]
template <typename Words, int kRows, int kCols>
SPARSEK_INLINE void multiply_block(int32_t const* const (&words)[kRows], int64_t word_stride,
                                   int32_t const* vectors, int64_t vector_stride, int64_t steps,
                                   VecF (&accumulators)[kRows][kCols]) {
  for (int64_t s = 0; s < steps; ++s) {
    VecI column[kCols];
#pragma GCC unroll 8
    for (int v = 0; v < kCols; ++v)
      column[v] = load<VecI>(vectors + s * vector_stride + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      VecI const row = broadcast(load<int32_t>(words[i] + s * word_stride));
#pragma GCC unroll 8
      for (int v = 0; v < kCols; ++v) {
        accumulators[i][v] = Words::multiply_add(accumulators[i][v], column[v], row);
      }
    }
  }
}

// Calls body(integral constant n) for n of kMicroRows, 4, 2, 1 until `count` rows are covered;
// body's second argument is the first row.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <typename Body>
SPARSEK_INLINE void for_row_blocks(int64_t count, Body const& body) {
  int64_t i = 0;
  for (; i + kMicroRows <= count; i += kMicroRows) body(Constant<kMicroRows>{}, i);
  if (count - i >= 4) body(Constant<4>{}, i), i += 4;
  if (count - i >= 2) body(Constant<2>{}, i), i += 2;
  if (count - i >= 1) body(Constant<1>{}, i);
}

// Calls body(integral constant) with the number of vectors, 1 ... kVecs.
template <typename Body>
SPARSEK_INLINE void with_vectors(int count, Body const& body) {
  if constexpr (kVecs == 4) {
    if (count == 4) return body(Constant<4>{});
    if (count == 3) return body(Constant<3>{});
  }
  if (count == 2) return body(Constant<2>{});
  if (count == 1) return body(Constant<1>{});
}

// a0 b0 a1 b1 ...: of the lower and of the upper halves of a and b.
template <int... kIndices>
SPARSEK_INLINE void interleave(VecI a, VecI b, VecI& low, VecI& high, Indices<kIndices...>) {
  low = __builtin_shufflevector(a, b, (kIndices / 2 + kIndices % 2 * kLanes)...);
  high = __builtin_shufflevector(a, b, (kLanes / 2 + kIndices / 2 + kIndices % 2 * kLanes)...);
}

// Transposes kLanes x kLanes words. Each stage rotates the bits of (row, lane) by one.
SPARSEK_INLINE void transpose(VecI (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = kLanes; stage > 1; stage /= 2) {
    VecI mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], mixed[2 * i], mixed[2 * i + 1], LaneIndices{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

}  // namespace
}  // namespace sparsek::cpu
