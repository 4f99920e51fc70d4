// A block's candidate list, sorted by rank: larger scores first, equal scores: the smaller position
// first. New keys are inserted by sorting the list anew.
//
// The sort: keys are counted into bins that divide the range of their scores evenly, scattered to
// their bins, and ranked within them, which takes a few steps where bins hold a few keys, as they
// do for scores of any smooth distribution. Where a bin overflows (ties, clusters, outliers), the
// block sorts by compare-exchange steps instead. Lists that do not fit in shared memory are merged
// with the sorted new keys, so that a round costs no more than a few passes over the list however
// long it is.
#pragma once
#include "cuda/portable/select/candidates.cuh"
#include "cuda/portable/select/plan.hpp"

namespace sparsek::cuda::portable {

inline constexpr int kSortBins = 2048;

struct SortedList {
  float* scores;
  int* positions;
  int count;
};

template <int kWarps>
struct alignas(16) SortScratch {
  unsigned
      bins[kSortBins / 2];  // two counters each: lists in shared memory are shorter than 65 536
  int warp_totals[kWarps];
  int largest_bin;
  int num_new;
};

// The position of the rank-th (1-based) set bit of a mask that has at least as many.
__device__ inline int nth_bit(unsigned mask, int rank) {
  int const lane = threadIdx.x % 32;
  bool const mine = (mask >> lane & 1) && __popc(mask & ((1u << lane) - 1)) == rank - 1;
  return __ffs(__ballot_sync(~0u, mine)) - 1;
}

// Sorting network of any size: all exchanges put the better key first, so missing partners count as
// the worst.
template <int kThreads>
__device__ __noinline__ void sort_by_exchange(SortedList list) {
  auto const exchange = [&](int i, int j) {
    if (j >= list.count) return;
    RankedKey const a{list.scores[i], list.positions[i]}, b{list.scores[j], list.positions[j]};
    if (ranks_after(a.score, a.position, b)) {
      list.scores[i] = b.score, list.positions[i] = b.position;
      list.scores[j] = a.score, list.positions[j] = a.position;
    }
  };
  for (int run = 2; run < 2 * list.count; run *= 2) {
    for (int pair = threadIdx.x; pair * 2 < list.count + run; pair += kThreads) {
      int const base = pair / (run / 2) * run, at = pair % (run / 2);
      exchange(base + at, base + run - 1 - at);
    }
    __syncthreads();
    for (int step = run / 4; step > 0; step /= 2) {
      for (int pair = threadIdx.x; pair * 2 < list.count + 2 * step; pair += kThreads) {
        int const at = pair / step * 2 * step + pair % step;
        exchange(at, at + step);
      }
      __syncthreads();
    }
  }
}

// use(score, position) for every key that load(i, score, position) lets through, i = 0 ... count -
// 1. A few are loaded together, so that their latencies overlap.
template <int kThreads, typename Load, typename Use>
__device__ void for_each_batch(int count, Load load, Use use) {
  constexpr int kBatch = 4;
  for (int base = threadIdx.x; base < count; base += kBatch * kThreads) {
    float u[kBatch];
    int position[kBatch];
    bool enters[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      int const i = base + j * kThreads;
      enters[j] = i < count && load(i, u[j], position[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (enters[j]) use(u[j], position[j]);
    }
  }
}

// Both functions below make the list of its first `old` entries, sorted, and the new keys: load(i,
// score, position) for i = 0 ... num_new - 1 says which of them enter. They set list.count; all
// threads of the block call them. `spare` has room for a copy of the list, and of its first `old`
// entries, respectively.

// Where the list is in global memory.
template <int kWarps, typename Load>
__device__ void merge_sorted(SortedList& list, int old, int num_new, float* spare_scores,
                             int* spare_positions, SortScratch<kWarps>& scratch, Load load) {
  constexpr int kThreads = kWarps * 32;
  if (threadIdx.x == 0) scratch.num_new = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < num_new; i += kThreads) {
    float u;
    int position;
    if (load(i, u, position)) {
      int const at = old + atomicAdd(&scratch.num_new, 1);
      list.scores[at] = u, list.positions[at] = position;
    }
  }
  __syncthreads();
  int const entering = scratch.num_new;
  sort_by_exchange<kThreads>({list.scores + old, list.positions + old, entering});
  list.count = old + entering;
  for (int i = threadIdx.x; i < list.count; i += kThreads) {
    spare_scores[i] = list.scores[i], spare_positions[i] = list.positions[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < list.count; i += kThreads) {
    float const u = spare_scores[i];
    int const position = spare_positions[i];
    // How many entries of the other part rank before it.
    int const first = i < old ? old : 0;
    int begin = first, end = i < old ? list.count : old;
    while (begin < end) {
      int const middle = (begin + end) / 2;
      if (ranks_after(u, position, {spare_scores[middle], spare_positions[middle]})) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    int const at = i + begin - old;
    list.scores[at] = u, list.positions[at] = position;
  }
  __syncthreads();
}

// Where it is in shared memory. Every score lies in [low, high].
template <int kWarps, typename Load>
__device__ void insert_sorted(SortedList& list, int old, int num_new, float low, float high,
                              float* spare_scores, int* spare_positions,
                              SortScratch<kWarps>& scratch, Load load) {
  constexpr int kThreads = kWarps * 32;
  int const tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  float const scale = high > low ? kSortBins / (high - low) : 0.0f;
  auto const bin_of = [&](float u) {
    return min(static_cast<int>((high - u) * scale), kSortBins - 1);
  };
  auto const half_of = [](int bin) { return 16 * (bin & 1); };

  for (int i = tid; i < kSortBins / 2; i += kThreads) scratch.bins[i] = 0;
  if (tid == 0) scratch.largest_bin = 0;
  float carried_score[kCarriedPerThread];
  int carried_position[kCarriedPerThread];
  bool const spare = old > kCarriedPerThread * kThreads;
#pragma unroll
  for (int j = 0; j < kCarriedPerThread; ++j) {
    int const i = j * kThreads + tid;
    if (i < old && !spare)
      carried_score[j] = list.scores[i], carried_position[j] = list.positions[i];
  }
  for (int i = tid; spare && i < old; i += kThreads) {
    spare_scores[i] = list.scores[i], spare_positions[i] = list.positions[i];
  }
  __syncthreads();

  auto const count = [&](float u) {
    int const bin = bin_of(u);
    atomicAdd(&scratch.bins[bin >> 1], 1u << half_of(bin));
  };
#pragma unroll
  for (int j = 0; j < kCarriedPerThread; ++j) {
    if (j * kThreads + tid < old && !spare) count(carried_score[j]);
  }
  for (int i = tid; spare && i < old; i += kThreads) count(spare_scores[i]);
  for_each_batch<kThreads>(num_new, load, [&](float u, int) { count(u); });
  __syncthreads();

  // Exclusive prefix sums, each thread over its own bins.
  constexpr int kWords = kSortBins / 2 / kThreads > 0 ? kSortBins / 2 / kThreads : 1;
  unsigned words[kWords];
  int total = 0, largest = 0;
  bool const has_words = tid * kWords < kSortBins / 2;
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    words[j] = has_words ? scratch.bins[tid * kWords + j] : 0;
    int const first = words[j] & 0xffff, second = words[j] >> 16;
    total += first + second;
    largest = max(largest, max(first, second));
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
  int before = inclusive - total;
  list.count = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch.warp_totals[w];
    list.count += scratch.warp_totals[w];
  }
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    unsigned const first = words[j] & 0xffff, second = words[j] >> 16;
    if (has_words) scratch.bins[tid * kWords + j] = before | (before + first) << 16;
    before += first + second;
  }
  __syncthreads();

  auto const place = [&](float u, int position) {
    int const bin = bin_of(u);
    int const at = atomicAdd(&scratch.bins[bin >> 1], 1u << half_of(bin)) >> half_of(bin) & 0xffff;
    list.scores[at] = u, list.positions[at] = position;
  };
#pragma unroll
  for (int j = 0; j < kCarriedPerThread; ++j) {
    if (j * kThreads + tid < old && !spare) place(carried_score[j], carried_position[j]);
  }
  for (int i = tid; spare && i < old; i += kThreads) place(spare_scores[i], spare_positions[i]);
  for_each_batch<kThreads>(num_new, load, place);
  __syncthreads();

  // Now a bin's counter holds its end.
  if (scratch.largest_bin > 32) {
    sort_by_exchange<kThreads>(list);
    return;
  }
  auto const bin_end = [&](int bin) {
    return static_cast<int>(scratch.bins[bin >> 1] >> half_of(bin) & 0xffff);
  };
  auto const bin_begin = [&](int bin) { return bin == 0 ? 0 : bin_end(bin - 1); };
  // Each warp ranks the entries of whole bins.
  auto const share_begin = [&](int w) {
    int const at = list.count * w / kWarps;
    return at < list.count ? bin_begin(bin_of(list.scores[at])) : list.count;
  };
  int const begin = share_begin(warp), end = share_begin(warp + 1);
  __syncthreads();  // every warp has read its bounds
  for (int first = begin; first < end;) {
    int const i = first + lane;
    float u = 0.0f;
    int position = 0, from = 0, size = 0;
    if (i < end) {
      u = list.scores[i], position = list.positions[i];
      int const bin = bin_of(u);
      from = bin_begin(bin), size = bin_end(bin) - from;
    }
    // Bins that do not lie wholly within these 32 entries are left for the next step.
    bool const whole = i < end && from + size <= first + 32;
    int const next = first + __popc(__ballot_sync(~0u, whole));
    if (!whole) size = 0;
    int const steps = __reduce_max_sync(~0u, static_cast<unsigned>(size));
    int const start = from - first;
    int better = 0, no_worse = 0;
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
      float const other = __shfl_sync(~0u, u, start + step);
      if (step < size) better += other > u, no_worse += other >= u;
    }
    if (__any_sync(~0u, no_worse > better + 1)) {  // equal scores
      for (int step = 0; step < steps; ++step) {
        float const other = __shfl_sync(~0u, u, start + step);
        int const other_position = __shfl_sync(~0u, position, start + step);
        better += step < size && other == u && other_position < position;
      }
    }
    if (whole && size > 1) list.scores[from + better] = u, list.positions[from + better] = position;
    first = next;
  }
  __syncthreads();
}

}  // namespace sparsek::cuda::portable
