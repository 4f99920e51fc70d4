#include <algorithm>
#include <functional>
#include <vector>

#include "reference/element.hpp"
#include "reference/threshold.hpp"
#include "sparsek/projection.hpp"
#include "validate.hpp"

namespace sparsek {

void sparsek_projection(Context const& context, ConstTensorView<2> const& z, std::int64_t k,
                        TensorView<2> const& p) {
  check_projection(context, z, k, p);
  std::int64_t const n = z.shape[1];
  std::vector<double> row(n), sorted(n);
  for (std::int64_t r = 0; r < z.shape[0]; ++r) {
    for (std::int64_t j = 0; j < n; ++j) {
      row[j] = reference::load(z.data, z.dtype, r * z.stride[0] + j * z.stride[1]);
    }
    double base = 0.0, below = 0.0;
    if (k > 0 && k < n) {
      sorted = row;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      base = sorted[k - 1];
      below = reference::threshold_below_kth(sorted, k);
    }
    for (std::int64_t j = 0; j < n; ++j) {
      double const value = k == 0   ? 0.0
                           : k >= n ? 1.0
                                    : std::clamp((row[j] - base) - below, 0.0, 1.0);
      reference::store(p.data, p.dtype, r * p.stride[0] + j * p.stride[1], value);
    }
  }
}

void sparsek_projection_backward(Context const& context, ConstTensorView<2> const& p,
                                 ConstTensorView<2> const& dp, TensorView<2> const& dz) {
  check_projection_backward(context, p, dp, dz);
  std::int64_t const n = p.shape[1];
  for (std::int64_t r = 0; r < p.shape[0]; ++r) {
    auto const interior = [&](std::int64_t j) {
      double const value = reference::load(p.data, p.dtype, r * p.stride[0] + j * p.stride[1]);
      return value > 0.0 && value < 1.0;
    };
    auto const upstream = [&](std::int64_t j) {
      return reference::load(dp.data, dp.dtype, r * dp.stride[0] + j * dp.stride[1]);
    };
    double sum = 0.0;
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      if (interior(j)) sum += upstream(j), ++count;
    }
    for (std::int64_t j = 0; j < n; ++j) {
      double const value = interior(j) ? upstream(j) - sum / static_cast<double>(count) : 0.0;
      reference::store(dz.data, dz.dtype, r * dz.stride[0] + j * dz.stride[1], value);
    }
  }
}

}  // namespace sparsek
