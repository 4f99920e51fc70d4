// The states of the chunks between two marks, from the states at the marks: one lane per chunk.
//
// Between two marks at most kMarkSpan keys enter the pool, so little changes: the k-th key moves
// past at most as many old keys, and the threshold moves from one known value to another. An old
// key that is saturated (or interior, or outside) at both ends is so in between. What remains are
// few *critical* keys, which every lane goes through for its own chunk.
#pragma once
#include "cuda/portable/select/walk.cuh"

namespace sparsek::cuda::portable {

// Critical keys that fit. NOTE: at most 2 * kMarkSpan + 1 keys are critical for a rank; for the
// threshold there is no such bound, and where they do not fit the caller computes each state on its
// own.
inline constexpr int kCriticalKeys = 2 * kMarkSpan + 32;
inline constexpr int kChunksPerLane = kMarkSpan / 32;

struct CriticalKeys {
  float score[kCriticalKeys];
  int position[kCriticalKeys];
  // Of the chunks whose threshold differs from the one before: which they are, and the threshold.
  unsigned short changed[kMarkSpan];
  float threshold[kMarkSpan];
};

// Two marks and the list.
struct BetweenMarks {
  Marks const& marks;
  SortedList const& list;
  int old_pool, pool;          // of the two marks
  int first_chunk, end_chunk;  // those strictly between
  State const &before, &after;

