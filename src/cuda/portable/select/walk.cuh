// The states of one pool after another, by a warp, over a sorted list: the k-th ranked key, the
// last candidate and the threshold are places in the list.
//
// A pool is the entries of the list whose position is less than `pool`; keys that rank after all of
// the list matter to nobody.
#pragma once
#include <cfloat>
#include <climits>

#include "cuda/portable/select/sorted_list.cuh"
#include "cuda/portable/select/state.cuh"

namespace sparsek::cuda::portable {

// The largest float below a finite one.
__device__ inline float float_below(float u) {
  int const bits = __float_as_int(u);
  return __int_as_float(u > 0.0f ? bits - 1 : u < 0.0f ? bits + 1 : static_cast<int>(0x80000001u));
}

// The stored threshold: rounded down, below the k-th score. The sums' rounding errors lie far below
// the margin.
__device__ inline float rounded_threshold(double tau, float kth) {
  double const margin = (fabs(tau) + 1.0) * 0x1p-42;
  return fminf(__double2float_rd(tau - margin), float_below(kth));
}

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

// The state of a growing pool. Everything is the same on every lane.
//
// The threshold solves sum_j clip(u_j - tau, 0, 1) = k over the pool's candidates. The sum less k
// is a non-increasing, piecewise linear function of tau: `excess` - `interior` * tau, where the
// saturated entries [0, first_interior) have u > tau + 1 and count 1 each in `excess`, and the
// interior ones [first_interior, end) have u > tau and count u. A piece ends where an entry leaves
// (tau = u) or a saturated one becomes interior (tau = u - 1). Pieces are walked up or down, entry
// by entry, to the one that holds the solution.
class PoolWalker {
 public:
  static constexpr int kNone = INT_MAX;

  // `guess`: threshold - k-th score, roughly.
  __device__ PoolWalker(Config const& config, SortedList const& list, float guess)
      : config_(config), list_(list), guess_(guess), end_(list.count) {}

  // Any pool. `least`: no threshold lies below it.
  __device__ void start(int pool, double least) { move_to(pool, least, false, 0, nullptr); }

  // `grows`: from a smaller pool, if its state is known; then `num_new` keys enter, which stand at
  // entry_of[] of the list (kNone: not there). Else as start().
  __device__ void move_to(int pool, double least, bool grows, int num_new, int const* entry_of) {
    int const k = config_.k, m = config_.num_candidates;
    bool known = grows && kth_ != kNone && kth_ >= 0;
    double at, lowest;
    if (known) {
      at = lowest = tau();
      enter_all(pool, num_new, entry_of);
    } else {
      kth_ = cut_ = kNone;
      end_ = list_.count;
      if (pool <= k) return;
      if (config_.rank_candidates && pool > m) cut_ = rank_index(pool, m);
      if (k == 0) {
        kth_ = -1, end_ = 0;
        return;
      }
      kth_ = rank_index(pool, k);
      // NOTE: below the k-th key even where a float is more than 1 wide, so that it stays in.
      double const kth = score_of(kth_), guess = kth + guess_;
      lowest = fmax(kth - fmax(1.0, fabs(kth) * 0x1p-22), least);
      at = guess > lowest && guess < kth ? guess : lowest;
    }
    for (;;) {
      converge(pool, at, lowest, known);
      if (cut_ != kNone || positive_ <= m) break;
      // Only now does it matter which keys are candidates. The threshold falls.
      cut_ = rank_index(pool, m);
      at = tau(), known = false;
    }
  }

  // Entries from here on matter to no later pool.
  __device__ int num_that_matter() const {
    if (config_.rank_candidates) return cut_ == kNone ? list_.count : cut_ + 1;
    return end_;
  }

  // The place of the k-th key: -1 if k = 0, kNone if the pool holds no more than k keys.
  __device__ int kth() const { return kth_; }
  __device__ int cut() const { return cut_; }
  // Where k > 0 and kth() is known.
  __device__ double tau() const { return excess_ / interior_; }

