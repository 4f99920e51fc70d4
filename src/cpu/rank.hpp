// How keys rank and how thresholds are stored: what select and decode share.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sparsek::cpu {

// A key's rank as one integer: larger ranks first. Scores in the upper half, order-preserving and
// with -0.0 equal to 0.0; below it the complement of the position, so that among equal scores the
// smaller position ranks first.
inline std::uint64_t rank_of(float score, std::int64_t position) {
  auto const bits = std::bit_cast<std::uint32_t>(score + 0.0F);
  std::uint32_t const ordered = bits & 0x80000000U ? ~bits : bits | 0x80000000U;
  return std::uint64_t{ordered} << 32 | static_cast<std::uint32_t>(~position);
}

inline std::int32_t position_of(std::uint64_t rank) {
  return static_cast<std::int32_t>(~static_cast<std::uint32_t>(rank));
}

inline float score_of(std::uint64_t rank) {
  auto const ordered = static_cast<std::uint32_t>(rank >> 32);
  return std::bit_cast<float>(ordered & 0x80000000U ? ordered & 0x7FFFFFFFU : ~ordered);
}

// tau as it is stored: rounded down, and below the k-th score, so that every selected key keeps a
// positive gate.
inline float stored_threshold(double tau, float kth_score) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  auto rounded = static_cast<float>(tau);
  if (static_cast<double>(rounded) > tau) rounded = std::nextafterf(rounded, -kInfinity);
  return std::min(rounded, std::nextafterf(kth_score, -kInfinity));
}

}  // namespace sparsek::cpu
