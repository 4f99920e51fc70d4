// The SPARSEK projection's threshold (arXiv 2406.16747, section 3.2), exact up to fp64 rounding.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace sparsek::reference {

// sup{t : sum_j clip(z_j - t, 0, 1) >= k} - z_(k), a number in [-1, 0), for z sorted in descending
// order with 1 <= k <= n. (Where k < n the supremum is the only solution of "= k", but for a
// stretch of solutions when the k-th and the next score are more than 1 apart; where k = n it is
// z_(k) - 1.)
//
// As t falls from z_(k), the sum f(t) grows from at most k - 1. On the way, scores below t + 1 are
// interior (they contribute z_j - t) and scores of at least t + 1 are saturated (they contribute
// 1). Between two breakpoints f is linear with slope
// -|interior|; the loop visits breakpoints until f reaches k.
inline double threshold_below_kth(std::vector<double> const& z, std::int64_t k) {
  double const base = z[k - 1];
  auto const n = static_cast<std::int64_t>(z.size());
  auto const shifted = [&](std::int64_t j) { return z[j] - base; };

  double t = 0.0;
  std::int64_t saturated = 0;  // z_0 ... z_(saturated - 1) contribute 1
  while (saturated < n && shifted(saturated) >= t + 1.0) ++saturated;
  std::int64_t positive = saturated;  // z_saturated ... z_(positive - 1) contribute z_j - t
  double interior_sum = 0.0;          // of the shifted interior scores
  while (positive < n && shifted(positive) > t) interior_sum += shifted(positive++);

  for (;;) {
    double next = -1.0;  // the nearest breakpoint below t
    if (positive < n) next = std::max(next, shifted(positive));
    if (saturated < positive) next = std::max(next, shifted(saturated) - 1.0);
    auto const count = static_cast<double>(positive - saturated);
    if (static_cast<double>(saturated) + interior_sum - count * next >= static_cast<double>(k)) {
      double sum = 0.0;
      for (std::int64_t j = saturated; j < positive; ++j) sum += shifted(j);
      return std::clamp((static_cast<double>(saturated) + sum - static_cast<double>(k)) / count,
                        next, t);
    }
    if (next == -1.0) return -1.0;
    t = next;
    while (positive < n && shifted(positive) >= t) interior_sum += shifted(positive++);
    while (saturated < positive && shifted(saturated) - 1.0 >= t) {
      interior_sum -= shifted(saturated++);
    }
  }
}

}  // namespace sparsek::reference