  __device__ State state() const {
    State state;
    if (cut_ != kNone) state.cut = list_.keys[cut_];
    if (kth_ == kNone) return state;
    if (kth_ < 0) {
      state.kth = {INFINITY, -1};
      state.threshold = INFINITY;
    } else {
      state.kth = list_.keys[kth_];
      state.threshold = rounded_threshold(tau(), state.kth.score);
    }
    return state;
  }

  // The state after one of several keys.
  struct Here {
    int kth, cut;
    int evicted;  // the entry that the key drives out of the first k, if another than itself
    double excess, interior;

    __device__ float threshold(SortedList const& list) const {
      if (kth == kNone) return -INFINITY;
      return kth < 0 ? INFINITY : rounded_threshold(excess / interior, list.keys[kth].score);
    }
  };

  // 32 keys enter the pool one after another: those at the positions `base` + lane, which stand at
  // entry `index` of the list (kNone: not there).
  __device__ Here enter(int base, int index) {
    if (kth_ == kNone && base + 32 <= config_.k)
      return {kNone, kNone, kNone};  // not yet more than k
    if (kth_ == kNone || kth_ < 0) return enter_singly(base, index);
    unsigned const counting = __ballot_sync(~0u, index < end_);
    int const m = config_.num_candidates;
    bool is_plain = true;
    Here here{kth_, cut_, kNone};
    if (cut_ == kNone) {
      is_plain = positive_ + __popc(counting) <= m && !(config_.rank_candidates && base + 32 > m);
    } else {
      int const cut = cut_;
      int evicted;
      follow(cut_, here.cut, evicted, base, index);
      is_plain = end_ <= cut_ + 1;
      if (!is_plain) cut_ = cut;
    }
    if (!is_plain) return enter_singly(base, index);
    follow(kth_, here.kth, here.evicted, base, index);
    enter_together(base, index, counting, here);
    return here;
  }

  // The state of the pool that all new keys have entered.
  __device__ void settle(int pool) {
    int const k = config_.k, m = config_.num_candidates;
    bool anew = kth_ == kNone;
    if (!anew) {
      if (cut_ != kNone) {
        cut_ = advance(cut_, pool, better_cut_);
      } else if (config_.rank_candidates && pool > m) {
        cut_ = rank_index(pool, m);
      }
      if (k > 0) {
        if (cut_ != kNone) drop_behind(cut_ + 1, pool);
        kth_ = advance(kth_, pool, better_kth_);
        anew = cut_ == kNone && positive_ > m;
        if (!anew) raise(pool);
      }
    }
    better_kth_ = better_cut_ = 0;
    if (anew) start(pool, -INFINITY);
  }

 private:
  __device__ bool in_pool(int index, int pool) const { return list_.keys[index].position < pool; }

  // A rank's place in the list while 32 keys enter: `place` after them all, `here` after each
  // lane's, `evicted`: what that drives behind the place.
  __device__ void follow(int& place, int& here, int& evicted, int base, int index) const {
    int const lane = threadIdx.x % 32;
    for (unsigned better = __ballot_sync(~0u, index < place); better; better &= better - 1) {
      int const source = __ffs(better) - 1;
      if (__shfl_sync(~0u, index, source) >= place) continue;  // by now
      if (lane == source) evicted = place;
      do --place;
      while (place > 0 && list_.keys[place].position > base + source);
      if (lane >= source) here = place;
    }
  }

