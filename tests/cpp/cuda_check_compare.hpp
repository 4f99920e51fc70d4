// Comparing a tensor with the reference's.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "case_data.hpp"

namespace sparsek::testing {

// 4 unit roundoffs, relative and absolute (the values are standard normal): one for the weights,
// which enter the second product in 16 bits, times what |v| reaches, and one for the output.
inline double output_tolerance_of(DataType dtype) {
  return dtype == DataType::kFloat16 ? 0x1p-9 : 0x1p-6;
}
inline constexpr double kLseTolerance = 2e-4;

template <std::size_t Rank>
std::string index_text(std::array<std::int64_t, Rank> const& index) {
  std::string text = "[";
  for (std::size_t i = 0; i < Rank; ++i) text += (i ? ", " : "") + std::to_string(index[i]);
  return text + "]";
}

inline std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.7g", x);
  return text;
}

// Collects the elements of one tensor that differ: the first by index, the count, the worst.
class Differences {
 public:
  explicit Differences(std::string name) : name_(std::move(name)) {}

  template <std::size_t Rank>
  void expect(std::array<std::int64_t, Rank> const& index, double got, double expected,
              double allowed) {
    ++compared_;
    if (got == expected) return;
    double const error = std::fabs(got - expected);
    if (error <= allowed) {
      worst_fraction_ = std::max(worst_fraction_, error / allowed);
      return;
    }
    if (count_++ == 0) {
      first_ = name_ + index_text(index) + " = " + number_text(got) + ", reference " +
               number_text(expected) + " (allowed " + number_text(allowed) + ")";
    }
  }

  // The largest error among those allowed, as a part of what is allowed.
  double worst_fraction() const { return worst_fraction_; }
  std::optional<std::string> message() const {
    if (count_ == 0) return std::nullopt;
    return first_ + ", " + std::to_string(count_) + " of " + std::to_string(compared_) + " differ";
  }

 private:
  std::string name_, first_;
  std::int64_t count_ = 0, compared_ = 0;
  double worst_fraction_ = 0.0;
};

inline double ulp(double x) {
  auto const f = static_cast<float>(std::fabs(x));
  return std::nextafter(f, std::numeric_limits<float>::infinity()) - f;
}

// Bytes between the elements of a strided tensor must still be poison.
template <std::size_t Rank>
bool gaps_intact(Tensor<Rank> const& t, int poison) {
  ConstTensorView<Rank> const view = t.view();
  std::size_t const size = size_of(view.dtype);
  std::vector<bool> covered(t.memory().size());
  t.for_each([&](auto const& index) {
    std::int64_t at = 0;
    for (std::size_t i = 0; i < Rank; ++i) at += index[i] * view.stride[i];
    for (std::size_t b = 0; b < size; ++b) covered[at * size + b] = true;
  });
  for (std::size_t i = 0; i < covered.size(); ++i) {
    if (!covered[i] && t.memory()[i] != static_cast<std::byte>(poison)) return false;
  }
  return true;
}

}  // namespace sparsek::testing
