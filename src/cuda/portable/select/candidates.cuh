// Order statistics and the SPARSEK threshold of a list of candidates, computed by a team of
// threads: one warp or a whole block. All threads of the team call with the same arguments and get
// the same result.
#pragma once
#include <cfloat>
#include <climits>

#include "cuda/portable/select/geometry.cuh"

namespace sparsek::cuda::portable {

inline constexpr int kBins = 128;  // of one histogram round: 4 per lane
inline constexpr int kGather =
    32;  // a bin of at most this many keys is ranked directly, one key per lane

// Shared memory of one team.
struct alignas(16) TeamScratch {
  int bins[kBins];
  float gathered_score[kGather];
  int gathered_position[kGather];
  int num_gathered;
};

// Maps finite floats to unsigned integers in the same order; -0.0 and 0.0 become one.
__device__ inline unsigned ordered(float u) {
  int const bits = __float_as_int(u + 0.0f);
  return static_cast<unsigned>(bits) ^ (bits < 0 ? 0xffffffffu : 0x80000000u);
}

// The finite float that `ordered` maps to `key`.
__device__ inline float unordered(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

class WarpTeam {
 public:
  __device__ WarpTeam(TeamScratch* scratch) : scratch_(scratch) {}
  __device__ static int rank() { return threadIdx.x % 32; }
  __device__ static constexpr int size() { return 32; }
  __device__ static void sync() { __syncwarp(); }
  __device__ int sum(int x) const { return __reduce_add_sync(~0u, x); }
  __device__ unsigned min(unsigned x) const { return __reduce_min_sync(~0u, x); }
  __device__ unsigned max(unsigned x) const { return __reduce_max_sync(~0u, x); }
  __device__ double sum(double x) const {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
  }
  __device__ TeamScratch& scratch() const { return *scratch_; }

 private:
  TeamScratch* scratch_;
};

// NOTE: every reduction is a tree of fixed shape, so sums have the same bits from call to call.
template <int kThreads>
class BlockTeam {
 public:
  struct Exchange {
    double partial[kThreads / 32];
    TeamScratch scratch;
  };
  __device__ BlockTeam(Exchange* exchange) : exchange_(exchange) {}
  __device__ static int rank() { return threadIdx.x; }
  __device__ static constexpr int size() { return kThreads; }
  __device__ static void sync() { __syncthreads(); }
  __device__ int sum(int x) const {
    return combine(__reduce_add_sync(~0u, x), [](int a, int b) { return a + b; });
  }
  __device__ unsigned min(unsigned x) const {
    return combine(__reduce_min_sync(~0u, x), [](unsigned a, unsigned b) { return a < b ? a : b; });
  }
  __device__ unsigned max(unsigned x) const {
    return combine(__reduce_max_sync(~0u, x), [](unsigned a, unsigned b) { return a > b ? a : b; });
  }
  __device__ double sum(double x) const {
    return combine(WarpTeam(nullptr).sum(x), [](double a, double b) { return a + b; });
  }
  __device__ TeamScratch& scratch() const { return exchange_->scratch; }

 private:
  template <typename T, typename Op>
  __device__ T combine(T of_warp, Op op) const {
    __syncthreads();
    T* const partial = reinterpret_cast<T*>(exchange_->partial);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = of_warp;
    __syncthreads();
    T result = partial[0];
    for (int w = 1; w < kThreads / 32; ++w) result = op(result, partial[w]);
    return result;
  }
  Exchange* exchange_;
};

// The bin that holds the `rank`-th key (1-based) counted from the last bin down: its number, how
// many keys lie above it and in it. Every warp of the team does the same from the finished
// histogram.
struct Bin {
  int index, above, count;
};
__device__ inline Bin find_bin(int const* bins, int rank) {
  int const lane = threadIdx.x % 32;
  int4 const mine = reinterpret_cast<int4 const*>(bins)[31 - lane];  // lane 0: the top bins
  int const total = mine.x + mine.y + mine.z + mine.w;
  int before = total;
  for (int d = 1; d < 32; d *= 2) {
    int const other = __shfl_up_sync(~0u, before, d);
    if (lane >= d) before += other;
  }
  before -= total;
  // Exactly one lane has it (none only if the histogram is short of `rank` keys, which finite
  // scores exclude).
  unsigned const owners = __ballot_sync(~0u, before < rank && rank <= before + total);
  int const owner = owners ? __ffs(owners) - 1 : 31;
  Bin bin{(31 - lane) * 4 + 3, before, mine.w};
  if (rank > bin.above + bin.count) bin = {bin.index - 1, bin.above + bin.count, mine.z};
  if (rank > bin.above + bin.count) bin = {bin.index - 1, bin.above + bin.count, mine.y};
  if (rank > bin.above + bin.count) bin = {bin.index - 1, bin.above + bin.count, mine.x};
  return {__shfl_sync(~0u, bin.index, owner), __shfl_sync(~0u, bin.above, owner),
          __shfl_sync(~0u, bin.count, owner)};
}

// One round: the histogram of bin_of(i) over the list (negative: not counted), and the bin of the
// `rank`-th key.
template <typename Team, typename BinOf>
__device__ inline Bin histogram_round(Team const& team, int count, int rank, BinOf bin_of) {
  int* const bins = team.scratch().bins;
  team.sync();
  for (int i = team.rank(); i < kBins; i += team.size()) bins[i] = 0;
  team.sync();
#pragma unroll 4
  for (int i = team.rank(); i < count; i += team.size()) {
    int const bin = bin_of(i);
    if (bin >= 0) atomicAdd(&bins[bin], 1);
  }
  team.sync();
  return find_bin(bins, rank);
}

// The `rank`-th key among those (at most kGather) for which is_in(i).
template <typename Team, typename IsIn>
__device__ inline RankedKey rank_few(Team const& team, float const* scores, int const* positions,
                                     int count, int rank, IsIn is_in) {
  TeamScratch& s = team.scratch();
  if (team.rank() == 0) s.num_gathered = 0;
  team.sync();
#pragma unroll 4
  for (int i = team.rank(); i < count; i += team.size()) {
    if (is_in(i)) {
      int const at = atomicAdd(&s.num_gathered, 1);
      if (at < kGather) {
        s.gathered_score[at] = scores[i];
        s.gathered_position[at] = positions[i];
      }
    }
  }
  team.sync();
  int const n = min(s.num_gathered, kGather);
  int const lane = threadIdx.x % 32;
  RankedKey const mine = lane < n ? RankedKey{s.gathered_score[lane], s.gathered_position[lane]}
                                  : RankedKey{-INFINITY, INT_MAX};
  int before = 0;
  for (int i = 0; i < n; ++i) {
    before += ranks_after(mine.score, mine.position,
                          RankedKey{s.gathered_score[i], s.gathered_position[i]});
  }
  unsigned const owners = __ballot_sync(~0u, lane < n && before == rank - 1);
  int const owner = owners ? __ffs(owners) - 1 : 0;
  RankedKey const found{__shfl_sync(~0u, mine.score, owner),
                        __shfl_sync(~0u, mine.position, owner)};
  team.sync();
  return found;
}

// select_ranked among the keys whose ordered scores lie in [first, last]. Not inlined: rarely
// taken, and hungry for registers.
template <typename Team>
__device__ __noinline__ RankedKey select_in_range(Team team, float const* scores,
                                                  int const* positions, int count, int rank,
                                                  unsigned first, unsigned last) {
  while (first < last) {
    int const shift = max(0, 32 - __clz(last - first) - 7);
    Bin const digit = histogram_round(team, count, rank, [&](int i) {
      unsigned const key = ordered(scores[i]);
      return key >= first && key <= last ? static_cast<int>((key - first) >> shift) : -1;
    });
    rank -= digit.above;
    first += static_cast<unsigned>(digit.index) << shift;
    last = first + min(last - first, (1u << shift) - 1);  // without wrapping around
    if (digit.count <= kGather) {
      return rank_few(team, scores, positions, count, rank, [&](int i) {
        unsigned const key = ordered(scores[i]);
        return key >= first && key <= last;
      });
    }
  }
  // More than kGather equal scores: the same with their positions, the smallest first.
  unsigned nearest = ~0u, farthest = 0u;
  for (int i = team.rank(); i < count; i += team.size()) {
    if (ordered(scores[i]) == first) {
      unsigned const position = positions[i];
      nearest = min(nearest, position), farthest = max(farthest, position);
    }
  }
  nearest = team.min(nearest), farthest = team.max(farthest);
  for (;;) {
    int const shift = max(0, 32 - __clz(farthest - nearest) - 7);
    auto const is_in = [&](int i) {
      unsigned const position = positions[i];
      return ordered(scores[i]) == first && position >= nearest && position <= farthest;
    };
    Bin const digit = histogram_round(team, count, rank, [&](int i) {
      return is_in(i) ? kBins - 1 - static_cast<int>((positions[i] - nearest) >> shift) : -1;
    });
    rank -= digit.above;
    nearest += static_cast<unsigned>(kBins - 1 - digit.index) << shift;
    farthest = nearest + min(farthest - nearest, (1u << shift) - 1);
    if (digit.count <= kGather || farthest <= nearest) {
      return rank_few(team, scores, positions, count, rank, is_in);
    }
  }
}

// The `rank`-th ranked key (1-based) of a list of at least `rank` keys. Only keys with scores in
// [low, high] take part; at least `rank` do, and none lies above high.
//
// Radix selection with digits fitted to the range that is left. The first round divides [low, high]
// evenly, which suits scores of any smooth distribution; the following ones divide the ordered
// integers, which always ends.
template <typename Team>
__device__ RankedKey select_ranked(Team const& team, float const* scores, int const* positions,
                                   int count, int rank, float low, float high) {
  float const scale = 1.0f / (high - low);  // 0 where the range overflows: then one bin takes all
  float const offset = -low * scale;
  auto const linear_bin = [&](int i) {
    float const u = scores[i];
    // NOTE: every step is monotone, so bins never swap keys. The sum's last bits are the product
    // rounded to an integer, which saves a slow conversion.
    float const rounded = fmaf(__saturatef(fmaf(u, scale, offset)), kBins - 1, 0x1.8p23f);
    return u >= low ? __float_as_int(rounded) & (kBins - 1) : -1;
  };
  Bin const bin = histogram_round(team, count, rank, linear_bin);
  rank -= bin.above;
  if (bin.count <= kGather) {
    return rank_few(team, scores, positions, count, rank,
                    [&](int i) { return linear_bin(i) == bin.index; });
  }
  unsigned first = ~0u, last = 0u;
  for (int i = team.rank(); i < count; i += team.size()) {
    if (linear_bin(i) == bin.index) {
      unsigned const key = ordered(scores[i]);
      first = min(first, key), last = max(last, key);
    }
  }
  return select_in_range(team, scores, positions, count, rank, team.min(first), team.max(last));
}

template <typename Team>
__device__ inline int count_above(Team const& team, float const* scores, int count, float bound) {
  int above = 0;
  for (int i = team.rank(); i < count; i += team.size()) above += scores[i] > bound;
  return team.sum(above);
}

// What truncates a list to its first num_candidates keys: those above `floor`, and `num_at_floor`
// of those equal to it.
struct Truncation {
  float floor = -INFINITY;
  int num_at_floor = 0;
};

// A thread's share of the sum over a list at one trial value of tau: how many scores lie above tau
// and above tau + 1, and the sum of those between. NOTE: written with predicates because the
// compiler makes selects and moves of it, 11 instructions instead of 7.
struct ClippedSum {
  int positive = 0, saturated = 0;
  float sum = 0.0f, rest = 0.0f;

  // Adds u - kth, with float rounding.
  __device__ void add(float u, float zero, float one, float kth) {
    asm("{\n"
        " .reg .pred above, full, between;\n"
        " .reg .f32 difference;\n"
        " setp.gt.f32 above, %3, %4;\n"
        " setp.gt.f32 full, %3, %5;\n"
        " setp.le.and.f32 between, %3, %5, above;\n"
        " sub.f32 difference, %3, %6;\n"
        " @above add.s32 %0, %0, 1;\n"
        " @full add.s32 %1, %1, 1;\n"
        " @between add.f32 %2, %2, difference;\n"
        "}"
        : "+r"(positive), "+r"(saturated), "+f"(sum)
        : "f"(u), "f"(zero), "f"(one), "f"(kth));
  }

  // Adds u - on_grid(kth). u is split at a grid of 2^-12: the coarse part's sums are exact for
  // kExactAdds scores (they span at most 2), and the fine part's errors lie far below an ulp.
  static constexpr int kExactAdds = 1024;
  __device__ static float on_grid(float u) { return __fsub_rn(__fadd_rn(u, 0x1.8p11f), 0x1.8p11f); }
  __device__ void add_exactly(float u, float zero, float one, float kth_on_grid) {
    float const coarse = on_grid(u);
    asm("{\n"
        " .reg .pred above, full, between;\n"
        " .reg .f32 difference, fine;\n"
        " setp.gt.f32 above, %4, %5;\n"
        " setp.gt.f32 full, %4, %6;\n"
        " setp.le.and.f32 between, %4, %6, above;\n"
        " sub.f32 difference, %7, %8;\n"
        " sub.f32 fine, %4, %7;\n"
        " @above add.s32 %0, %0, 1;\n"
        " @full add.s32 %1, %1, 1;\n"
        " @between add.f32 %2, %2, difference;\n"
        " @between add.f32 %3, %3, fine;\n"
        "}"
        : "+r"(positive), "+r"(saturated), "+f"(sum), "+f"(rest)
        : "f"(u), "f"(zero), "f"(one), "f"(coarse), "f"(kth_on_grid));
  }
};

// The stored threshold: sup{tau : sum_j clip(u_j - tau, 0, 1) >= k} over the (truncated) list,
// rounded down, below kth.
//
// With t = tau - kth in [-1, 0), the sum is a non-increasing, piecewise linear function of t:
// saturated + sum of the interior keys' (u_j - kth) - interior * t. Newton steps within a bracket;
// they end when a step falls on the piece that it came from, which is then the exact solution.
// `low`: a value that the threshold is known not to lie below; `guess`: where to begin, as t. The
// first two passes round as floats do; the later ones, with the one that decides, do not.
template <typename Team>
__device__ float solve_threshold(Team const& team, float const* scores, int count, int k, float kth,
                                 Truncation const& truncation, float low, double guess) {
  double const base = kth;
  double lowest = fmax(-1.0, static_cast<double>(low) - base);
  double highest = 0.0;
  double t = guess >= lowest && guess < highest ? guess : lowest;
  float const kth_on_grid = ClippedSum::on_grid(kth);
  int last_saturated = -1, last_interior = -1;
  for (int step = 0; step < 100; ++step) {
    bool const decides = step >= 2;
    // u - tau > 0 if and only if u > the largest float that is not above tau.
    float const zero = fmaxf(__double2float_rd(base + t), truncation.floor);
    float const one = fmaxf(__double2float_rd(base + t + 1.0), truncation.floor);
    ClippedSum share;
    double sum = 0.0;
    if (decides) {
      for (int first = 0; first < count; first += ClippedSum::kExactAdds * team.size()) {
        int const end = min(count, first + ClippedSum::kExactAdds * team.size());
        share.sum = share.rest = 0.0f;
#pragma unroll 4
        for (int i = first + team.rank(); i < end; i += team.size()) {
          share.add_exactly(scores[i], zero, one, kth_on_grid);
        }
        sum += static_cast<double>(share.sum) + share.rest;
      }
    } else {
#pragma unroll 4
      for (int i = team.rank(); i < count; i += team.size()) share.add(scores[i], zero, one, kth);
      sum = share.sum;
    }
    sum = team.sum(sum);
    int saturated = team.sum(share.saturated);
    int interior = team.sum(share.positive) - saturated;
    if (decides) sum += interior * (static_cast<double>(kth_on_grid) - base);
    if (truncation.num_at_floor > 0) {
      double const u = static_cast<double>(truncation.floor) - base;
      if (u > t + 1.0) {
        saturated += truncation.num_at_floor;
      } else if (u > t) {
        interior += truncation.num_at_floor;
        sum += truncation.num_at_floor * u;
      }
    }
    double const excess = saturated + sum - k;  // + (-interior * t): of the sum over k
    double next = interior > 0 ? excess / interior : 2.0;
    bool const same_piece = saturated == last_saturated && interior == last_interior;
    if (decides && (same_piece || next == t)) {
      if (same_piece && interior > 0) t = fmin(fmax(next, lowest), highest);
      break;
    }
    last_saturated = saturated, last_interior = interior;
    if (excess - interior * t >= 0.0) {
      lowest = t;
    } else {
      highest = t;
    }
    if (!(next >= lowest && next < highest)) {
      next = 0.5 * (lowest + highest);
      last_saturated = -1;  // a bisection step solves nothing: the next piece must be seen twice
      if (highest - lowest < 0x1p-44) {
        t = lowest;
        break;
      }
    }
    t = next;
  }
  return fminf(__double2float_rd(base + t), nextafterf(kth, -INFINITY));
}

}  // namespace sparsek::cuda::portable
