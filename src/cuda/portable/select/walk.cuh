// The state of one pool after another, by a warp, over a sorted list: the k-th ranked key and the
// threshold move little when keys are added, so each is a place in the list that is walked on from
// mark to mark.
//
// A pool is the entries of the list whose position is less than `pool`; keys that rank after all of
// the list matter to nobody.
#pragma once
#include <cfloat>
#include <climits>

#include "cuda/portable/select/sorted_list.cuh"
#include "cuda/portable/select/state.cuh"

namespace sparsek::cuda::portable {

// How many of the entries [0, count) come before the first for which not holds(i); by a warp, 32
// probes at a time.
template <typename Holds>
__device__ int count_prefix(int count, Holds holds) {
  int const lane = threadIdx.x % 32;
  int first = 0;
  while (count > 0) {
    int const step = (count + 31) / 32;
    int const probe = lane * step + step - 1;
    int const blocks = __popc(__ballot_sync(~0u, probe < count && holds(first + probe)));
    first += blocks * step;
    count = min(count - blocks * step, step - 1);
  }
  return first;
}

// Where the rank-th key of the pool stands in the list.
struct RankWalker {
  int index = -1;  // -1: the pool holds no more than `rank` keys

  __device__ bool started() const { return index >= 0; }

  // From the top. The pool holds at least `rank` entries.
  __device__ void start(SortedList const& list, int pool, int rank) {
    int const lane = threadIdx.x % 32;
    for (int base = 0; base < list.count; base += 32) {
      int const i = base + lane;
      unsigned const in = __ballot_sync(~0u, i < list.count && list.positions[i] < pool);
      int const n = __popc(in);
      if (n >= rank) {
        index = base + nth_bit(in, rank);
        return;
      }
      rank -= n;
    }
    index = list.count - 1;
  }

  // After the pool grew by keys of which `num_better` rank before the place.
  __device__ void advance(SortedList const& list, int pool, int num_better) {
    int const lane = threadIdx.x % 32;
    while (num_better > 0 && index > 0) {
      int const i = index - 1 - lane;
      unsigned const in = __ballot_sync(~0u, i >= 0 && list.positions[i] < pool);
      int const n = __popc(in);
      if (n >= num_better) {
        index -= 1 + nth_bit(in, num_better);
        return;
      }
      num_better -= n;
      index = max(index - 32, 0);
    }
  }

  __device__ RankedKey key(SortedList const& list) const {
    return {list.scores[index], list.positions[index]};
  }
};

// The stored threshold: rounded down, below the k-th score. The sums' rounding errors lie far below
// the margin.
__device__ inline float rounded_threshold(double tau, float kth) {
  double const margin = (fabs(tau) + 1.0) * 0x1p-42;
  return fminf(__double2float_rd(tau - margin), nextafterf(kth, -INFINITY));
}

// tau = sup{tau : sum_j clip(u_j - tau, 0, 1) >= k} over the pool's entries before `limit`.
//
// The sum is a non-increasing, piecewise linear function of tau: `saturated` + `sum` - `interior` *
// tau, where the saturated entries [0, first_interior) have u > tau + 1 and the interior ones
// [first_interior, end) have u > tau. Newton steps within a bracket; a step that crosses no entry
// is the exact solution.
struct ThresholdWalker {
  double tau = INFINITY;                  // where it stands
  float zero = INFINITY, one = INFINITY;  // u > tau if and only if u > zero; u > tau + 1 if u > one
  int first_interior = 0, end = 0;
  int saturated = 0, interior = 0;
  double sum = 0.0;  // of the interior scores

