// Rows of q, k, v and out in memory: conversions between their dtypes and vectors of float, and the
// "words" that the matrix kernels multiply.
#pragma once
#include <stdint.h>

#include "cpu/simd.hpp"

namespace sparsek::cpu {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// NOTE: GCC splits the conversion of 16 elements into two halves.
SPARSEK_INLINE VecU widen(VecH x) {
#if defined(__AVX512F__)
  return (VecU)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)x);
#else
  return __builtin_convertvector(x, VecU);
#endif
}
SPARSEK_INLINE VecH narrow(VecU x) {
#if defined(__AVX512F__)
  return (VecH)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x);
#else
  return __builtin_convertvector(x, VecH);
#endif
}

SPARSEK_INLINE VecF bf16_to_float(VecH x) { return (VecF)(widen(x) << 16); }

SPARSEK_INLINE VecF fp16_to_float(VecH x) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)x);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)x);
#else
  // Exponent and mantissa moved to their places read as a float that is 2^112 times too small,
  // subnormals included; infinities and NaN get the largest exponent.
  VecU const bits = widen(x);
  VecU const magnitude = (bits & 0x7FFF) << 13;
  VecU const special = (VecU)(magnitude >= 0x0F800000U) & 0x7F800000U;
  VecF const value = (VecF)magnitude * 0x1p112F;
  return (VecF)((VecU)value | special | (bits & 0x8000) << 16);
#endif
}

// kLanes elements from `row`, of which the first `count` exist; the others are 0 and not read.
template <typename V, typename Element>
SPARSEK_INLINE V load_elements(Element const* row, int64_t count) {
  static_assert(sizeof(V) % sizeof(Element) == 0);
  constexpr int64_t kCount = sizeof(V) / sizeof(Element);
  if (count >= kCount) return load<V>(row);
  V v{};
  if (count > 0) __builtin_memcpy(&v, row, count * sizeof(Element));
  return v;
}

SPARSEK_INLINE VecF load_floats(float const* row, int64_t count) {
  return load_elements<VecF>(row, count);
}
SPARSEK_INLINE VecF load_floats(Bf16 const* row, int64_t count) {
  return bf16_to_float(load_elements<VecH>(row, count));
}
SPARSEK_INLINE VecF load_floats(Fp16 const* row, int64_t count) {
  return fp16_to_float(load_elements<VecH>(row, count));
}

// Conversions from float round to nearest, ties to even.
SPARSEK_INLINE VecH float_to_bf16(VecF x) {
#if defined(__AVX512BF16__)
  return (VecH)_mm512_cvtneps_pbh((__m512)x);
#else
  VecU const bits = (VecU)x;
  VecU const rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  VecU const quiet = bits >> 16 | 0x40;
  return narrow(x != x ? quiet : rounded);
#endif
}

SPARSEK_INLINE VecH float_to_fp16(VecF x) {
#if defined(__AVX512F__)
  return (VecH)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (VecH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  VecU const bits = (VecU)x;
  VecU const magnitude = bits & 0x7FFFFFFF;
  // Exponent moved from bias 127 to 15.
  VecU const normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  // The sum with 0.5 is rounded to a multiple of 2^-24, the unit of a subnormal half: its low bits
  // are the result.
  VecU const subnormal = (VecU)((VecF)magnitude + 0.5F) - 0x3F000000;
  VecU half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477FF000 ? VecU{} + 0x7C00 : half;  // rounds to infinity
  half = magnitude > 0x7F800000 ? VecU{} + 0x7E00 : half;   // NaN
  return narrow(half | (bits >> 16 & 0x8000));
#endif
}

// Stores the first `count` lanes, or all if it is larger.
template <typename V, typename Element>
SPARSEK_INLINE void store_elements(Element* row, V v, int64_t count) {
  constexpr int64_t kCount = sizeof(V) / sizeof(Element);
  if (count >= kCount) return store(row, v);
  __builtin_memcpy(row, &v, count * sizeof(Element));
}
SPARSEK_INLINE void store_floats(float* row, VecF x, int64_t count) {
  store_elements(row, x, count);
}
SPARSEK_INLINE void store_floats(Bf16* row, VecF x, int64_t count) {
  store_elements(row, float_to_bf16(x), count);
}
SPARSEK_INLINE void store_floats(Fp16* row, VecF x, int64_t count) {
  store_elements(row, float_to_fp16(x), count);
}

// The matrix kernels multiply 32-bit words: a vector of kLanes words by one word that all lanes
// share. How many numbers a word holds is the operand type's business.

// One float per word.
struct FloatWords {
  static constexpr int kPerWord = 1;

  static SPARSEK_INLINE VecF multiply_add(VecF sum, VecI a, VecI b) {
    return sum + (VecF)a * (VecF)b;
  }
  // Words first_word ... of one row.
  template <typename Element>
  static SPARSEK_INLINE VecI row_words(Element const* row, int64_t first_word, int64_t head_dim) {
    return (VecI)load_floats(row + first_word, head_dim - first_word);
  }
  // Whether a row in memory already consists of its words.
  static bool is_row_of_words(float const*, int64_t) { return true; }
  template <typename Element>
  static bool is_row_of_words(Element const*, int64_t) {
    return false;
  }
  // Words of dimensions first ... first + kLanes - 1, each of kPerWord consecutive keys.
  template <typename Element>
  static SPARSEK_INLINE VecI key_words(Element const* const rows[1], int64_t first,
                                       int64_t head_dim) {
    return (VecI)load_floats(rows[0] + first, head_dim - first);
  }
  static SPARSEK_INLINE VecI weight_words(VecF const weights[1]) { return (VecI)weights[0]; }
  // Numbers first ... of a row of words.
  static SPARSEK_INLINE void store_row_words(int32_t* row, int64_t first, VecF x) {
    store(row + first, x);
  }
};

#if defined(__AVX512BF16__)
SPARSEK_INLINE VecU lane_numbers() {
  return VecU{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

// Two bfloat16 per word: VDPBF16PS adds both products.
struct Bf16Words {
  static constexpr int kPerWord = 2;

  static SPARSEK_INLINE VecF multiply_add(VecF sum, VecI a, VecI b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static SPARSEK_INLINE VecI row_words(Bf16 const* row, int64_t first_word, int64_t head_dim) {
    return load_elements<VecI>(row + 2 * first_word, head_dim - 2 * first_word);
  }
  static bool is_row_of_words(Bf16 const*, int64_t head_dim) { return head_dim % 2 == 0; }
  // A null row is one of zeros.
  static SPARSEK_INLINE VecI key_words(Bf16 const* const rows[2], int64_t first, int64_t head_dim) {
    VecU const low = widen(load_elements<VecH>(rows[0] + first, head_dim - first));
    if (!rows[1]) return (VecI)low;
    return (VecI)(low | widen(load_elements<VecH>(rows[1] + first, head_dim - first)) << 16);
  }
  static SPARSEK_INLINE VecI weight_words(VecF const weights[2]) {
    // Lanes 0 ... 15 of both come out one after the other; a word takes lane i of each.
    auto const pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)weights[1], (__m512)weights[0]);
    VecU const low_then_high = lane_numbers() | (lane_numbers() + kLanes) << 16;
    return (VecI)_mm512_permutexvar_epi16((__m512i)low_then_high, pairs);
  }
  static SPARSEK_INLINE void store_row_words(int32_t* row, int64_t first, VecF x) {
    store(row + first / 2, float_to_bf16(x));
  }
};
#endif

}  // namespace
}  // namespace sparsek::cpu