  // The threshold while 32 keys enter that are all candidates if they lie above it. Sums, and with
  // them where pieces end, are those of each lane; what crosses is applied in the order of time.
  __device__ void enter_together(int base, int index, unsigned counting, Here& here) {
    int const lane = threadIdx.x % 32;
    unsigned const upto = (2u << lane) - 1;
    if (counting) {
      bool const counts = counting >> lane & 1, saturates = index < first_interior_;
      unsigned const interiors = __ballot_sync(~0u, counts && !saturates);
      here.excess = saturates ? 1.0 : counts ? score_of(index) : 0.0;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        double const other = __shfl_up_sync(~0u, here.excess, d);
        if (lane >= d) here.excess += other;
      }
      here.excess += excess_;
      here.interior = interior_ + __popc(interiors & upto);
      int positive = positive_ + __popc(counting & upto);
      // As raise() does.
      double next_enters = this->next_enters(), next_leaves = this->next_leaves(-1);
      unsigned open = ~0u;  // lanes whose state is not known yet
      for (;;) {
        auto const is_beyond = [&](double tau) {
          return fma(-here.interior, tau, here.excess) >= 0.0;
        };
        unsigned const enters = __ballot_sync(~0u, is_beyond(next_enters)) & open;
        unsigned const leaves =
            __ballot_sync(~0u, end_ > here.kth + 1 && is_beyond(next_leaves)) & open;
        if ((enters | leaves) == 0) break;
        int const first = __ffs(enters | leaves) - 1;
        open = ~0u << first;
        if (enters >> first & 1) {
          RankedKey const key = list_.keys[--first_interior_];
          if (lane >= first && base + lane >= key.position) {
            here.excess += key.score - 1.0, here.interior += 1.0;
          }
          next_enters = this->next_enters();
        } else {
          RankedKey const key = list_.keys[--end_];
          if (lane >= first && base + lane >= key.position) {
            here.excess -= key.score, here.interior -= 1.0, --positive;
            if (here.interior == 0.0) here.excess = positive - config_.k;
          }
          next_leaves = this->next_leaves(-1);
        }
      }
      excess_ = __shfl_sync(~0u, here.excess, 31);
      interior_ = __shfl_sync(~0u, here.interior, 31);
      positive_ = __shfl_sync(~0u, positive, 31);
    } else {
      here.excess = excess_, here.interior = interior_;
    }
  }

  // Whatever the state is.
  __device__ Here enter_singly(int base, int index) {
    int const lane = threadIdx.x % 32;
    Here here{kth_, cut_, kNone, excess_, interior_};
    for (unsigned matters = __ballot_sync(~0u, index < num_that_matter()); matters;
         matters &= matters - 1) {
      int const source = __ffs(matters) - 1, before = kth_, pool = base + source + 1;
      int const entering = __shfl_sync(~0u, index, source);
      if (entering >= num_that_matter()) continue;  // by now
      enter(entering);
      settle(pool);
      if (lane < source) continue;
      here.kth = kth_, here.cut = cut_, here.excess = excess_, here.interior = interior_;
      if (lane == source && kth_ != before && entering <= kth_) {
        // The entry after the first k: where there were no more than k keys, the last one in the
        // pool.
        here.evicted = before;
        if (before == kNone) {
          here.evicted = kth_ + 1;
          while (!in_pool(here.evicted, pool)) ++here.evicted;
        }
      }
    }
    return here;
  }

  // A new key of the pool: entry `index`. Its pool's state is known after settle.
  __device__ void enter(int index) {
    better_kth_ += index < kth_, better_cut_ += index < cut_;
    if (index >= end_ || kth_ == kNone) return;
    ++positive_;
    if (index < first_interior_) {
      excess_ += 1.0;
    } else {
      excess_ += list_.keys[index].score, interior_ += 1.0;
    }
  }

  // Where the rank-th key of the pool stands; the pool has that many entries.
  __device__ int rank_index(int pool, int rank) const {
    int const lane = threadIdx.x % 32;
    for (int base = 0; base < list_.count; base += 64) {
      unsigned in = __ballot_sync(~0u, in_pool(base + lane, pool));
      unsigned const next_in =
          __ballot_sync(~0u, in_pool(min(base + 32 + lane, list_.count), pool));
      int const n = __popc(in), next_n = __popc(next_in);
      if (n + next_n < rank) {
        rank -= n + next_n;
        continue;
      }
      if (n < rank) rank -= n, in = next_in, base += 32;
      bool const mine = (in >> lane & 1) && __popc(in & ((1u << lane) - 1)) == rank - 1;
      return base + __ffs(__ballot_sync(~0u, mine)) - 1;
    }
    return list_.count - 1;
  }

