// The state of every chunk's pool: its k-th ranked key, its threshold and its last candidate; and
// from the k-th keys, when each key expires.
//
// A block streams one row (or a segment of it) in rounds of a few marks (geometry.cuh). It keeps a
// list of the keys that can still matter, sorted by rank: since thresholds never fall, those above
// the last threshold, and of these at most num_candidates. A round
//   1. inserts its keys that lie above the last threshold (sorted_list.cuh); the others are dropped
//      by the first chunk whose pool holds them,
//   2. computes the states of its marks, a run of marks by each warp (walk.cuh), and where chunks
//      are short also those of the chunks between (short_chunks.cuh),
//   3. cuts the list off where keys no longer matter. Warps work independently in step 2.
//
// A key expires at the first chunk whose pool holds it and whose k-th key ranks before it. K-th
// keys only rise, so in the sorted list that is a comparison of places.
//
// Few long rows: each row is cut into segments, one block each. A block needs the candidates of
// everything before its segment, and candidates of a union are candidates of its parts. So (a) each
// segment, then (b) each group of segments is condensed to its candidates, and (c) a block starts
// from the lists of the groups and segments before it.
#include <algorithm>
#include <cstddef>

#include "cuda/portable/select/candidates.cuh"
#include "cuda/portable/select/plan.hpp"
#include "cuda/portable/select/short_chunks.cuh"
#include "cuda/portable/select/sorted_list.cuh"
#include "cuda/portable/select/state.cuh"
#include "cuda/portable/select/walk.cuh"

namespace sparsek::cuda::portable {
namespace {

constexpr int kCondenseThreads = 512;
constexpr int kManyCandidates = 2048;  // of a segment or a group
constexpr int kPerThread = 4;          // keys that a thread moves per tile of a compaction

// Appends the keys that load(i, score, position) lets through, i = 0 ... count - 1, in this order,
// at list[size ...], and returns the new size. Ends with its writes not yet visible to other
// threads. NOTE: works in place: a tile is read before its barrier and written after it, no further
// than it was read.
template <int kWarps>
struct Compaction {
  int tile_counts[2][kWarps];

  template <typename Load>
  __device__ int append(int count, int size, float* list_scores, int* list_positions, int& parity,
                        Load load) {
    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int base = 0; base < count; base += kWarps * 32 * kPerThread) {
      float score[kPerThread];
      int position[kPerThread];
      unsigned kept[kPerThread];
      int total = 0;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        int const i = base + (warp * kPerThread + j) * 32 + lane;
        bool keep = false;
        if (i < count) keep = load(i, score[j], position[j]);
        kept[j] = __ballot_sync(~0u, keep);
        total += __popc(kept[j]);
      }
      parity ^= 1;
      if (lane == 0) tile_counts[parity][warp] = total;
      __syncthreads();
      int at = size;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        int const of_warp = tile_counts[parity][w];
        if (w < warp) at += of_warp;
        size += of_warp;
      }
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        int const mine = at + __popc(kept[j] & ((1u << lane) - 1));
        if (kept[j] >> lane & 1) {
          list_scores[mine] = score[j];
          list_positions[mine] = position[j];
        }
        at += __popc(kept[j]);
      }
    }
    return size;
  }
};

// The least and the largest score of a list.
template <typename Team>
__device__ void range_of(Team const& team, float const* scores, int count, float& low,
                         float& high) {
  unsigned least = ~0u, largest = 0u;
  for (int i = team.rank(); i < count; i += team.size()) {
    unsigned const key = ordered(scores[i]);
    least = min(least, key), largest = max(largest, key);
  }
  least = team.min(least), largest = team.max(largest);
  low = unordered(least), high = unordered(largest);
}

// The largest of the lanes up to each.
__device__ inline float prefix_max(float x) {
  int const lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float const other = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x = fmaxf(x, other);
  }
  return x;
}

// The marks of a segment: [first, end). Its keys: [pool_end(first - 1), pool_end(end - 1)).
struct Segment {
  int first, end;

  __device__ Segment(Marks const& marks, int segment, int num_segments) {
    int const each = ceil_div(marks.count, num_segments);
    first = 1 + last_before(marks, segment, each);
    end = 1 + last_before(marks, segment + 1, each);
  }

