// Vectors of the instruction set that the including translation unit is compiled for, as GCC and Clang vector extensions.
//
// NOTE: everything here and in the other headers of kernels.cc lives in an unnamed namespace, and none of them includes a
// standard header with inline functions of external linkage. The linker would otherwise merge, say, a std::max compiled for
// AVX-512 with the one that the rest of the library calls on every machine.
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

// x - 0 keeps the sign of zero, unlike x + 0.
SPARSEK_INLINE VecF broadcast(float x) { return x - VecF{}; }
SPARSEK_INLINE VecI broadcast(int32_t x) { return x - VecI{}; }

// Where x is NaN these return x: a NaN in the data stays visible.
SPARSEK_INLINE VecF at_least(VecF x, VecF low) { return x < low ? low : x; }
SPARSEK_INLINE VecF at_most(VecF x, VecF high) { return x > high ? high : x; }

// The larger one; `a` where b is NaN.
SPARSEK_INLINE VecF max_of(VecF a, VecF b) { return b > a ? b : a; }

// 2^x for x <= 0, relative error below 2e-7; exactly 0 for x <= -126.5.
//
// x = n + f with n the nearest integer. 2^f by its Taylor polynomial of degree 6 (the next term is below 1.2e-7 · 1/8); 2^n by
// writing the exponent's bits, where n = -127 gives the bits of 0.
SPARSEK_INLINE VecF exp2_nonpositive(VecF x) {
  constexpr float kRound = 0x1.8p23F;  // adding it leaves round(x) in the low bits
  x = at_least(x, broadcast(-127.0F));
  VecF const shifted = x + kRound;
  VecF const f = x - (shifted - kRound);
  VecF p = broadcast(0x1.430912p-13F);  // (ln 2)^6 / 6!
  p = p * f + 0x1.5d87fep-10F;          // (ln 2)^5 / 5!
  p = p * f + 0x1.3b2ab6p-7F;           // ...
  p = p * f + 0x1.c6b08ep-5F;
  p = p * f + 0x1.ebfbep-3F;
  p = p * f + 0x1.62e43p-1F;
  p = p * f + 1.0F;
  VecI const exponent = ((VecI)shifted + 127) << 23;
  return p * (VecF)exponent;
}

}  // namespace
}  // namespace sparsek::cpu