  // Moves up by `n` entries of the pool.
  __device__ int advance(int index, int pool, int n) const {
    while (n > 0 && index > 0) n -= in_pool(--index, pool);
    return index;
  }

  // The same for many.
  __device__ int advance_far(int index, int pool, int n) const {
    int const lane = threadIdx.x % 32;
    while (n > 0 && index > 0) {
      int const i = index - 1 - lane;
      unsigned const in = __ballot_sync(~0u, i >= 0 && in_pool(max(i, 0), pool));
      int const found = __popc(in);
      if (found >= n) {
        bool const mine = (in >> lane & 1) && __popc(in & ((1u << lane) - 1)) == n - 1;
        return index - __ffs(__ballot_sync(~0u, mine));
      }
      n -= found;
      index = max(index - 32, 0);
    }
    return index;
  }

  __device__ int limit() const { return cut_ == kNone ? list_.count : cut_ + 1; }

  // The piece that tau lies on, from nothing.
  __device__ void evaluate(int pool, double tau) {
    int const lane = threadIdx.x % 32, limit = this->limit();
    RankedKey const* const keys = list_.keys;
    float const zero = __double2float_rd(tau), one = __double2float_rd(tau + 1.0);
    first_interior_ = count_prefix(limit, [&](int i) { return keys[i].score > one; });
    RankedKey const* const interior_keys = keys + first_interior_;
    int const num_interior =
        count_prefix(limit - first_interior_, [&](int i) { return interior_keys[i].score > zero; });
    end_ = first_interior_ + num_interior;
    int saturated = 0, interior = 0;
#pragma unroll 4
    for (int i = lane; i < first_interior_; i += 32) saturated += keys[i].position < pool;
    double sum = 0.0;
#pragma unroll 4
    for (int i = lane; i < num_interior; i += 32) {
      RankedKey const key = interior_keys[i];
      bool const in = key.position < pool;
      interior += in;
      sum += in ? key.score : 0.0f;
    }
    saturated = __reduce_add_sync(~0u, saturated);
    interior = __reduce_add_sync(~0u, interior);
    positive_ = saturated + interior;
    interior_ = interior;
    excess_ = saturated - config_.k + WarpTeam(nullptr).sum(sum);
  }

  // `num_new` keys of the pool enter at once. The threshold is left where it was.
  __device__ void enter_all(int pool, int num_new, int const* entry_of) {
    int const lane = threadIdx.x % 32;
    int better_kth = 0, better_cut = 0, saturated = 0, positive = 0;
    double sum = 0.0;
#pragma unroll 4
    for (int i = lane; i < num_new; i += 32) {
      int const index = entry_of[i];
      bool const saturates = index < first_interior_, counts = index < end_;
      better_kth += index < kth_, better_cut += index < cut_;
      saturated += saturates, positive += counts;
      sum += counts && !saturates ? list_.keys[index].score : 0.0f;
    }
    saturated = __reduce_add_sync(~0u, saturated);
    positive = __reduce_add_sync(~0u, positive);
    excess_ += saturated + WarpTeam(nullptr).sum(sum);
    interior_ += positive - saturated, positive_ += positive;
    kth_ = advance_far(kth_, pool, __reduce_add_sync(~0u, better_kth));
    if (cut_ != kNone) {
      cut_ = advance_far(cut_, pool, __reduce_add_sync(~0u, better_cut));
    } else if (config_.rank_candidates && pool > config_.num_candidates) {
      cut_ = rank_index(pool, config_.num_candidates);
    }
    if (cut_ != kNone) drop_behind(cut_ + 1, pool);
  }

