// Vectors of the instruction set that the including translation unit is compiled for, as GCC and
// Clang vector extensions.
//
// NOTE: everything here and in the other headers of kernels.cc lives in an unnamed namespace, and
// none of them includes a standard header with inline functions of external linkage. The linker
// would otherwise merge, say, a std::max compiled for AVX-512 with the one that the rest of the
// library calls on every machine.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparsek::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes), may_alias));

// The numbers of the lanes, as a pack.
template <int... kIndices>
struct Indices {};
#if defined(__AVX512F__)
using LaneIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using LaneIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using LaneIndices = Indices<0, 1, 2, 3>;
#endif

constexpr float kInfinity = __builtin_inff();

#define SPARSEK_INLINE inline __attribute__((always_inline))

template <typename V>
SPARSEK_INLINE V load(void const* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
SPARSEK_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <typename T>
SPARSEK_INLINE T smaller_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
SPARSEK_INLINE T larger_of(T a, T b) {
  return a < b ? b : a;
}

// x - 0 keeps the sign of zero, unlike x + 0.
SPARSEK_INLINE VecF broadcast(float x) { return x - VecF{}; }
SPARSEK_INLINE VecI broadcast(int32_t x) { return x - VecI{}; }

// The larger and the smaller one; `b` where either is NaN. NOTE: GCC does not recognise these as
// the one instruction that they are on x86.
SPARSEK_INLINE VecF larger(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
SPARSEK_INLINE VecF smaller(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (VecF)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// 2^x for x <= 0, relative error below 2e-7; exactly 1 for 0 and exactly 0 for x <= -126.5. NaN
// stays NaN.
//
// x = n + f with n the nearest integer. 2^f by the polynomial of degree 5 of least relative error
// on [-1/2, 1/2] among those that are 1 at 0 (9.2e-8 before rounding); 2^n by writing the
// exponent's bits, where n = -127 gives the bits of 0.
SPARSEK_INLINE VecF exp2_nonpositive(VecF x) {
  constexpr float kRound = 0x1.8p23F;  // adding it leaves round(x) in the low bits
  x = larger(broadcast(-127.0F), x);
  VecF const shifted = x + kRound;
  VecF const f = x - (shifted - kRound);
  VecF p = f * 0x1.5bba14p-10F + 0x1.3cea88p-7F;
  p = p * f + 0x1.c6b752p-5F;
  p = p * f + 0x1.ebf9bcp-3F;
  p = p * f + 0x1.62e42ap-1F;
  p = p * f + 1.0F;
  VecI const exponent = ((VecI)shifted + 127) << 23;
  return p * (VecF)exponent;
}

}  // namespace
}  // namespace sparsek::cpu
