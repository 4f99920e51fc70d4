// The SPARSEK threshold of a growing pool: tau = sup{t : sum_{j in T} clip(u_j - t, 0, 1) >= k}
// over the M first-ranked keys T of the pool, kept up to date as keys arrive (Lou et al., arXiv
// 2406.16747, section 3.2, made incremental).
//
// tau never falls, so a key with u <= tau never counts again. The others are either saturated (u >=
// tau + 1: they contribute 1) or interior (they contribute u - tau). Each key becomes saturated,
// interior and dead at most once, in this order: O(log M) per key, whatever the chunk size.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "cpu/min_heap.hpp"

namespace sparsek::cpu {

class PrefixThreshold {
 public:
  // `saturated` and `interior` hold num_candidates + 1 scores each; 1 <= k <= num_candidates.
  PrefixThreshold(std::int64_t k, std::int64_t num_candidates, std::int32_t* saturated,
                  std::int32_t* interior)
      : k_(k), num_candidates_(num_candidates), saturated_(saturated), interior_(interior) {}

  // Goes on from an earlier threshold, perhaps rounded down (-infinity: none yet), and the scores of
  // the candidates above it. Only for an object that is new.
  void restore(float threshold, float const* candidates, std::int64_t count) {
    if (threshold > -kInfinity) {
      base_ = threshold;
      t_ = 0.0;
    }
    for (std::int64_t i = 0; i < count; ++i) insert(candidates[i]);
  }

  // The scores that restore needs. Returns how many, at most num_candidates.
  std::int64_t save(float* candidates) const {
    std::int64_t count = 0;
    for (std::int32_t const order : saturated_) candidates[count++] = score_of(order);
    for (std::int32_t const order : interior_) candidates[count++] = score_of(order);
    return count;
  }

  // A key enters the pool.
  void insert(float score) {
    double const x = shifted(score);
    if (x >= t_ + 1.0) {
      saturated_.push(order_of(score));
    } else if (x > t_) {
      interior_.push(order_of(score));
      interior_sum_ += x;
    } else {
      return;
    }
    if (saturated_.size() + interior_.size() > num_candidates_) drop_last();
  }

  // tau of the pool so far, which must hold more than k keys.
  double solve() {
    // Between two breakpoints the sum falls linearly. Walk over the breakpoints at which it is
    // still k or more.
    for (;;) {
      double const dies = interior_.empty() ? kInfinity : shifted(score_of(interior_.min()));
      double const unsaturates =
          saturated_.empty() ? kInfinity : shifted(score_of(saturated_.min())) - 1.0;
      double const next = std::min(dies, unsaturates);
      auto const saturated = static_cast<double>(saturated_.size());
      auto const interior = static_cast<double>(interior_.size());
      // The interior's contribution is never negative at `next`. NOTE: asking for the integer first
      // makes the stretch on which the sum equals k (k-th and next score more than 1 apart) exact;
      // rounding cannot end the walk at its lower end.
      if (saturated_.size() < k_ &&
          saturated + (interior_sum_ - interior * next) < static_cast<double>(k_)) {
        t_ = std::max(t_, (saturated + interior_sum_ - static_cast<double>(k_)) / interior);
        if (t_ > kMaxShift) rebase(score_of(interior_.min()));
        return static_cast<double>(base_) + t_;
      }
      if (dies <= unsaturates) {
        remove_interior_min();
        t_ = dies;
      } else {
        float const score = score_of(saturated_.pop());
        t_ = unsaturates;
        if (interior_.empty() || shifted(score) > kMaxShift) {
          rebase(score);
          t_ = -1.0;
        }
        interior_.push(order_of(score));
        interior_sum_ += shifted(score);
      }
    }
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  // Scores are summed relative to a base within a few units of tau: absolute sums would cancel
  // where scores are large. All interior scores lie within 1 above tau, so those present after tau
  // moved by this much all came since the last rebase, and rebasing costs O(1) per key on average.
  static constexpr double kMaxShift = 2.0;

  // Heaps hold scores as integers of the same order: their comparisons need no branch. The map is
  // its own inverse on the bits.
  static std::int32_t order_of(float score) { return flip(std::bit_cast<std::int32_t>(score)); }
  static float score_of(std::int32_t order) { return std::bit_cast<float>(flip(order)); }
  static std::int32_t flip(std::int32_t bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }

  double shifted(float score) const {
    return static_cast<double>(score) - static_cast<double>(base_);
  }

  void rebase(float base) {
    t_ += static_cast<double>(base_) - static_cast<double>(base);
    base_ = base;
    interior_sum_ = 0.0;
    for (std::int32_t const order : interior_) interior_sum_ += shifted(score_of(order));
  }

  void remove_interior_min() {
    double const x = shifted(score_of(interior_.pop()));
    interior_sum_ = interior_.empty() ? 0.0 : interior_sum_ - x;
  }

  // More than M keys: the last-ranked one leaves T. (Keys of equal score are interchangeable here.)
  void drop_last() {
    if (interior_.empty()) {
      saturated_.pop();
    } else {
      remove_interior_min();
    }
  }

  std::int64_t k_, num_candidates_;
  MinHeap<std::int32_t> saturated_, interior_;
  float base_ = 0.0F;
  double t_ = -kInfinity;      // tau - base_
  double interior_sum_ = 0.0;  // of the shifted interior scores
};

}  // namespace sparsek::cpu
