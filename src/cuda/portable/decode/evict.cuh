// Eviction: the keys that leave the window compete with the selected ones, and the threshold goes
// on.
//
// One block streams the keys that enter the pool, a prompt's or a chunk's alike, against two lists:
// the selected keys, slot by slot, and the candidates' scores. Keys that can matter to neither are
// dropped at once; the lists are trimmed when they are full. Only the last pool counts: the top k
// of a union is the top k of its parts, and so is T_c. Rows are copied at the end, for keys that
// are still selected then.
//
// Nothing depends on the order in which threads run: ties are ranked by position, lists are
// compacted in order, and sums are trees of fixed shape.
#pragma once
#include <climits>
#include <cstdint>

#include "cuda/portable/decode/state.cuh"
#include "cuda/portable/select/candidates.cuh"

namespace sparsek::cuda::portable {

// --- ranks

// A key's rank as one integer: larger ranks first. The score in the upper half, below it the
// complement of the position, so that among equal scores the smaller position ranks first.
__device__ inline std::uint64_t rank_of(float score, int position) {
  return std::uint64_t{ordered(score)} << 32 | static_cast<std::uint32_t>(~position);
}
__device__ inline int position_of(std::uint64_t rank) {
  return static_cast<int>(~static_cast<std::uint32_t>(rank));
}
__device__ inline float score_of_order(std::uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}
__device__ inline float score_of(std::uint64_t rank) {
  return score_of_order(static_cast<std::uint32_t>(rank >> 32));
}

// --- lists

// Keys that a thread takes per round, and threads of the block.
template <int kThreads_, int kPerThread_>
struct EvictionConfig {
  static constexpr int kThreads = kThreads_, kPerThread = kPerThread_;
  static constexpr int kRound = kThreads * kPerThread;
  // Keys that a list may hold beyond those that it keeps: a round that is not yet trimmed, and the
  // next one.
  static constexpr int kSlack = 2 * kRound;
};

// Memory of one eviction: shared, or the block's part of the workspace.
struct EvictionLists {
  std::uint64_t* rank;  // [k + kSlack]: the selected keys by their slots, then keys that compete
  float* candidate;     // [M + kSlack]
  int* slot;            // [max(k, kSlack)]: slots that change hands

  static __host__ __device__ std::int64_t aligned(std::int64_t bytes) {
    return (bytes + 15) / 16 * 16;
  }
  static __host__ __device__ std::int64_t bytes(std::int64_t k, std::int64_t m, int slack) {
    return aligned(8 * (k + slack)) + aligned(4 * (m + slack)) +
           aligned(4 * (k > slack ? k : slack));
  }
  __device__ EvictionLists(std::byte* memory, int k, int m, int slack)
      : rank(reinterpret_cast<std::uint64_t*>(memory)),
        candidate(reinterpret_cast<float*>(memory + aligned(8 * (std::int64_t{k} + slack)))),
        slot(reinterpret_cast<int*>(reinterpret_cast<std::byte*>(candidate) +
                                    aligned(4 * (std::int64_t{m} + slack)))) {}
};

template <typename Config>
struct EvictionScratch {
  typename BlockTeam<Config::kThreads>::Exchange exchange;
  std::uint64_t partial[Config::kThreads / 32];
  int counts[2][Config::kThreads / 32];
};

template <typename Config>
class Eviction {
 public:
  __device__ Eviction(HeadState const& state, NewTokens const& tokens, EvictionLists const& lists,
                      EvictionScratch<Config>& scratch)
      : state_(state),
        tokens_(tokens),
        lists_(lists),
        scratch_(scratch),
        k_(state.num_selected),
        m_(state.num_candidates) {}