 private:
  // The last mark before a segment. Each segment's last mark completes a chunk.
  __device__ static int last_before(Marks const& marks, int segment, int each) {
    std::int64_t const mark = std::int64_t{segment} * each;
    if (mark >= marks.count) return marks.count;
    int const at = static_cast<int>(mark);
    return max(at - (marks.first + at) % marks.per_chunk, 0);
  }
};

template <int kWarps>
struct StatesShared {
  SortScratch<kWarps> sort;
  // Of the chunks that the round completes, where chunks are not short.
  float thresholds[max_round_marks(kWarps)];
  int kth[max_round_marks(kWarps)];
  // Of the last mark.
  State state;
  int last_kth;
  int size;  // of the list that the next round starts with
  float running;
  unsigned least, largest;  // ordered scores of the round's keys that matter ...
  int kept;                 // ... and their number
};

// Where the keys of the round stand in the list, and the thresholds of the round's chunks where
// these are short. They lie where the list is sorted, or on their own where that is in global
// memory.
constexpr std::size_t round_bytes(int num_warps) {
  return round_keys(num_warps) * (sizeof(int) + sizeof(float));
}

template <int kWarps, bool kSharedList, bool kShort>
__global__ void __launch_bounds__(kWarps * 32, side_by_side(kWarps))
    states_kernel(SelectProblem p, SelectPlan plan, SelectWorkspace w) {
  constexpr int kThreads = kWarps * 32, kKeys = keys_per_thread(kWarps);
  extern __shared__ __align__(16) std::byte shared_memory[];
  auto& shared = *reinterpret_cast<StatesShared<kWarps>*>(shared_memory);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const row = blockIdx.x / plan.num_segments, segment_index = blockIdx.x % plan.num_segments;
  Row const r = row_of(p, row);
  Marks const marks(p.chunk_size, p.window, r.used_chunks);
  Segment const segment(marks, segment_index, plan.num_segments);
  Config const config(p, r);

  // Behind the shared struct: the list, and room for sorting it.
  std::byte* const behind = shared_memory + sizeof(StatesShared<kWarps>);
  std::size_t const capacity = padded(plan.list_capacity);
  SortedList list{
      kSharedList ? reinterpret_cast<RankedKey*>(behind) : w.list + blockIdx.x * capacity, 0};
  RankedKey* spare = kSharedList ? list.keys + capacity : w.spare + blockIdx.x * capacity;

  auto const chunk_size = static_cast<unsigned>(p.chunk_size);
  float* const thresholds = static_cast<float*>(p.threshold) + r.chunks;
  std::int32_t* const last_candidate = p.last_candidate ? p.last_candidate + r.chunks : nullptr;
  int* const expiry = p.expiry + r.expiry;
  if (segment_index == 0) {
    // Chunks whose pool is empty, and chunks that start behind the last key.
    int const first_chunk = min(marks.first_chunk(), r.used_chunks);
    for (int c = threadIdx.x; c < r.num_chunks; c += kThreads) {
      bool const settled = c < first_chunk || c >= r.used_chunks;
      if (settled) thresholds[c] = c < first_chunk ? -INFINITY : INFINITY;
      if (last_candidate && (settled || !config.rank_candidates)) last_candidate[c] = -1;
    }
  }
  bool const is_last = marks.count == 0 ? segment_index == 0
                                        : segment.first < segment.end && segment.end > marks.count;
  if (is_last) {
    // Keys in nobody's pool, and keys that do not exist.
    for (int j = marks.pool_end(marks.count) + threadIdx.x; j < r.num_keys; j += kThreads) {
      expiry[j] = j < r.valid ? r.valid : j;
    }
  }
  if (segment.first >= segment.end) return;

  State state;
  RankedKey dropped{-INFINITY,
                    INT_MAX};  // the last chunk's k-th key: old keys after it are expired
  float guess = -0.5f;
  float running = -INFINITY;
  auto const insert = [&](float low, float high, auto&& for_each_new) {
    if constexpr (kSharedList) {
      insert_sorted(list, spare, low, high, shared.sort, for_each_new);
    } else {
      merge_sorted(list, spare, shared.sort, for_each_new);
    }
  };

  if constexpr (kWarps == kWideWarps) {
    if (segment_index > 0) {
      // Gather the candidates of everything before, then keep those of the union.
      float* const start_scores = w.start_score + std::int64_t{blockIdx.x} * plan.start_capacity;
      int* const start_positions =
          w.start_position + std::int64_t{blockIdx.x} * plan.start_capacity;
      int gathered = 0;
      auto const gather = [&](float const* from_scores, int const* from_positions, int count) {
        for (int i = threadIdx.x; i < count; i += kThreads) {
          start_scores[gathered + i] = from_scores[i];
          start_positions[gathered + i] = from_positions[i];
        }
        gathered += count;
      };
      int const group = segment_index / plan.group_size;
      for (int g = 0; g < group; ++g) {
        Segment const s(marks, g * plan.group_size, plan.num_segments);
        std::int64_t const at = r.expiry + marks.pool_end(s.first - 1);
        gather(w.group_score + at, w.group_position + at, w.group_count[row * plan.num_groups + g]);
      }
      for (int g = group * plan.group_size; g < segment_index; ++g) {
        Segment const s(marks, g, plan.num_segments);
        std::int64_t const at = r.expiry + marks.pool_end(s.first - 1);
        gather(w.segment_score + at, w.segment_position + at,
               w.segment_count[row * plan.num_segments + g]);
      }
      __syncthreads();
      using Team = BlockTeam<kThreads>;  // works where the bins will be
      static_assert(sizeof(typename Team::Exchange) <= sizeof(shared.sort.counters));
      Team const team(reinterpret_cast<typename Team::Exchange*>(shared.sort.counters));
      float low, high;
      range_of(team, start_scores, gathered, low, high);
      // Nothing is left out where there is room for all.
      int const pool = marks.pool_end(segment.first - 1);
      if (gathered > plan.list_capacity) {
        state = state_of(team, config, start_scores, start_positions, gathered, pool, State{}, low,
                         high, guess);
        low = fmaxf(low, Filter(config, state).floor);
      }
      Filter const filter(config, state);
      __syncthreads();
      insert(low, high, [&](auto&& use) {
        for (int i = threadIdx.x; i < gathered; i += kThreads) {
          float const u = start_scores[i];
          if (filter.keeps(u, start_positions[i])) use(u, start_positions[i]);
        }
      });
      if (warp == 0) {
        PoolWalker walker(config, list, guess);
        walker.settle(pool);
        if (lane == 0) shared.state = walker.state(), shared.size = walker.num_that_matter();
      }
      __syncthreads();
      state = shared.state;
      list.count = shared.size;
      running = state.threshold;
      if (running > -INFINITY) guess = running - state.kth.score;
      dropped = state.kth;
    }
  }

  if (threadIdx.x == 0) shared.least = ~0u, shared.largest = 0u, shared.kept = 0;
  __syncthreads();
  for (int first = segment.first; first < segment.end;) {
    int const round_marks = min(plan.round_marks, segment.end - first);
    int const begin = marks.pool_end(first - 1);
    int const num_new = marks.pool_end(first + round_marks - 1) - begin;
    int const chunk_base = marks.chunk(first - 1) + 1;
    int const round_chunks = marks.chunk(first + round_marks - 1) + 1 - chunk_base;

    // Each thread holds its keys of the round: i * kThreads + thread.
    // Later than all before: equal to the floor is not enough.
    float const floor = Filter(config, state).floor;
    float u[kKeys];
    {
      float const* next_score = r.scores + (begin + static_cast<int>(threadIdx.x)) * r.stride;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        bool const exists = i * kThreads + static_cast<int>(threadIdx.x) < num_new;
        u[i] = exists ? sanitized(*next_score) : -INFINITY;
        next_score += kThreads * r.stride;
      }
    }
    float lowest = INFINITY, highest = -INFINITY;
    int kept = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (u[i] > floor) lowest = fminf(lowest, u[i]), highest = fmaxf(highest, u[i]), ++kept;
    }
    if (floor > -INFINITY) {
      // The first chunk whose pool holds key j is (j + w) / C + 1: divided once, then stepped.
      unsigned const shifted = begin + threadIdx.x + static_cast<unsigned>(p.window);
      unsigned chunk = shifted / chunk_size + 1, rest = shifted % chunk_size;
      unsigned const step_chunks = kThreads / chunk_size, step_rest = kThreads % chunk_size;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        int const j = i * kThreads + static_cast<int>(threadIdx.x);
        if (j < num_new && !(u[i] > floor))
          expiry[begin + j] = static_cast<int>(chunk * chunk_size);
        chunk += step_chunks, rest += step_rest;
        if (rest >= chunk_size) ++chunk, rest -= chunk_size;
      }
    }
    unsigned const least = __reduce_min_sync(~0u, lowest < INFINITY ? ordered(lowest) : ~0u);
    unsigned const largest = __reduce_max_sync(~0u, highest > -INFINITY ? ordered(highest) : 0u);
    kept = __reduce_add_sync(~0u, kept);
    if (lane == 0) {
      atomicMin(&shared.least, least);
      atomicMax(&shared.largest, largest);
      atomicAdd(&shared.kept, kept);
    }
    __syncthreads();
    if (shared.kept > 0) {
      float low = unordered(shared.least), high = unordered(shared.largest);
      if (list.count > 0) {
        low = fminf(low, list.keys[list.count - 1].score);
        high = fmaxf(high, list.keys[0].score);
      }
      insert(low, high, [&](auto&& use) {
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          if (u[i] > floor) use(u[i], begin + i * kThreads + static_cast<int>(threadIdx.x));
        }
      });
    } else {
      list.pad();
      __syncthreads();
    }

    // NOTE: where the list is sorted in shared memory, that room is free until the next round.
    int* const entry_of =
        reinterpret_cast<int*>(kSharedList ? reinterpret_cast<std::byte*>(spare) : behind);
    float* const short_thresholds = reinterpret_cast<float*>(entry_of + round_keys(kWarps));
    bool const short_chunks = kShort && marks.chunks_per_mark > 1;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (!(u[i] > floor))
        entry_of[i * kThreads + static_cast<int>(threadIdx.x)] = PoolWalker::kNone;
    }
    for (int i = threadIdx.x; i < list.count; i += kThreads) {
      int const position = list.keys[i].position;
      if (position >= begin) entry_of[position - begin] = i;
    }
    if (short_chunks) {
      for (int c = threadIdx.x; c < round_chunks; c += kThreads) {
        short_thresholds[c] = -INFINITY;  // of empty pools
      }
    }
    __syncthreads();
    {
      PoolWalker walker(config, list, guess);
      int const mine = first + round_marks * warp / kWarps;
      int const end = first + round_marks * (warp + 1) / kWarps;
      bool ends_round = end == first + round_marks && mine < end;
      if (short_chunks) {
        // NOTE: the more keys have been seen, the fewer of the next ones change a state. Equal
        // ratios of pools are about equal work.
        int const least_pool = min(max(begin, config.k), begin + num_new);
        float const ratio = __log2f(static_cast<float>(begin + num_new) / max(least_pool, 1));
        auto const boundary = [&](int w) {
          if (w == 0 || w == kWarps) return w == 0 ? begin : begin + num_new;
          float const pool = least_pool * exp2f(ratio * w / kWarps);
          return min(begin + (static_cast<int>(pool) - begin + 31) / 32 * 32, begin + num_new);
        };
        int const from = boundary(warp), to = boundary(warp + 1);
        ShortChunks const chunks{p,
                                 r,
                                 list,
                                 entry_of,
                                 short_thresholds,
                                 begin,
                                 chunk_base,
                                 config.rank_candidates ? last_candidate : nullptr};
        if (from < to) chunks.walk(walker, from, to);
        ends_round = from < to && to == begin + num_new;
      } else {
        for (int mark = mine; mark < end; ++mark) {
          int const before = marks.pool_end(mark - 1), pool = marks.pool_end(mark);
          walker.move_to(pool, running, mark > mine, pool - before, entry_of + (before - begin));
          if (lane == 0 && marks.completes_chunk(mark)) {
            int const at = marks.chunk(mark) - chunk_base;
            State const here = walker.state();
            shared.thresholds[at] = here.threshold;
            shared.kth[at] = walker.kth();
            if (config.rank_candidates) {
              last_candidate[chunk_base + at] =
                  here.cut.position == INT_MAX ? -1 : here.cut.position;
            }
          }
        }
      }
      if (lane == 0 && ends_round) {
        shared.state = walker.state();
        shared.last_kth = walker.kth();
        shared.size = walker.num_that_matter();
      }
    }
    __syncthreads();
    state = shared.state;

    // Expiry of what the round's chunks drop, and of what nobody does.
    bool const ends_row = is_last && first + round_marks == segment.end;
    if (!short_chunks) {
      // The last chunk's pool before the round, or where it would end.
      auto const pool_before = static_cast<int>((chunk_base - 1) * p.chunk_size - p.window);
      float const per_key = 1.0f / static_cast<float>(chunk_size);
      for (int i = threadIdx.x; i < list.count; i += kThreads) {
        RankedKey const key = list.keys[i];
        bool const is_old = key.position < pool_before;
        if (is_old && ranks_after(key.score, key.position, dropped)) continue;
        // The first of them that drops it: whose k-th key stands before it and whose pool holds it.
        int chunk = 0;
#pragma unroll
        for (int step = max_round_marks(kWarps); step > 0; step /= 2) {
          if (chunk + step <= round_chunks && shared.kth[chunk + step - 1] >= i) chunk += step;
        }
        if (!is_old) {
          // NOTE: exact, since a round has few keys; one chunk is enough to tell where C is large.
          int const in_chunks = key.position - pool_before;
          int const first_pool = chunk_size > round_keys(kWarps)
                                     ? in_chunks >= static_cast<int>(chunk_size)
                                     : static_cast<int>((in_chunks + 0.5f) * per_key);
          chunk = max(chunk, first_pool);
        }
        chunk += chunk_base;
        if (chunk < chunk_base + round_chunks) {
          expiry[key.position] = chunk * static_cast<int>(chunk_size);
        } else if (ends_row) {
          expiry[key.position] = r.valid;
        } else if (i >= shared.size) {  // by the chunk that the next rounds complete
          expiry[key.position] = (chunk_base + round_chunks) * static_cast<int>(chunk_size);
        }
      }
      if (round_chunks > 0) {
        int const last = shared.kth[round_chunks - 1];
        if (last < 0) dropped = {INFINITY, -1};
        if (last >= 0 && last != PoolWalker::kNone) dropped = list.keys[last];
      }
    } else if (ends_row) {
      int const kept_end = min(shared.last_kth, list.count - 1);
      for (int i = threadIdx.x; i <= kept_end; i += kThreads)
        expiry[list.keys[i].position] = r.valid;
    }

    // Stored thresholds never fall, although rounding may differ from chunk to chunk.
    float* const computed = short_chunks ? short_thresholds : shared.thresholds;
    if (short_chunks) {  // many of them: by all warps, 32 at a time, then across these
      for (int i = threadIdx.x; i - lane < round_chunks; i += kThreads) {
        float const highest = prefix_max(i < round_chunks ? computed[i] : -INFINITY);
        if (i < round_chunks) computed[i] = highest;
      }
      __syncthreads();
    }
    for (int base = warp * 32; base < round_chunks; base += kThreads) {
      float before = running;
      for (int i = 32 * lane + 31; i < base; i += 32 * 32) before = fmaxf(before, computed[i]);
      before = __shfl_sync(~0u, prefix_max(before), 31);
      float highest = base + lane < round_chunks ? computed[base + lane] : -INFINITY;
      if (!short_chunks) highest = prefix_max(highest);
      highest = fmaxf(highest, before);
      if (base + lane < round_chunks) thresholds[chunk_base + base + lane] = highest;
      if (base + lane == round_chunks - 1) shared.running = fmaxf(highest, state.threshold);
    }
    if (threadIdx.x == 0) {
      if (round_chunks == 0) shared.running = fmaxf(running, state.threshold);
      shared.least = ~0u, shared.largest = 0u, shared.kept = 0;
    }
    if (state.threshold > -INFINITY) guess = state.threshold - state.kth.score;
    __syncthreads();
    running = shared.running;
    state.threshold = running;
    list.count = shared.size;
    first += round_marks;
  }
}

