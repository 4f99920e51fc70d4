// Division by a number that the host knows, as a multiplication on the device.
#pragma once
#include <cstdint>

namespace sparsek::cuda::device {

// n / divisor, rounded down, for 0 <= n < 2^31 and divisor >= 1. With 2^(c - 1) < d <= 2^c and
// m = ceil(2^(31 + c) / d) it is floor(n m / 2^(31 + c)): m d exceeds 2^(31 + c) by less than 2^c, so
// the quotient by less than n / 2^31 / d (Granlund and Montgomery 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int divisor) {
    if (divisor <= 1) return;
    while ((1ull << shift_) < static_cast<unsigned>(divisor)) ++shift_;
    multiplier_ = static_cast<std::uint32_t>(((1ull << (31 + shift_)) + divisor - 1) / divisor);
    --shift_;  // the upper half of the product is taken
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int quotient(int n) const {
    return multiplier_ == 0
               ? n
               : static_cast<int>(__umulhi(static_cast<unsigned>(n), multiplier_) >> shift_);
  }
#endif

 private:
  std::uint32_t multiplier_ = 0, shift_ = 0;
};

}  // namespace sparsek::cuda::device