  // From tau = `at`, whose piece is `known` or not, to the piece that holds the solution, which is
  // not below `lowest`. The k-th key and the last candidate are known.
  __device__ void converge(int pool, double at, double lowest, bool known) {
    // Newton steps, until what lies between is little enough to be walked.
    constexpr int kFar = 8, kMaxSteps = 4;
    for (int step = 0;; ++step) {
      if (step > 0 || !known) evaluate(pool, at);
      double next = interior_ > 0.0 ? tau() : excess_ < 0.0 ? lowest : at;
      next = fmin(fmax(next, lowest), score_of(kth_));
      bool const far_up =
          (end_ > kFar && score_of(end_ - kFar) <= next) ||
          (first_interior_ > kFar && score_of(first_interior_ - kFar) - 1.0 <= next);
      bool const far_down =
          (end_ + kFar < limit() && score_of(end_ + kFar) > next) ||
          (first_interior_ + kFar < end_ && score_of(first_interior_ + kFar) - 1.0 > next);
      if (step == kMaxSteps || (!far_up && !far_down)) break;
      at = next;
    }
    if (excess_at(at) >= 0.0) {
      raise(pool);
    } else {
      lower(pool);
    }
  }

  // The sum less k at `tau` if that lies on the piece.
  __device__ double excess_at(double tau) const { return fma(-interior_, tau, excess_); }

  // Without interior entries the excess is a whole number, whatever sums have left of others.
  __device__ void leave_interior(float score) {
    excess_ -= score, interior_ -= 1.0, --positive_;
    if (interior_ == 0.0) excess_ = positive_ - config_.k;
  }

  __device__ double score_of(int index) const { return list_.keys[index].score; }

  // Where, going up, the last saturated entry becomes interior and where the last interior one
  // leaves. Candidates no later than the k-th key never do, whatever rounding says.
  __device__ double next_enters() const {
    return first_interior_ > 0 ? score_of(first_interior_ - 1) - 1.0 : INFINITY;
  }
  __device__ double next_leaves(int kth) const {
    return end_ > kth + 1 ? score_of(end_ - 1) : INFINITY;
  }

  // Up to the solution. NOTE: where the piece would end by a saturated entry with the sum still at
  // k or above, that may be crossed even if another entry leaves before; not the other way round.
  __device__ void raise(int pool) {
    double enters = next_enters(), leaves = next_leaves(kth_);
    for (;;) {
      if (excess_at(enters) >= 0.0) {
        RankedKey const key = list_.keys[--first_interior_];
        if (key.position < pool) excess_ += key.score - 1.0, interior_ += 1.0;
        enters = next_enters();
      } else if (excess_at(leaves) >= 0.0) {
        RankedKey const key = list_.keys[--end_];
        if (key.position < pool) leave_interior(key.score);
        leaves = next_leaves(kth_);
      } else {
        break;
      }
    }
  }

  // Down to the solution.
  __device__ void lower(int pool) {
    int const limit = this->limit();
    for (;;) {
      if (end_ < limit && excess_at(score_of(end_)) < 0.0) {
        RankedKey const key = list_.keys[end_++];
        if (key.position < pool) excess_ += key.score, interior_ += 1.0, ++positive_;
      } else if (first_interior_ < end_ && excess_at(score_of(first_interior_) - 1.0) < 0.0) {
        RankedKey const key = list_.keys[first_interior_++];
        if (key.position < pool) ++positive_, excess_ += 1.0, leave_interior(key.score);
      } else {
        break;
      }
    }
  }

  // Entries from `limit` on are no candidates any more.
  __device__ void drop_behind(int limit, int pool) {
    while (end_ > limit) {
      RankedKey const key = list_.keys[--end_];
      bool const was_saturated = end_ < first_interior_;
      first_interior_ = min(first_interior_, end_);
      if (key.position >= pool) continue;
      if (was_saturated) {
        --positive_, excess_ -= 1.0;
      } else {
        leave_interior(key.score);
      }
    }
  }

  Config const& config_;
  SortedList const& list_;
  float const guess_;
  int kth_ = kNone, cut_ = kNone;
  int better_kth_ = 0, better_cut_ = 0;
  int first_interior_ = 0, end_;
  int positive_ = 0;  // saturated and interior entries in the pool
  double interior_ = 0.0, excess_ = 0.0;
};

}  // namespace sparsek::cuda::portable