// Condenses the keys of each segment (kGroups: the candidates of each group of segments) to the
// candidates among them.
template <bool kGroups>
__global__ void __launch_bounds__(kCondenseThreads)
    condense_kernel(SelectProblem p, SelectPlan plan, SelectWorkspace w) {
  __shared__ BlockTeam<kCondenseThreads>::Exchange exchange;
  __shared__ Compaction<kCondenseThreads / 32> compaction;
  extern __shared__ __align__(16) float shared_scores[];  // [condense_room], then as many positions
  int const per_row = kGroups ? plan.num_groups : plan.num_segments;
  int const row = blockIdx.x / per_row, index = blockIdx.x % per_row;
  Row const r = row_of(p, row);
  Marks const marks(p.chunk_size, p.window, r.used_chunks);
  Config const config(p, r);
  int parity = 0, count = 0, pool = 0;
  float *scores, *out_scores;  // the keys, in shared memory where they fit, and those that remain
  int *positions, *out_positions;
  auto const work_in_shared = [&] {
    if (count > plan.condense_room) return;
    scores = shared_scores, positions = reinterpret_cast<int*>(scores + plan.condense_room);
  };
  if constexpr (kGroups) {
    int const first = index * plan.group_size;
    int const end = min(first + plan.group_size, plan.num_segments);
    int const begin = marks.pool_end(Segment(marks, first, plan.num_segments).first - 1);
    scores = out_scores = w.group_score + r.expiry + begin;
    positions = out_positions = w.group_position + r.expiry + begin;
    int const* const counts = w.segment_count + row * plan.num_segments;
    for (int s = first; s < end; ++s) count += counts[s];
    work_in_shared();
    count = 0;
    for (int s = first; s < end; ++s) {
      Segment const segment(marks, s, plan.num_segments);
      std::int64_t const at = r.expiry + marks.pool_end(segment.first - 1);
      for (int i = threadIdx.x; i < counts[s]; i += kCondenseThreads) {
        scores[count + i] = w.segment_score[at + i];
        positions[count + i] = w.segment_position[at + i];
      }
      count += counts[s];
      pool = marks.pool_end(segment.end - 1) - begin;
    }
  } else {
    Segment const segment(marks, index, plan.num_segments);
    int const begin = marks.pool_end(segment.first - 1);
    pool = count = marks.pool_end(segment.end - 1) - begin;
    scores = out_scores = w.segment_score + r.expiry + begin;
    positions = out_positions = w.segment_position + r.expiry + begin;
    work_in_shared();
    float const* const from = r.scores + begin * r.stride;
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += kCondenseThreads) {
      scores[i] = sanitized(from[i * r.stride]);
      positions[i] = begin + i;
    }
  }
  __syncthreads();
  BlockTeam<kCondenseThreads> const team(&exchange);
  auto const keep = [&](State const& state) {
    Filter const filter(config, state);
    count = compaction.append(count, 0, out_scores, out_positions, parity,
                              [&](int i, float& score, int& position) {
                                score = scores[i];
                                position = positions[i];
                                return filter.keeps(score, position);
                              });
    scores = out_scores, positions = out_positions;
    __syncthreads();
  };
  int const m = config.num_candidates;
  float low, high;
  State cut;
  if (count > m && m > 0) {
    range_of(team, scores, count, low, high);
    cut.cut = select_cut(team, scores, positions, count, m, low, high);
  }
  keep(cut);
  // Of many candidates those below the threshold are left out, too.
  if (count > kManyCandidates || m == 0) {
    range_of(team, scores, count, low, high);
    keep(state_of(team, config, scores, positions, count, pool, State{}, low, high, -0.5f));
  }
  if (threadIdx.x == 0) (kGroups ? w.group_count : w.segment_count)[blockIdx.x] = count;
}