  // Moves to `next`, and the end to at most `limit`. Says whether the sum's terms changed.
  __device__ bool move(SortedList const& list, int pool, int limit, double next) {
    int const lane = threadIdx.x % 32;
    int const old_saturated = saturated, old_interior = interior;
    double change = 0.0;
    bool const from_nowhere = tau == INFINITY, up = next >= tau;
    tau = next, zero = __double2float_rd(next), one = __double2float_rd(next + 1.0);
    auto const in_pool = [&](int i) { return list.positions[i] < pool; };
    if (from_nowhere) {
      limit = min(limit, list.count);
      first_interior = count_prefix(limit, [&](int i) { return list.scores[i] > one; });
      end = count_prefix(limit, [&](int i) { return list.scores[i] > zero; });
      int num_saturated = 0, num_interior = 0;
#pragma unroll 2
      for (int i = lane; i < first_interior; i += 32) num_saturated += in_pool(i);
#pragma unroll 2
      for (int i = first_interior + lane; i < end; i += 32) {
        if (in_pool(i)) change += list.scores[i], ++num_interior;
      }
      saturated = __reduce_add_sync(~0u, num_saturated);
      interior = __reduce_add_sync(~0u, num_interior);
    } else if (up) {
      while (first_interior > 0) {
        int const i = first_interior - 1 - lane;
        float const u = i >= 0 ? list.scores[i] : INFINITY;
        unsigned const leaves = __ballot_sync(~0u, u <= one);
        bool const counts = u <= one && in_pool(i);
        if (counts) change += u;
        int const n = __popc(__ballot_sync(~0u, counts));
        saturated -= n, interior += n;
        first_interior -= __popc(leaves);
        if (leaves != ~0u) break;
      }
      while (end > 0) {
        int const i = end - 1 - lane;
        float const u = i >= 0 ? list.scores[i] : INFINITY;
        bool const leaves = i >= 0 && (i >= limit || u <= zero);
        unsigned const leaving = __ballot_sync(~0u, leaves);
        bool const counts = leaves && in_pool(i);
        if (counts) change -= u;
        interior -= __popc(__ballot_sync(~0u, counts));
        end -= __popc(leaving);
        if (leaving != ~0u) break;
      }
    } else {
      // NOTE: a saturated score never enters the sum, however large it is.
      limit = min(limit, list.count);
      for (;;) {
        int const i = first_interior + lane;
        float const u = i < limit ? list.scores[i] : -INFINITY;
        unsigned const entering = __ballot_sync(~0u, u > one);
        bool const counts = u > one && in_pool(i), was_interior = counts && i < end;
        if (was_interior) change -= u;
        saturated += __popc(__ballot_sync(~0u, counts));
        interior -= __popc(__ballot_sync(~0u, was_interior));
        first_interior += __popc(entering);
        if (entering != ~0u) break;
      }
      end = max(end, first_interior);
      for (;;) {
        int const i = end + lane;
        float const u = i < limit ? list.scores[i] : -INFINITY;
        unsigned const entering = __ballot_sync(~0u, u > zero);
        bool const counts = u > zero && in_pool(i);
        if (counts) change += u;
        interior += __popc(__ballot_sync(~0u, counts));
        end += __popc(entering);
        if (entering != ~0u) break;
      }
    }
    // NOTE: entries cross one boundary or the other in one direction, so equal numbers mean that
    // none did.
    if (saturated == old_saturated && interior == old_interior && !from_nowhere) return false;
    sum += WarpTeam(nullptr).sum(change);
    return true;
  }

  // Whether no entry of the list, in the pool or not, lies between tau or tau + 1 and where `next`
  // would put them.
  __device__ bool crosses_nothing(SortedList const& list, int limit, double next) const {
    float const next_zero = __double2float_rd(next), next_one = __double2float_rd(next + 1.0);
    auto const above = [&](int i, float bound) { return list.scores[i] > bound; };
    return end <= limit && (end == 0 || above(end - 1, next_zero)) &&
           (end >= limit || !above(end, next_zero)) &&
           (first_interior == 0 || above(first_interior - 1, next_one)) &&
           (first_interior >= limit || !above(first_interior, next_one));
  }