  __device__ int chunk(int i) const {
    return first_chunk + static_cast<int>(threadIdx.x % 32) + 32 * i;
  }
};

// store(chunk, key): the `rank`-th ranked key of each chunk's pool, where the pool has more than
// `rank` keys. `first` and `last` are those of the marks.
template <typename Store>
__device__ void rank_between(BetweenMarks const& m, CriticalKeys& critical, int rank,
                             RankedKey const& first, RankedKey const& last, Store store) {
  int const lane = threadIdx.x % 32;
  unsigned const lower_lanes = (1u << lane) - 1;
  // Old keys that rank before `last` are ahead of the rank-th key in every pool; those after
  // `first` are behind it.
  int ahead = 0, n = 0;
  __syncwarp();
  for (int base = 0; base < m.list.count; base += 32) {
    int const i = base + lane;
    bool is_critical = false, is_ahead = false, is_behind = true;
    float score = 0.0f;
    int position = 0;
    if (i < m.list.count) {
      score = m.list.scores[i], position = m.list.positions[i];
      is_behind = ranks_after(score, position, first);
    }
    if (!is_behind && position < m.pool) {
      is_ahead = position < m.old_pool &&
                 ranks_after(last.score, last.position, RankedKey{score, position});
      is_critical = !is_ahead;
    }
    ahead += __popc(__ballot_sync(~0u, is_ahead));
    unsigned const found = __ballot_sync(~0u, is_critical);
    int const at = n + __popc(found & lower_lanes);
    if (is_critical && at < kCriticalKeys) {
      critical.score[at] = score;
      critical.position[at] = position;
    }
    n += __popc(found);
    if (__any_sync(~0u, is_behind)) break;  // so is all that follows
  }
  n = min(n, kCriticalKeys);
  __syncwarp();
  int pool[kChunksPerLane], missing[kChunksPerLane], found[kChunksPerLane];
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
    pool[i] = m.chunk(i) < m.end_chunk ? m.marks.pool_end_of_chunk(m.chunk(i)) : 0;
    missing[i] = pool[i] > rank ? rank - ahead : INT_MAX;
    found[i] = 0;
  }
  for (int j = 0; j < n; ++j) {
    int const position = critical.position[j];
#pragma unroll
    for (int i = 0; i < kChunksPerLane; ++i) {
      if (position < pool[i] && --missing[i] == 0) found[i] = j;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
    if (pool[i] > rank) {
      store(m.chunk(i), RankedKey{critical.score[found[i]], critical.position[found[i]]});
    }
  }
}

// store(chunk, threshold) for each chunk whose pool has more than k keys; kth_score(chunk) is its
// k-th score. False if the critical keys do not fit, or if more than `num_candidates` keys lie
// above the first threshold: then it matters which are candidates.
template <typename KthScore, typename Store>
__device__ bool thresholds_between(BetweenMarks const& m, CriticalKeys& critical, int k,
                                   int num_candidates, KthScore kth_score, Store store) {
  int const lane = threadIdx.x % 32;
  unsigned const lower_lanes = (1u << lane) - 1;
  // Every threshold in between lies in [low, high].
  float const low = m.before.threshold;
  float const high = nextafterf(m.after.threshold, INFINITY);
  float const low_plus_one = __double2float_rd(static_cast<double>(low) + 1.0);
  float const high_plus_one = __double2float_ru(static_cast<double>(high) + 1.0);
  // Of the old keys: sums over those that are not critical. New ones that are not critical are kept
  // from the end of the buffer backwards; they count from their own position on.
  int all_saturated = 0, all_interior = 0;
  double all_sum = 0.0;
  int n = 0, settled = 0;
  __syncwarp();
  for (int start = 0; start < m.list.count; start += 32) {
    int const i = start + lane;
    bool is_critical = false, is_settled = false, saturated = false, interior = false;
    float score = 0.0f;
    int position = INT_MAX;
    if (i < m.list.count) score = m.list.scores[i], position = m.list.positions[i];
    if (!__any_sync(~0u, i < m.list.count && score > low)) break;
    if (position < m.pool) {
      bool const is_old = position < m.old_pool;
      saturated = score > high_plus_one;
      interior = score > high && score <= low_plus_one;
      is_critical = score > low && !saturated && !interior;
      is_settled = !is_old && (saturated || interior);
      if (is_old && interior) all_sum += score;
      saturated = saturated && is_old;
      interior = interior && is_old;
    }
    all_saturated += __popc(__ballot_sync(~0u, saturated));
    all_interior += __popc(__ballot_sync(~0u, interior));
    unsigned const criticals = __ballot_sync(~0u, is_critical);
    unsigned const settleds = __ballot_sync(~0u, is_settled);
    if (n + settled + __popc(criticals) + __popc(settleds) > kCriticalKeys) return false;
    if (is_critical || is_settled) {
      int const at = is_critical ? n + __popc(criticals & lower_lanes)
                                 : kCriticalKeys - 1 - settled - __popc(settleds & lower_lanes);
      critical.score[at] = score;
      critical.position[at] = position;
    }
    n += __popc(criticals);
    settled += __popc(settleds);
  }
  if (all_saturated + all_interior + n + settled > num_candidates) return false;
  all_sum = WarpTeam(nullptr).sum(all_sum);
  __syncwarp();

  // A chunk whose pool gained none of these keys has the state of the chunk before.
  int pools[kChunksPerLane], entered[kChunksPerLane] = {}, state[kChunksPerLane];
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
    pools[i] = m.chunk(i) < m.end_chunk ? m.marks.pool_end_of_chunk(m.chunk(i)) : 0;
  }
  int entered_before = 0;
  auto const count_entered = [&](int begin, int end) {
    for (int j = begin; j < end; ++j) {
      int const position = critical.position[j];
      entered_before += position < m.old_pool;
#pragma unroll
      for (int i = 0; i < kChunksPerLane; ++i) entered[i] += position < pools[i];
    }
  };
  count_entered(0, n);
  count_entered(kCriticalKeys - settled, kCriticalKeys);
  int num_changed = 0;
  bool known_before = m.old_pool > k;
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
    bool const known = pools[i] > k;
    int entered_last = __shfl_up_sync(~0u, entered[i], 1);
    bool known_last = __shfl_up_sync(~0u, known, 1);
    if (lane == 0) entered_last = entered_before, known_last = known_before;
    bool const changed = known && !(known_last && entered[i] == entered_last);
    unsigned const changes = __ballot_sync(~0u, changed);
    state[i] = num_changed + __popc(changes & (lower_lanes | 1u << lane)) - 1;
    if (changed) critical.changed[state[i]] = static_cast<unsigned short>(32 * i + lane);
    num_changed += __popc(changes);
    entered_before = __shfl_sync(~0u, entered[i], 31);
    known_before = __shfl_sync(~0u, known, 31);
  }
  __syncwarp();

  int const first_pool = m.marks.pool_end_of_chunk(m.first_chunk);
  int const last_pool = m.marks.pool_end_of_chunk(m.end_chunk);
  for (int base = 0; base < num_changed; base += 32) {
    bool active = base + lane < num_changed;
    int const chunk = m.first_chunk + (active ? critical.changed[base + lane] : 0);
    int const pool = active ? m.marks.pool_end_of_chunk(chunk) : 0;
    float const kth = active ? kth_score(chunk) : 0.0f;
    int settled_saturated = all_saturated, settled_interior = all_interior;
    double settled_sum = all_sum;
    for (int j = kCriticalKeys - settled; j < kCriticalKeys; ++j) {
      float const u = critical.score[j];
      if (critical.position[j] < pool) {
        if (u > high_plus_one) {
          ++settled_saturated;
        } else {
          ++settled_interior;
          settled_sum += u;
        }
      }
    }
    // As ThresholdWalker::solve does.
    double lowest = fmax(static_cast<double>(low), kth - 1.0);
    double highest = kth;
    double t = lowest;
    if (low > -INFINITY) {
      double const part = static_cast<double>(pool - first_pool) / max(last_pool - first_pool, 1);
      double const guess = low + part * (static_cast<double>(high) - low);
      if (guess >= lowest && guess < highest) t = guess;
    }
    int last_saturated = -1, last_interior = -1;
    for (int step = 0; step < 100 && __any_sync(~0u, active); ++step) {
      float const zero = __double2float_rd(t);
      float const one = __double2float_rd(t + 1.0);
      int saturated = settled_saturated, interior = settled_interior;
      double sum = settled_sum;
      for (int j = 0; j < n; ++j) {
        float const u = critical.score[j];
        if (critical.position[j] < pool && u > zero) {
          if (u > one) {
            ++saturated;
          } else {
            ++interior;
            sum += u;
          }
        }
      }
      if (!active) continue;
      if (saturated == last_saturated && interior == last_interior) {
        active = false;
        continue;
      }
      last_saturated = saturated, last_interior = interior;
      double const excess = saturated + sum - k;
      if (excess - interior * t >= 0.0) {
        lowest = t;
      } else {
        highest = t;
      }
      double next = interior > 0 ? excess / interior : highest + 1.0;
      if (next == t) {
        active = false;
      } else if (!(next >= lowest && next < highest)) {
        next = 0.5 * (lowest + highest);
        last_saturated = -1;
        if (highest - lowest < 0x1p-44) {
          next = lowest;
          active = false;
        }
      }
      t = next;
    }
    if (pool > 0) critical.threshold[base + lane] = rounded_threshold(t, kth);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
    if (pools[i] > k) store(m.chunk(i), state[i] < 0 ? low : critical.threshold[state[i]]);
  }
  return true;
}

}  // namespace sparsek::cuda::portable