// Thresholds never fall from segment to segment either. One block per segment; the last threshold
// of a segment may rise while others read it, to the maximum that they take anyway.
__global__ void raise_kernel(SelectProblem p, SelectPlan plan) {
  int const row = blockIdx.x / plan.num_segments, index = blockIdx.x % plan.num_segments;
  Row const r = row_of(p, row);
  Marks const marks(p.chunk_size, p.window, r.used_chunks);
  Segment const segment(marks, index, plan.num_segments);
  float volatile* const thresholds = static_cast<float*>(p.threshold) + r.chunks;
  float highest = -INFINITY;
  for (int s = threadIdx.x; s < index; s += 32) {
    int const last = marks.chunk(Segment(marks, s, plan.num_segments).end - 1);
    highest = fmaxf(highest, thresholds[last]);
  }
  for (int d = 16; d > 0; d /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, d));
  int const end = marks.chunk(segment.end - 1) + 1;
  for (int c = marks.chunk(segment.first - 1) + 1; c < end; c += 32) {
    int const mine = c + threadIdx.x;
    bool const low = mine < end && thresholds[mine] < highest;
    if (low) thresholds[mine] = highest;
    if (!__any_sync(~0u, low)) break;
  }
}

template <bool kGroups>
void launch_condense_kernel(SelectProblem const& p, SelectPlan const& plan,
                            SelectWorkspace const& w, unsigned blocks, cudaStream_t stream) {
  auto* const kernel = condense_kernel<kGroups>;
  std::size_t const bytes = plan.condense_room * (sizeof(float) + sizeof(int));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "select condense kernel: shared memory");
  kernel<<<blocks, kCondenseThreads, bytes, stream>>>(p, plan, w);
  check_launch("select condense kernel");
}

