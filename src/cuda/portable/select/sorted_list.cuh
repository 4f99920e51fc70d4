// A block's candidate list, sorted by rank: larger scores first, equal scores: the smaller position
// first. New keys are inserted by sorting the list anew.
//
// The sort: keys are counted into bins that divide the range of their scores evenly, scattered to
// their bins, and ranked within them, which takes a few steps where bins hold a few keys, as they
// do for scores of any smooth distribution. Where scores crowd in a few bins, the keys are binned
// anew between quantiles of a sample; where even that fails (ties), the block sorts by
// compare-exchange steps. Lists that do not fit in shared memory are merged with the sorted new
// keys instead, so that a round costs no more than a few passes over the list however long it is.
#pragma once
#include <utility>

#include "cuda/portable/select/candidates.cuh"
#include "cuda/portable/select/plan.hpp"

namespace sparsek::cuda::portable {

// About one for each key of a round.
constexpr int sort_bins(int num_warps) { return num_warps == kWideWarps ? 4096 : 1024; }
inline constexpr int kSplitters = 32;  // one per lane
// Keys of a bin, at most: with evenly divided bins, and with bins between quantiles, where the next
// resort is the sorting network.
inline constexpr int kCrowdedBin = 24, kOverfullBin = 192;

struct SortedList {
  RankedKey* keys;
  int count;

  __device__ void pad() const {
    if (threadIdx.x < kListPadding) keys[count + threadIdx.x] = {-INFINITY, INT_MAX};
  }
};

template <int kWarps>
struct alignas(16) SortScratch {
  int counters[4 +
               sort_bins(
                   kWarps)];  // those of the bins, after a 0: where the one before them all ends
  int warp_totals[kWarps];
  int largest_bin;
  int num_new;
  // Bins between quantiles: interval i spans [edge[i + 1], edge[i]).
  float edge[kSplitters + 2], inverse_width[kSplitters + 1];

  __device__ int* bins() { return counters + 4; }
};

// Sorting network of any size: all exchanges put the better key first, so missing partners count as
// the worst.
template <int kThreads>
__device__ __noinline__ void sort_by_exchange(RankedKey* keys, int count) {
  auto const exchange = [&](int i, int j) {
    if (j >= count) return;
    RankedKey const a = keys[i], b = keys[j];
    if (ranks_after(a.score, a.position, b)) keys[i] = b, keys[j] = a;
  };
  for (int run = 2; run < 2 * count; run *= 2) {
    for (int pair = threadIdx.x; pair * 2 < count + run; pair += kThreads) {
      int const base = pair / (run / 2) * run, at = pair % (run / 2);
      exchange(base + at, base + run - 1 - at);
    }
    __syncthreads();
    for (int step = run / 4; step > 0; step /= 2) {
      for (int pair = threadIdx.x; pair * 2 < count + 2 * step; pair += kThreads) {
        int const at = pair / step * 2 * step + pair % step;
        exchange(at, at + step);
      }
      __syncthreads();
    }
  }
}

// Both functions below insert new keys into a sorted list: for_each_new(use) calls use(score,
// position) for every new key of the calling thread. They set list.count; all threads of the block
// call them. `spare` has room for a copy of the list; list.keys and `spare` may change places.

// Where the list is in global memory.
template <int kWarps, typename ForEachNew>
__device__ void merge_sorted(SortedList& list, RankedKey*& spare, SortScratch<kWarps>& scratch,
                             ForEachNew for_each_new) {
  constexpr int kThreads = kWarps * 32;
  int const old = list.count;
  if (threadIdx.x == 0) scratch.num_new = 0;
  __syncthreads();
  for_each_new([&](float u, int position) {
    list.keys[old + atomicAdd(&scratch.num_new, 1)] = {u, position};
  });
  __syncthreads();
  int const entering = scratch.num_new;
  sort_by_exchange<kThreads>(list.keys + old, entering);
  list.count = old + entering;
  for (int i = threadIdx.x; i < list.count; i += kThreads) {
    RankedKey const key = list.keys[i];
    // How many entries of the other part rank before it.
    int const first = i < old ? old : 0;
    int begin = first, end = i < old ? list.count : old;
    while (begin < end) {
      int const middle = (begin + end) / 2;
      if (ranks_after(key.score, key.position, list.keys[middle])) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    spare[i + begin - old] = key;
  }
  std::swap(list.keys, spare);
  list.pad();
  __syncthreads();
}

// Turns counts into where each bin begins. Returns their sum; the largest is in largest_bin.
template <int kWarps>
__device__ int scan_bins(SortScratch<kWarps>& scratch) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kEach = sort_bins(kWarps) / kThreads;  // bins of a thread
  static_assert(kEach * kThreads == sort_bins(kWarps));
  int const tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  int counts[kEach], total = 0, largest = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    counts[j] = scratch.bins()[tid * kEach + j];
    total += counts[j], largest = max(largest, counts[j]);
  }
  int inclusive = total;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int const other = __shfl_up_sync(~0u, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  largest = __reduce_max_sync(~0u, static_cast<unsigned>(largest));
  if (lane == 31) scratch.warp_totals[warp] = inclusive;
  if (lane == 0) atomicMax(&scratch.largest_bin, largest);
  __syncthreads();
  int before = inclusive - total, sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch.warp_totals[w];
    sum += scratch.warp_totals[w];
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    scratch.bins()[tid * kEach + j] = before;
    before += counts[j];
  }
  __syncthreads();
  return sum;
}