  // The pool grows from [0, old_end) to [0, end). All threads of the block; ends without a barrier.
  __device__ void run(int old_end, int end) {
    if (k_ == 0) {
      if (threadIdx.x == 0) write_header(INFINITY, 0);
      return;
    }
    if (end - old_end <= 32 && changes_nothing(old_end, end)) return;
    load(old_end);
    float const old_threshold = threshold_;
    int const old_candidates = num_candidates_;
    for (int base = old_end; base < end;) {
      int const next = end - base > Config::kRound ? base + Config::kRound : end;
      admit(base, next);
      bool const is_last = next == end;
      __syncthreads();
      if (num_ranks_ > k_ + (is_last ? 0 : Config::kRound)) trim_ranks();
      if (num_candidates_ > m_ + (is_last ? 0 : Config::kRound)) trim_candidates();
      base = next;
    }
    if (end > k_ && num_candidates_added_ > 0) {
      float const solved = solve_threshold(
          BlockTeam<Config::kThreads>(&scratch_.exchange), lists_.candidate, num_candidates_, k_,
          score_of(last_rank_), Truncation{}, old_threshold, old_threshold - score_of(last_rank_));
      threshold_ = fmaxf(old_threshold, solved);
    }
    if (num_candidates_added_ > 0) {
      num_candidates_ = keep_candidates(state_.candidates, threshold_, 0);
    } else {
      num_candidates_ = old_candidates;
    }
    if (threadIdx.x == 0) write_header(threshold_, num_candidates_);
    take_over(old_end);
  }

 private:
  static constexpr int kThreads = Config::kThreads, kWarps = Config::kThreads / 32;

  __device__ void write_header(float threshold, int num_candidates) {
    state_.header->threshold = threshold;
    state_.header->num_candidates = num_candidates;
  }

  // Whether the keys at positions old_end ... end - 1, at most 32, are neither selected nor
  // candidates.
  // NOTE: with short chunks evictions are frequent, and few of them change anything; this takes one
  // pass over the scores.
  __device__ bool changes_nothing(int old_end, int end) {
    if (old_end < k_) return false;
    int const position = old_end + static_cast<int>(threadIdx.x % 32);
    bool const exists = position < end;
    float const score = exists ? score_at(position) : 0.0f;
    std::uint64_t least = ~std::uint64_t{0};
    for (int i = threadIdx.x; i < k_; i += kThreads)
      least = lesser(least, selected_rank(i, old_end));
    least = reduce(least, lesser);
    float const threshold = state_.header->threshold;
    return !__any_sync(~0u, exists && (rank_of(score, position) > least || score > threshold));
  }

  __device__ float score_at(int position) const {
    return position < tokens_.first ? finite_score(state_.scores[state_.window_row(position)])
                                    : tokens_.score(position - tokens_.first);
  }
  __device__ std::uint64_t selected_rank(int slot, int old_end) const {
    int const position = min(max(state_.positions[slot], 0), old_end - 1);
    return rank_of(finite_score(state_.scores[slot]), position);
  }

  // Reads the pool of old_end keys. (A header that other options wrote must not lead astray.)
  __device__ void load(int old_end) {
    num_ranks_ = min(k_, old_end);
    num_candidates_ = 0;
    threshold_ = -INFINITY;
    if (old_end > 0) {
      num_candidates_ = min(max(state_.header->num_candidates, 0), m_);
      threshold_ = state_.header->threshold;
    }
    for (int i = threadIdx.x; i < num_ranks_; i += kThreads) {
      lists_.rank[i] = selected_rank(i, old_end);
    }
    for (int i = threadIdx.x; i < num_candidates_; i += kThreads) {
      lists_.candidate[i] = finite_score(state_.candidates[i]);
    }
    floor_ = threshold_;
    __syncthreads();
    last_rank_ = num_ranks_ == k_ ? least_rank() : 0;
  }