template <int kWarps, bool kSharedList, bool kShort>
void launch_states_kernel(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& w,
                          cudaStream_t stream) {
  auto* const kernel = states_kernel<kWarps, kSharedList, kShort>;
  std::size_t const bytes = states_shared_bytes(plan);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "select states kernel: shared memory");
  kernel<<<static_cast<unsigned>(plan.rows) * plan.num_segments, kWarps * 32, bytes, stream>>>(
      p, plan, w);
  check_launch("select states kernel");
}

}  // namespace

std::size_t states_shared_bytes(SelectPlan const& plan) {
  std::size_t const fixed = plan.num_warps == kNarrowWarps   ? sizeof(StatesShared<kNarrowWarps>)
                            : plan.num_warps == kMiddleWarps ? sizeof(StatesShared<kMiddleWarps>)
                                                             : sizeof(StatesShared<kWideWarps>);
  std::size_t const list = plan.shared_list ? padded(plan.list_capacity) * sizeof(RankedKey) : 0;
  // What a round needs besides is no more than one of the list's two buffers.
  return fixed + (plan.shared_list ? 2 * list : round_bytes(plan.num_warps));
}

void launch_states(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& w,
                   cudaStream_t stream) {
  unsigned const segments = static_cast<unsigned>(plan.rows) * plan.num_segments;
  if (plan.num_segments > 1) {
    launch_condense_kernel<false>(p, plan, w, segments, stream);
    if (plan.num_groups > 1) {
      launch_condense_kernel<true>(p, plan, w, static_cast<unsigned>(plan.rows) * plan.num_groups,
                                   stream);
    }
  }
  if (plan.num_warps == kWideWarps) {
    plan.shared_list ? launch_states_kernel<kWideWarps, true, true>(p, plan, w, stream)
                     : launch_states_kernel<kWideWarps, false, true>(p, plan, w, stream);
  } else if (plan.num_warps == kMiddleWarps) {
    plan.short_chunks ? launch_states_kernel<kMiddleWarps, true, true>(p, plan, w, stream)
                      : launch_states_kernel<kMiddleWarps, true, false>(p, plan, w, stream);
  } else {
    plan.short_chunks ? launch_states_kernel<kNarrowWarps, true, true>(p, plan, w, stream)
                      : launch_states_kernel<kNarrowWarps, true, false>(p, plan, w, stream);
  }
  if (plan.num_segments > 1) {
    raise_kernel<<<segments, 32, 0, stream>>>(p, plan);
    check_launch("select raise kernel");
  }
}

}  // namespace sparsek::cuda::portable