template <int kWarps>
__device__ void clear_bins(SortScratch<kWarps>& scratch) {
  for (int i = threadIdx.x; i < sort_bins(kWarps); i += kWarps * 32) scratch.bins()[i] = 0;
  if (threadIdx.x == 0) scratch.bins()[-1] = 0, scratch.largest_bin = 0;
}

// Ranks the keys of `from`, which lie in their bins (bins[] holds where each ends), into `to`.
template <int kWarps, typename BinOf>
__device__ void rank_in_bins(RankedKey const* from, RankedKey* to, int count,
                             SortScratch<kWarps>& scratch, BinOf bin_of) {
  for (int i = threadIdx.x; i < count; i += kWarps * 32) {
    RankedKey const key = from[i];
    int const* const end_of = scratch.bins() + bin_of(key.score);
    int const begin = end_of[-1], end = end_of[0];
    int at = begin, no_worse = 0;
    if (end - begin > 1) {
      for (int j = begin; j < end; ++j) {
        float const other = from[j].score;
        at += other > key.score, no_worse += other >= key.score;
      }
      if (no_worse > at - begin + 1) {  // equal scores
        for (int j = begin; j < end; ++j) {
          at += from[j].score == key.score && from[j].position < key.position;
        }
      }
    }
    to[at] = key;
  }
}

// Places `score`, of which the bins begin where bins[] says, and returns the bin's next place.
template <int kWarps>
__device__ int place_in(SortScratch<kWarps>& scratch, int bin) {
  return atomicAdd(&scratch.bins()[bin], 1);
}

