// Reading and writing elements of any dtype as double. Exact on reading; one rounding (to nearest
// even) on writing.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "sparsek/tensor.hpp"

namespace sparsek::reference {

// The bits of a binary floating-point format with `MantissaBits` stored bits and smallest normal
// exponent `MinExponent`.
template <int MantissaBits, int MinExponent>
std::uint16_t round_to_16_bits(double x) {
  constexpr std::uint32_t kInfinity = static_cast<std::uint32_t>(2 - 2 * MinExponent + 1)
                                      << MantissaBits;
  std::uint32_t const sign = std::signbit(x) ? 0x8000u : 0u;
  double const a = std::fabs(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>(sign | kInfinity | 1u << (MantissaBits - 1));
  if (a == 0.0) return static_cast<std::uint16_t>(sign);
  if (std::isinf(a)) return static_cast<std::uint16_t>(sign | kInfinity);
  int const exponent = std::max(std::ilogb(a), MinExponent);
  // An integer below 2^(MantissaBits + 1); a carry out of the mantissa moves into the exponent by
  // itself.
  auto const scaled =
      static_cast<std::uint64_t>(std::nearbyint(std::ldexp(a, MantissaBits - exponent)));
  std::uint64_t const bits =
      (static_cast<std::uint64_t>(exponent - MinExponent) << MantissaBits) + scaled;
  return static_cast<std::uint16_t>(sign | std::min<std::uint64_t>(bits, kInfinity));
}

inline double half_to_double(std::uint16_t bits) {
  int const exponent = bits >> 10 & 31;
  int const mantissa = bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN()
                         : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, -24);
  } else {
    magnitude = std::ldexp(1024 + mantissa, exponent - 25);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline double load(void const* data, DataType dtype, std::int64_t index) {
  switch (dtype) {
    case DataType::kFloat16:
      return half_to_double(static_cast<std::uint16_t const*>(data)[index]);
    case DataType::kBFloat16:
      return std::bit_cast<float>(
          static_cast<std::uint32_t>(static_cast<std::uint16_t const*>(data)[index]) << 16);
    case DataType::kFloat32:
      return static_cast<float const*>(data)[index];
    case DataType::kFloat64:
      return static_cast<double const*>(data)[index];
    case DataType::kInt32:
      return static_cast<std::int32_t const*>(data)[index];
  }
  return 0.0;
}

inline void store(void* data, DataType dtype, std::int64_t index, double value) {
  switch (dtype) {
    case DataType::kFloat16:
      static_cast<std::uint16_t*>(data)[index] = round_to_16_bits<10, -14>(value);
      break;
    case DataType::kBFloat16:
      static_cast<std::uint16_t*>(data)[index] = round_to_16_bits<7, -126>(value);
      break;
    case DataType::kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case DataType::kFloat64:
      static_cast<double*>(data)[index] = value;
      break;
    case DataType::kInt32:
      static_cast<std::int32_t*>(data)[index] = static_cast<std::int32_t>(value);
      break;
  }
}

}  // namespace sparsek::reference
