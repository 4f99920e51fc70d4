// The state of one pool: what select computes for every chunk.
#pragma once
#include "cuda/portable/select/candidates.cuh"

namespace sparsek::cuda::portable {

// What is known of a pool.
struct State {
  RankedKey kth{-INFINITY, INT_MAX};  // of a pool of at most k keys: ranks after every key
  RankedKey cut{-INFINITY, INT_MAX};  // the num_candidates-th, where it truncates the list
  float threshold = -INFINITY;
};

// The configuration, in the kernels' integers.
struct Config {
  int k, num_candidates;
  bool
      rank_candidates;  // last_candidate is wanted: keep all candidates, not only those above the threshold

  __device__ Config(SelectProblem const& p, Row const& r)
      : k(static_cast<int>(p.num_selected)),
        num_candidates(static_cast<int>(p.num_candidates)),
        rank_candidates(p.last_candidate != nullptr && p.num_candidates < r.valid &&
                        p.num_candidates > 0) {}

  // The least score that `keeps` lets through.
  __device__ float least(State const& state) const {
    return rank_candidates ? state.cut.score : fmaxf(state.cut.score, state.threshold);
  }
};

// Whether a key can still matter to a pool that contains one of this state.
struct Filter {
  float floor;        // larger scores can
  int last_position;  // and, up to this position, equal ones

  __device__ Filter(Config const& config, State const& state)
      : floor(config.least(state)),
        last_position(floor == state.cut.score &&
                              (config.rank_candidates || floor > state.threshold)
                          ? state.cut.position
                          : -1) {}
  __device__ bool keeps(float score, int position) const {
    return score > floor || (score == floor && position <= last_position);
  }
};

// select_ranked, not inlined a second time: the list is seldom longer than num_candidates.
template <typename Team>
__device__ __noinline__ RankedKey select_cut(Team team, float const* scores, int const* positions,
                                             int count, int rank, float low, float high) {
  return select_ranked(team, scores, positions, count, rank, low, high);
}

// The state of a pool of `pool` keys, of which the list holds all that matter. `before`: a state of
// an earlier pool; every score lies in [low, high]; `guess`: threshold - k-th score, roughly.
template <typename Team>
__device__ State state_of(Team const& team, Config const& config, float const* scores,
                          int const* positions, int count, int pool, State const& before, float low,
                          float high, float guess) {
  State state;
  int const k = config.k, m = config.num_candidates;
  if (pool <= k) return state;
  low = fmaxf(low, config.least(before));
  Truncation truncation;
  if (m > 0 && (config.rank_candidates ? pool > m : count > m)) {
    state.cut = select_cut(team, scores, positions, count, m, low, high);
  }
  if (k == 0) {
    state.kth = {INFINITY, -1};
    state.threshold = INFINITY;
    return state;
  }
  state.kth = select_ranked(team, scores, positions, count, k, fmaxf(low, before.kth.score), high);
  if (state.cut.score > before.threshold) {
    truncation.floor = state.cut.score;
    truncation.num_at_floor = m - count_above(team, scores, count, state.cut.score);
  }
  state.threshold =
      solve_threshold(team, scores, count, k, state.kth.score, truncation, before.threshold, guess);
  return state;
}

}  // namespace sparsek::cuda::portable