// The second try: `keys` holds all keys, ordered by the evenly divided bins, so that every
// count/32-th is nearly a quantile. Sorts into `keys` again, through `spare`.
template <int kWarps>
__device__ __noinline__ void sort_between_quantiles(RankedKey* keys, RankedKey* spare, int count,
                                                    float low, float high,
                                                    SortScratch<kWarps>& scratch) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kBinsEach = sort_bins(kWarps) / (kSplitters + 1);
  int const tid = threadIdx.x, lane = tid % 32;
  clear_bins(scratch);
  if (tid < 32) {
    float splitter = keys[static_cast<int>((std::int64_t{2 * lane + 1} * count) / 64)].score;
    for (int run = 2; run <= 32; run *= 2) {  // descending over lanes
      for (int step = run / 2; step > 0; step /= 2) {
        float const other = __shfl_xor_sync(~0u, splitter, step);
        bool const keeps_larger = ((lane & step) == 0) == ((lane & run) == 0);
        splitter = keeps_larger ? fmaxf(splitter, other) : fminf(splitter, other);
      }
    }
    scratch.edge[lane + 1] = splitter;
    if (lane == 0) scratch.edge[0] = high, scratch.edge[kSplitters + 1] = low;
    __syncwarp();
    for (int i = lane; i <= kSplitters; i += 32) {
      float const width = scratch.edge[i] - scratch.edge[i + 1];
      scratch.inverse_width[i] = width > 0.0f ? 1.0f / width : 0.0f;
    }
  }
  __syncthreads();
  auto const bin_of = [&](float u) {
    int interval = 0;  // the number of splitters above u
#pragma unroll
    for (int step = 32; step > 0; step /= 2) {
      if (interval + step <= kSplitters && scratch.edge[interval + step] > u) interval += step;
    }
    float const part = __saturatef((scratch.edge[interval] - u) * scratch.inverse_width[interval]);
    return interval * kBinsEach + static_cast<int>(part * (kBinsEach - 1));
  };
  for (int i = tid; i < count; i += kThreads) atomicAdd(&scratch.bins()[bin_of(keys[i].score)], 1);
  __syncthreads();
  scan_bins(scratch);
  if (scratch.largest_bin > kOverfullBin) {
    sort_by_exchange<kThreads>(keys, count);
    return;
  }
  for (int i = tid; i < count; i += kThreads) {
    RankedKey const key = keys[i];
    spare[place_in(scratch, bin_of(key.score))] = key;
  }
  __syncthreads();
  rank_in_bins(spare, keys, count, scratch, bin_of);
  __syncthreads();
}

// Where it is in shared memory. Every score lies in [low, high].
template <int kWarps, typename ForEachNew>
__device__ void insert_sorted(SortedList& list, RankedKey*& spare, float low, float high,
                              SortScratch<kWarps>& scratch, ForEachNew for_each_new) {
  constexpr int kThreads = kWarps * 32, kBins = sort_bins(kWarps);
  int const tid = threadIdx.x, old = list.count;
  float const inverse_range = high > low ? 1.0f / (high - low) : 0.0f;
  auto const bin_of = [&](float u) {
    // NOTE: every step is monotone, so bins never swap keys; saturation makes 0 of NaN. The sum's
    // last bits are the product rounded to an integer, which saves a slow conversion.
    float const part = __saturatef((high - u) * inverse_range);
    return __float_as_int(fmaf(part, kBins - 1, 0x1p23f)) - __float_as_int(0x1p23f);
  };
  clear_bins(scratch);
  __syncthreads();
  for (int i = tid; i < old; i += kThreads)
    atomicAdd(&scratch.bins()[bin_of(list.keys[i].score)], 1);
  for_each_new([&](float u, int) { atomicAdd(&scratch.bins()[bin_of(u)], 1); });
  __syncthreads();
  list.count = scan_bins(scratch);
  bool const crowded = scratch.largest_bin > kCrowdedBin;
  for (int i = tid; i < old; i += kThreads) {
    RankedKey const key = list.keys[i];
    spare[place_in(scratch, bin_of(key.score))] = key;
  }
  for_each_new([&](float u, int position) { spare[place_in(scratch, bin_of(u))] = {u, position}; });
  __syncthreads();
  if (crowded) {
    std::swap(list.keys, spare);
    sort_between_quantiles(list.keys, spare, list.count, low, high, scratch);
  } else {
    rank_in_bins(spare, list.keys, list.count, scratch, bin_of);
  }
  list.pad();
  __syncthreads();
}

}  // namespace sparsek::cuda::portable