  // The stored threshold of the pool, whose k-th score is `kth`: rounded down, below kth. `guess`:
  // where to begin if nothing is known.
  __device__ float solve(SortedList const& list, int pool, int limit, int k, float kth,
                         double least, double guess) {
    // NOTE: below kth even where a float is more than 1 wide, so that the k-th key itself stays in.
    double const below_kth = nextafterf(kth, -INFINITY);
    double lowest = fmax(fmin(kth - 1.0, below_kth), least), highest = kth;
    double next = tau < INFINITY ? tau : guess;
    if (!(next >= lowest && next < highest)) next = lowest;
    bool newton = false, last = false;
    for (int step = 0; step < 100; ++step) {
      if (newton && crosses_nothing(list, limit, next)) {
        tau = next, zero = __double2float_rd(next), one = __double2float_rd(next + 1.0);
        break;
      }
      bool const changed = move(list, pool, limit, next);
      if (last || (newton && !changed)) break;
      double const excess = saturated + sum - k;
      if (excess - interior * tau >= 0.0) {
        lowest = tau;
      } else {
        highest = tau;
      }
      next = interior > 0 ? excess / interior : INFINITY;
      if (next == tau) break;
      newton = next >= lowest && next < highest;
      if (!newton) {
        next = 0.5 * (lowest + highest);
        last = !(next > lowest && next < highest);
        if (last) next = lowest;
      }
    }
    return rounded_threshold(tau, kth);
  }
};

// All of it: the state of one pool after another. Everything is the same on every lane.
class PoolWalker {
 public:
  // `least`: no threshold lies below it; `guess`: threshold - k-th score, roughly.
  __device__ PoolWalker(Config const& config, SortedList const& list, float least, float guess)
      : config_(config), list_(list), least_(least), guess_(guess) {}

  // The first pool.
  __device__ State start(int pool) { return settle(pool, 0, 0); }

  // A larger pool, whose `num_new` new keys have the (unsanitized) scores new_scores[i * stride].
  __device__ State advance(int pool, int num_new, float const* new_scores, std::int64_t stride) {
    int better_kth = 0, better_cut = 0;
    if (kth_.started() || cut_.started()) {
      int const lane = threadIdx.x % 32;
      float const kth_score = kth_.started() ? kth_.key(list_).score : INFINITY;
      float const cut_score = cut_.started() ? cut_.key(list_).score : -INFINITY;
      float const floor = fmaxf(threshold_.zero, cut_score);
      double change = 0.0;
      new_scores += lane * stride;
#pragma unroll 4
      for (int base = 0; base < num_new; base += 32) {
        // Later than all before: equal to a score is not enough.
        float const u = base + lane < num_new ? sanitized(*new_scores) : -INFINITY;
        new_scores += 32 * stride;
        better_kth += __popc(__ballot_sync(~0u, u > kth_score));
        if (cut_.started()) better_cut += __popc(__ballot_sync(~0u, u > cut_score));
        bool const is_interior = u > floor && u <= threshold_.one;
        if (is_interior) change += u;
        threshold_.interior += __popc(__ballot_sync(~0u, is_interior));
        threshold_.saturated += __popc(__ballot_sync(~0u, u > threshold_.one));
      }
      threshold_.sum += WarpTeam(nullptr).sum(change);
    }
    return settle(pool, better_kth, better_cut);
  }

  // How many entries, from the top, matter to pools that hold all of the list.
  __device__ int num_that_matter() const {
    if (config_.rank_candidates) return cut_.started() ? cut_.index + 1 : list_.count;
    if (config_.k == 0) return 0;
    return kth_.started() ? threshold_.end : list_.count;
  }

 private:
  __device__ void walk(RankWalker& walker, int pool, int rank, int num_better) {
    if (walker.started()) {
      walker.advance(list_, pool, num_better);
    } else {
      walker.start(list_, pool, rank);
    }
  }

  __device__ State settle(int pool, int better_kth, int better_cut) {
    State state;
    int const k = config_.k, m = config_.num_candidates;
    if (pool <= k) return state;
    if (config_.rank_candidates ? pool > m : cut_.started()) walk(cut_, pool, m, better_cut);
    if (k == 0) {
      state.kth = {INFINITY, -1};
      state.threshold = INFINITY;
    } else {
      walk(kth_, pool, k, better_kth);
      state.kth = kth_.key(list_);
      for (;;) {
        int const limit = cut_.started() ? cut_.index + 1 : list_.count;
        double const least = threshold_.tau < INFINITY ? threshold_.tau : least_;
        state.threshold = threshold_.solve(list_, pool, limit, k, state.kth.score, least,
                                           state.kth.score + guess_);
        if (cut_.started() || threshold_.saturated + threshold_.interior <= m) break;
        // Only now does it matter which keys are candidates. The threshold falls.
        walk(cut_, pool, m, 0);
        threshold_ = {};
      }
    }
    if (cut_.started()) state.cut = cut_.key(list_);
    return state;
  }

  Config const& config_;
  SortedList const& list_;
  float const least_, guess_;
  RankWalker kth_, cut_;
  ThresholdWalker threshold_;
};

}  // namespace sparsek::cuda::portable