  // Appends to the lists the keys at positions begin ... end - 1 that can matter.
  __device__ void admit(int begin, int end) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned const lower_lanes = (1u << lane) - 1;
    std::uint64_t rank[Config::kPerThread];
    unsigned ranked[Config::kPerThread], counted[Config::kPerThread];
    int total = 0;  // those that compete, and in the upper half those that are candidates
#pragma unroll
    for (int j = 0; j < Config::kPerThread; ++j) {
      int const position = begin + j * kThreads + static_cast<int>(threadIdx.x);
      bool const exists = position < end;
      float const score = exists ? score_at(position) : 0.0f;
      rank[j] = rank_of(score, position);
      ranked[j] = __ballot_sync(~0u, exists && rank[j] > last_rank_);
      counted[j] = __ballot_sync(~0u, exists && score > floor_);
      total += __popc(ranked[j]) | __popc(counted[j]) << 16;
    }
    // NOTE: two sets of counts take turns, so that one barrier per round is enough.
    parity_ ^= 1;
    int* const counts = scratch_.counts[parity_];
    if (lane == 0) counts[warp] = total;
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      int const of_warp = counts[w];
      if (w < warp) before += of_warp;
      all += of_warp;
    }
    int to_rank = num_ranks_ + (before & 0xFFFF), to_candidate = num_candidates_ + (before >> 16);
#pragma unroll
    for (int j = 0; j < Config::kPerThread; ++j) {
      if (ranked[j] >> lane & 1) lists_.rank[to_rank + __popc(ranked[j] & lower_lanes)] = rank[j];
      if (counted[j] >> lane & 1) {
        lists_.candidate[to_candidate + __popc(counted[j] & lower_lanes)] = score_of(rank[j]);
      }
      to_rank += __popc(ranked[j]);
      to_candidate += __popc(counted[j]);
    }
    num_ranks_ += all & 0xFFFF;
    num_candidates_ += all >> 16;
    num_candidates_added_ += all >> 16;
  }

  // Keeps the k first of the ranked keys: those that compete take the slots of those that lose.
  __device__ void trim_ranks() {
    int const extra = num_ranks_ - k_;
    auto const key = [&](int i) { return lists_.rank[i]; };
    // NOTE: with a chunk of one token a single key competes at every step.
    std::uint64_t const least_kept =
        extra == 1 ? least_rank() + 1 : nth_largest(num_ranks_, k_, key);
    int const num_free = compact(
        k_, [&](int i) { return lists_.rank[i] < least_kept; },
        [&](int at, int i) { lists_.slot[at] = i; });
    __syncthreads();
    compact(
        extra, [&](int i) { return lists_.rank[k_ + i] >= least_kept; },
        [&](int at, int i) {
          if (at < num_free) lists_.rank[lists_.slot[at]] = lists_.rank[k_ + i];
        });
    num_ranks_ = k_;
    __syncthreads();
    last_rank_ = least_rank();
  }

  // Keeps the M largest of the candidates' scores.
  __device__ void trim_candidates() {
    std::uint64_t const cut = nth_largest(
        num_candidates_, m_, [&](int i) { return std::uint64_t{ordered(lists_.candidate[i])}; });
    floor_ = score_of_order(static_cast<std::uint32_t>(cut));
    int const above = count_above(BlockTeam<kThreads>(&scratch_.exchange), lists_.candidate,
                                  num_candidates_, floor_);
    num_candidates_ = keep_candidates(lists_.candidate, floor_, m_ - above);
    __syncthreads();
  }

  // Writes the candidates above `floor` to `to`, and `num_equal` times the floor itself. In place
  // too: nothing is written further on than what has been read.
  __device__ int keep_candidates(float* to, float floor, int num_equal) {
    int const kept = compact(
        num_candidates_, [&](int i) { return lists_.candidate[i] > floor; },
        [&](int at, int, float score) { to[at] = score; },
        [&](int i) { return lists_.candidate[i]; });
    if (num_equal > 0) __syncthreads();
    for (int i = threadIdx.x; i < num_equal; i += kThreads) to[kept + i] = floor;
    return kept + num_equal;
  }

  // Copies the rows of the keys that are newly selected.
  __device__ void take_over(int old_end) {
    int const num_new = compact(
        num_ranks_, [&](int i) { return position_of(lists_.rank[i]) >= old_end; },
        [&](int at, int i) { lists_.slot[at] = i; });
    __syncthreads();
    copy_rows<kThreads>(num_new, state_.row_bytes, [&](int i) {
      int const slot = lists_.slot[i], position = position_of(lists_.rank[slot]);
      std::byte *const to_k = state_.k + state_.offset(slot), *const to_v =
                                                                  state_.v + state_.offset(slot);
      if (position < tokens_.first) {
        std::int64_t const from = state_.offset(state_.window_row(position));
        return RowCopy{state_.k + from, state_.v + from, to_k, to_v, true};
      }
      int const token = position - tokens_.first;
      return RowCopy{tokens_.k_row(token), tokens_.v_row(token), to_k, to_v, tokens_.aligned};
    });
    for (int i = threadIdx.x; i < num_new; i += kThreads) {
      int const slot = lists_.slot[i];
      state_.positions[slot] = position_of(lists_.rank[slot]);
      state_.scores[slot] = score_of(lists_.rank[slot]);
    }
  }

  // --- tools of the whole block

  template <typename Op>
  __device__ std::uint64_t reduce(std::uint64_t x, Op op) {
    for (int d = 16; d > 0; d /= 2) x = op(x, __shfl_xor_sync(~0u, x, d));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch_.partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch_.partial[0];
    for (int w = 1; w < kWarps; ++w) x = op(x, scratch_.partial[w]);
    return x;
  }
  static __device__ std::uint64_t lesser(std::uint64_t a, std::uint64_t b) { return a < b ? a : b; }
  static __device__ std::uint64_t greater(std::uint64_t a, std::uint64_t b) {
    return a > b ? a : b;
  }

  __device__ std::uint64_t least_rank() {
    std::uint64_t least = ~std::uint64_t{0};
    for (int i = threadIdx.x; i < num_ranks_; i += kThreads) least = lesser(least, lists_.rank[i]);
    return reduce(least, lesser);
  }

  // The n-th largest (1-based) of key(0) ... key(count - 1): radix selection whose digits are
  // fitted to the range that is left.
  template <typename Key>
  __device__ std::uint64_t nth_largest(int count, int n, Key key) {
    std::uint64_t low = ~std::uint64_t{0}, high = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      low = lesser(low, key(i)), high = greater(high, key(i));
    }
    low = reduce(low, lesser), high = reduce(high, greater);
    BlockTeam<kThreads> const team(&scratch_.exchange);
    while (low < high) {
      int const shift = max(0, 64 - __clzll(high - low) - 7);  // a digit has kBins = 2^7 values
      Bin const bin = histogram_round(team, count, n, [&](int i) {
        std::uint64_t const x = key(i);
        return x >= low && x <= high ? static_cast<int>((x - low) >> shift) : -1;
      });
      n -= bin.above;
      low += static_cast<std::uint64_t>(bin.index) << shift;
      high = lesser(high, low + ((std::uint64_t{1} << shift) - 1));
      if (bin.count == 1) {
        std::uint64_t found = 0;
        for (int i = threadIdx.x; i < count; i += kThreads) {
          if (key(i) >= low && key(i) <= high) found = key(i);
        }
        return reduce(found, greater);
      }
    }
    return low;
  }

  // Calls store(at, i, read(i)) for the i in 0 ... count - 1 that keep(i) chooses, at = 0, 1, ...
  // in their order, and returns how many there are.
  template <typename Keep, typename Store, typename Read>
  __device__ int compact(int count, Keep keep, Store store, Read read) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int size = 0;
    for (int base = 0; base < count; base += kThreads) {
      int const i = base + static_cast<int>(threadIdx.x);
      bool const kept = i < count && keep(i);
      auto const value = i < count ? read(i) : decltype(read(0)){};
      unsigned const ballot = __ballot_sync(~0u, kept);
      parity_ ^= 1;
      int* const counts = scratch_.counts[parity_];
      if (lane == 0) counts[warp] = __popc(ballot);
      __syncthreads();
      int at = size + __popc(ballot & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) at += counts[w];
        size += counts[w];
      }
      if (kept) store(at, i, value);
    }
    return size;
  }
  template <typename Keep, typename Store>
  __device__ int compact(int count, Keep keep, Store store) {
    return compact(count, keep, [&](int at, int i, int) { store(at, i); }, [](int) { return 0; });
  }

  HeadState const& state_;
  NewTokens const& tokens_;
  EvictionLists const& lists_;
  EvictionScratch<Config>& scratch_;
  int k_, m_;
  int num_ranks_ = 0, num_candidates_ = 0, num_candidates_added_ = 0;
  std::uint64_t last_rank_ = 0;  // the k-th; 0 while there are fewer: every key ranks before it
  float threshold_ = -INFINITY;
  float floor_ = -INFINITY;  // scores up to this one can never count again
  int parity_ = 0;
};

// NOTE: not inlined: the attention around it would lose registers to what runs once per chunk.
template <typename Config>
__device__ __noinline__ void evict(DecodeCall const& call, Head head, int old_end, int end,
                                   std::byte* list_memory, EvictionScratch<Config>& scratch) {
  HeadState const state(call, head.memory);
  NewTokens const tokens = tokens_of(call, head);
  EvictionLists const lists(list_memory, state.num_selected, state.num_candidates, Config::kSlack);
  Eviction<Config>(state, tokens, lists, scratch).run(old_end, end);
}

}  // namespace sparsek::cuda::portable
