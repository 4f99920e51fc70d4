// The state of every chunk's pool: its k-th ranked key, its threshold and its last candidate.
//
// A block streams one row (or a segment of it) in rounds of a few marks (geometry.cuh). It keeps a
// list of the keys that can still matter, sorted by rank: since thresholds never fall, those above
// the last threshold, and of these at most num_candidates. A round
//   1. inserts its keys that lie above the last threshold (sorted_list.cuh),
//   2. computes the states of its marks, a run of marks by each warp, which walks the list from
//      mark to mark (walk.cuh),
//   3. cuts the list off where keys no longer matter. Warps work independently in step 2. Where a
//      block has all of a row and chunks are not short, it writes expiry in the end.
//
// Few long rows: each row is cut into segments, one block each. A block needs the candidates of
// everything before its segment, and candidates of a union are candidates of its parts. So (a) each
// segment, then (b) each group of segments is condensed to its candidates, and (c) a block starts
// from the lists of the groups and segments before it.
#include "cuda/portable/select/between_marks.cuh"
#include "cuda/portable/select/candidates.cuh"
#include "cuda/portable/select/plan.hpp"
#include "cuda/portable/select/sorted_list.cuh"
#include "cuda/portable/select/state.cuh"
#include "cuda/portable/select/walk.cuh"

namespace sparsek::cuda::portable {
namespace {

constexpr int kCondenseThreads = 512;
constexpr int kPerThread = 4;  // keys that a thread moves per tile of a compaction
constexpr int kBatch = 4;      // scores that a thread loads together

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

// The marks of a segment.
struct Segment {
  int first, end;  // marks [first, end)

  __device__ Segment(Marks const& marks, int segment, int num_segments) {
    int const each = ceil_div(marks.count, num_segments);
    first = min(1 + segment * each, marks.count + 1);
    end = min(first + each, marks.count + 1);
  }
  // Its keys: [pool_end(first - 1), pool_end(end - 1)).
};

// kShort: chunks may be short, so that a mark stands for many of them.
template <int kWarps, bool kShort>
struct StatesShared {
  SortScratch<kWarps> sort;
  typename BlockTeam<kWarps * 32>::Exchange exchange;  // only where a row has several blocks
  float thresholds[kShort ? (kWarps > 4 ? kWarps : 4) * kMarkSpan
                          : kMaxRoundMarks];  // of the round's chunks
  State marks[kMaxRoundMarks];
  RankedKey kth[kShort ? 1 : kTableChunks];  // of the row's chunks, where the block writes expiry
  float running;
  unsigned least, largest;  // ordered scores of the round's keys that matter ...
  int kept;                 // ... and their number
  int size;                 // of the list that the next round starts with
};

// Expiry of a row from the k-th keys of its chunks: a key leaves at the first chunk whose pool
// holds it and whose k-th key ranks before it, and k-th keys only rise. For most keys that is the
// first chunk; the others are queued, so that whole warps search.
template <int kThreads>
__device__ void write_expiry(SelectProblem const& p, Row const& r, RankedKey const* kth,
                             SortedList queue, int& queued) {
  constexpr int kKeysPerThread = 4;
  int const tid = threadIdx.x, lane = tid % 32;
  auto const chunk_size = static_cast<unsigned>(p.chunk_size);
  auto const window = static_cast<unsigned>(p.window);
  int* const expiry = p.expiry + r.expiry;
  unsigned chunk = (tid + window) / chunk_size + 1, rest = (tid + window) % chunk_size;
  unsigned const step_chunks = kThreads / chunk_size, step_rest = kThreads % chunk_size;
  float const* next_score = r.scores + tid * r.stride;
  std::int64_t const step_stride = kThreads * r.stride;
  for (int base = 0; base < r.num_keys; base += kThreads * kKeysPerThread) {
    float u[kKeysPerThread];
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      u[i] = base + i * kThreads + tid < r.valid ? sanitized(next_score[i * step_stride]) : 0.0f;
    }
    next_score += kKeysPerThread * step_stride;
    __syncthreads();
    if (tid == 0) queued = 0;
    __syncthreads();
    unsigned searching[kKeysPerThread];
    int total = 0;
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      int const j = base + i * kThreads + tid, first = static_cast<int>(chunk);
      bool search = false;
      if (j < r.valid) {
        search = first < r.used_chunks && !ranks_after(u[i], j, kth[first]);
        if (!search) {
          expiry[j] = first < r.used_chunks ? first * static_cast<int>(chunk_size) : r.valid;
        }
      } else if (j < r.num_keys) {
        expiry[j] = j;  // does not exist
      }
      searching[i] = __ballot_sync(~0u, search);
      total += __popc(searching[i]);
      chunk += step_chunks, rest += step_rest;
      if (rest >= chunk_size) ++chunk, rest -= chunk_size;
    }
    int at = 0;
    if (lane == 0) at = atomicAdd(&queued, total);
    at = __shfl_sync(~0u, at, 0);
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      if (searching[i] >> lane & 1) {
        int const mine = at + __popc(searching[i] & ((1u << lane) - 1));
        queue.scores[mine] = u[i], queue.positions[mine] = base + i * kThreads + tid;
      }
      at += __popc(searching[i]);
    }
    __syncthreads();
    for (int i = tid; i < queued; i += kThreads) {
      float const u = queue.scores[i];
      int const j = queue.positions[i];
      int first = static_cast<int>((j + window) / chunk_size + 2), end = r.used_chunks;
      while (first < end) {
        int const middle = (first + end) / 2;
        if (ranks_after(u, j, kth[middle])) {
          end = middle;
        } else {
          first = middle + 1;
        }
      }
      expiry[j] = end < r.used_chunks ? end * static_cast<int>(chunk_size) : r.valid;
    }
  }
}

template <int kWarps, bool kSharedList, bool kShort>
__global__ void __launch_bounds__(kWarps * 32, kWarps == kWideWarps ? 1 : kNarrowBlocks)
    states_kernel(SelectProblem p, SelectPlan plan, SelectWorkspace w) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<StatesShared<kWarps, kShort>*>(shared_memory);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const row = blockIdx.x / plan.num_segments, segment_index = blockIdx.x % plan.num_segments;
  Row const r = row_of(p, row);
  Marks const marks(p.chunk_size, p.window, r.used_chunks);
  Segment const segment(marks, segment_index, plan.num_segments);
  Config const config(p, r);

  float* scores;
  int* positions;
  // Behind the shared struct: the critical keys where chunks are short, then the list.
  std::size_t at = sizeof(StatesShared<kWarps, kShort>);
  auto* const critical_keys = reinterpret_cast<CriticalKeys*>(shared_memory + at);
  if constexpr (kShort) at += kWarps * sizeof(CriticalKeys);
  if constexpr (kSharedList) {
    scores = reinterpret_cast<float*>(shared_memory + at);
    positions = reinterpret_cast<int*>(scores + plan.list_capacity);
  } else {
    scores = w.list_score + std::int64_t{blockIdx.x} * plan.list_capacity;
    positions = w.list_position + std::int64_t{blockIdx.x} * plan.list_capacity;
  }
  float* const thresholds = static_cast<float*>(p.threshold) + r.chunks;
  auto const store = [&](int chunk, State const& state) {
    if (!kShort && plan.writes_expiry) {
      shared.kth[chunk] = state.kth;
    } else {
      w.kth[r.chunks + chunk] = state.kth;
    }
    if (p.last_candidate) {
      p.last_candidate[r.chunks + chunk] =
          state.cut.position == INT_MAX || !config.rank_candidates ? -1 : state.cut.position;
    }
  };

  if (segment_index == 0) {
    // Chunks whose pool is empty, and chunks that start behind the last key.
    int const first_chunk = min(marks.first_chunk(), r.used_chunks);
    for (int c = threadIdx.x; c < r.num_chunks; c += kWarps * 32) {
      if (c >= first_chunk && c < r.used_chunks) continue;
      store(c, State{});
      thresholds[c] = c < first_chunk ? -INFINITY : INFINITY;
    }
  }
  if (segment.first >= segment.end) {
    if (!kShort && plan.writes_expiry) {
      __syncthreads();
      write_expiry<kWarps * 32>(p, r, shared.kth, {scores, positions, 0}, shared.kept);
    }
    return;
  }

  State state;
  float guess = -0.5f;
  float running = -INFINITY;
  SortedList list{scores, positions, 0};
  float* const spare_scores = w.spare_score + std::int64_t{blockIdx.x} * plan.spare_capacity;
  int* const spare_positions = w.spare_position + std::int64_t{blockIdx.x} * plan.spare_capacity;
  auto const insert = [&](int num_new, float low, float high, auto&& load) {
    if constexpr (kSharedList) {
      insert_sorted(list, list.count, num_new, low, high, spare_scores, spare_positions,
                    shared.sort, load);
    } else {
      merge_sorted(list, list.count, num_new, spare_scores, spare_positions, shared.sort, load);
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
        for (int i = threadIdx.x; i < count; i += kWarps * 32) {
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
      BlockTeam<kWarps * 32> const team(&shared.exchange);
      float low, high;
      range_of(team, start_scores, gathered, low, high);
      state = state_of(team, config, start_scores, start_positions, gathered,
                       marks.pool_end(segment.first - 1), State{}, low, high, guess);
      Filter const filter(config, state);
      insert(gathered, fmaxf(low, filter.floor), high, [&](int i, float& score, int& position) {
        score = start_scores[i];
        position = start_positions[i];
        return filter.keeps(score, position);
      });
      running = state.threshold;
    }
  }

  for (int first = segment.first; first < segment.end;) {
    int const begin = marks.pool_end(first - 1);
    Filter const filter(config, state);
    float const* const new_scores = r.scores + begin * r.stride;
    // Later than all before: equal to the floor is not enough.
    auto const enters = [&](int i, float& score, int& position) {
      position = begin + i;
      score = sanitized(new_scores[i * r.stride]);
      return score > filter.floor;
    };
    // As many marks as there is room for the keys that matter.
    int round_marks = min(plan.round_marks, segment.end - first), num_new;
    for (;;) {
      __syncthreads();
      if (threadIdx.x == 0) shared.least = ~0u, shared.largest = 0u, shared.kept = 0;
      __syncthreads();
      num_new = marks.pool_end(first + round_marks - 1) - begin;
      float lowest = INFINITY, highest = -INFINITY;
      int kept = 0;
      float const* next_score = new_scores + threadIdx.x * r.stride;
      std::int64_t const step_stride = kWarps * 32 * r.stride;
      for (int base = threadIdx.x; base < num_new; base += kBatch * kWarps * 32) {
        float u[kBatch];  // loaded together
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          bool const exists = base + j * kWarps * 32 < num_new;
          u[j] = exists ? sanitized(next_score[j * step_stride]) : -INFINITY;
        }
        next_score += kBatch * step_stride;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (u[j] > filter.floor) {
            lowest = fminf(lowest, u[j]), highest = fmaxf(highest, u[j]);
            ++kept;
          }
        }
      }
      unsigned least = lowest < INFINITY ? ordered(lowest) : ~0u;
      unsigned largest = highest > -INFINITY ? ordered(highest) : 0u;
      least = __reduce_min_sync(~0u, least), largest = __reduce_max_sync(~0u, largest);
      kept = __reduce_add_sync(~0u, kept);
      if (lane == 0) {
        atomicMin(&shared.least, least);
        atomicMax(&shared.largest, largest);
        atomicAdd(&shared.kept, kept);
      }
      __syncthreads();
      int const room = plan.list_capacity - list.count;
      if (round_marks == 1 || shared.kept <= room) break;
      round_marks = max(1, min(round_marks - 1,
                               static_cast<int>(std::int64_t{round_marks} * room / shared.kept)));
    }
    float low = unordered(shared.least), high = unordered(shared.largest);
    if (list.count > 0) {
      low = fminf(low, list.scores[list.count - 1]);
      high = fmaxf(high, list.scores[0]);
    }
    if (shared.kept > 0) {
      insert(num_new, low, high, enters);
    }

    int const chunk_base = marks.chunk(first - 1) + 1;
    {
      PoolWalker walker(config, list, running, guess);
      int const mine = round_marks * warp / kWarps, end = round_marks * (warp + 1) / kWarps;
      for (int i = mine; i < end; ++i) {
        int const pool = marks.pool_end(first + i), before = marks.pool_end(first + i - 1);
        State const here =
            i == mine ? walker.start(pool)
                      : walker.advance(pool, pool - before, r.scores + before * r.stride, r.stride);
        if (lane == 0) {
          shared.marks[i] = here;
          if (marks.completes_chunk(first + i)) {
            int const chunk = marks.chunk(first + i);
            shared.thresholds[chunk - chunk_base] = here.threshold;
            store(chunk, here);
          }
        }
      }
      if (lane == 0 && end == round_marks && mine < end) shared.size = walker.num_that_matter();
    }
    __syncthreads();
    if constexpr (kShort) {
      for (int i = warp; marks.chunks_per_mark > 1 && i < round_marks; i += kWarps) {
        State const before = i == 0 ? state : shared.marks[i - 1], after = shared.marks[i];
        BetweenMarks const between{marks,
                                   list,
                                   marks.pool_end(first + i - 1),
                                   marks.pool_end(first + i),
                                   marks.chunk(first + i - 1) + 1,
                                   marks.chunk(first + i),
                                   before,
                                   after};
        for (int c = between.first_chunk + lane; c < between.end_chunk; c += 32) {
          // What holds where the pool is too small for a k-th key or a cut, and where k = 0.
          State small;
          if (config.k == 0 && marks.pool_end_of_chunk(c) > 0) {
            small.kth = {INFINITY, -1};
            small.threshold = INFINITY;
          }
          store(c, small);
          shared.thresholds[c - chunk_base] = small.threshold;
        }
        bool const truncated = after.cut.position != INT_MAX;
        bool settled = config.k == 0 || after.kth.position == INT_MAX;
        CriticalKeys& critical = critical_keys[warp];
        if (!settled) {
          rank_between(between, critical, config.k, before.kth, after.kth,
                       [&](int c, RankedKey const& kth) { w.kth[r.chunks + c] = kth; });
          settled = thresholds_between(
              between, critical, config.k, config.num_candidates,
              [&](int c) { return w.kth[r.chunks + c].score; },
              [&](int c, float threshold) { shared.thresholds[c - chunk_base] = threshold; });
        }
        if (settled && config.rank_candidates && truncated) {
          rank_between(
              between, critical, config.num_candidates, before.cut, after.cut,
              [&](int c, RankedKey const& cut) { p.last_candidate[r.chunks + c] = cut.position; });
        }
        __syncwarp();
        for (int c = between.first_chunk; !settled && c < between.end_chunk; ++c) {
          State const here =
              PoolWalker(config, list, running, guess).start(marks.pool_end_of_chunk(c));
          if (lane == 0) {
            shared.thresholds[c - chunk_base] = here.threshold;
            store(c, here);
          }
          __syncwarp();
        }
      }
      __syncthreads();
    }

    // Stored thresholds never fall, although rounding may differ from chunk to chunk.
    state = shared.marks[round_marks - 1];
    if (warp == 0) {
      int const round_chunks = marks.chunk(first + round_marks - 1) - chunk_base + 1;
      for (int base = 0; base < round_chunks; base += 32) {
        int const i = base + lane;
        float highest = i < round_chunks ? shared.thresholds[i] : -INFINITY;
        for (int d = 1; d < 32; d *= 2) {
          float const other = __shfl_up_sync(~0u, highest, d);
          if (lane >= d) highest = fmaxf(highest, other);
        }
        highest = fmaxf(highest, running);
        if (i < round_chunks) thresholds[chunk_base + i] = highest;
        running = __shfl_sync(~0u, highest, 31);
      }
      if (lane == 0) shared.running = fmaxf(running, state.threshold);
    }
    if (state.threshold > -INFINITY) guess = state.threshold - state.kth.score;
    __syncthreads();
    running = shared.running;
    state.threshold = running;
    list.count = shared.size;
    first += round_marks;
  }
  if (!kShort && plan.writes_expiry)
    write_expiry<kWarps * 32>(p, r, shared.kth, {scores, positions, 0}, shared.kept);
}

// Condenses the keys of each segment (kGroups: the candidates of each group of segments) to the
// candidates among them.
template <bool kGroups>
__global__ void __launch_bounds__(kCondenseThreads)
    condense_kernel(SelectProblem p, SelectPlan plan, SelectWorkspace w) {
  __shared__ BlockTeam<kCondenseThreads>::Exchange exchange;
  __shared__ Compaction<kCondenseThreads / 32> compaction;
  int const per_row = kGroups ? plan.num_groups : plan.num_segments;
  int const row = blockIdx.x / per_row, index = blockIdx.x % per_row;
  Row const r = row_of(p, row);
  Marks const marks(p.chunk_size, p.window, r.used_chunks);
  Config const config(p, r);
  int parity = 0, count = 0, pool = 0;
  float* scores;
  int* positions;
  if constexpr (kGroups) {
    int const first = index * plan.group_size;
    int const end = min(first + plan.group_size, plan.num_segments);
    int const begin = marks.pool_end(Segment(marks, first, plan.num_segments).first - 1);
    scores = w.group_score + r.expiry + begin;
    positions = w.group_position + r.expiry + begin;
    for (int s = first; s < end; ++s) {
      Segment const segment(marks, s, plan.num_segments);
      std::int64_t const at = r.expiry + marks.pool_end(segment.first - 1);
      int const n = w.segment_count[row * plan.num_segments + s];
      for (int i = threadIdx.x; i < n; i += kCondenseThreads) {
        scores[count + i] = w.segment_score[at + i];
        positions[count + i] = w.segment_position[at + i];
      }
      count += n;
      pool = marks.pool_end(segment.end - 1) - begin;
    }
  } else {
    Segment const segment(marks, index, plan.num_segments);
    int const begin = marks.pool_end(segment.first - 1);
    pool = count = marks.pool_end(segment.end - 1) - begin;
    scores = w.segment_score + r.expiry + begin;
    positions = w.segment_position + r.expiry + begin;
    for (int i = threadIdx.x; i < count; i += kCondenseThreads) {
      scores[i] = sanitized(r.scores[(begin + i) * r.stride]);
      positions[i] = begin + i;
    }
  }
  __syncthreads();
  int size = 0;
  if (count > 0) {
    BlockTeam<kCondenseThreads> const team(&exchange);
    float low, high;
    range_of(team, scores, count, low, high);
    State const state =
        state_of(team, config, scores, positions, count, pool, State{}, low, high, -0.5f);
    Filter const filter(config, state);
    size = compaction.append(count, 0, scores, positions, parity,
                             [&](int i, float& score, int& position) {
                               score = scores[i];
                               position = positions[i];
                               return filter.keeps(score, position);
                             });
  }
  if (threadIdx.x == 0) (kGroups ? w.group_count : w.segment_count)[blockIdx.x] = size;
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

template <int kWarps, bool kSharedList, bool kShort>
void launch_states_kernel(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& w,
                          cudaStream_t stream) {
  auto* const kernel = states_kernel<kWarps, kSharedList, kShort>;
  std::size_t const bytes = states_shared_bytes(plan) +
                            (kSharedList ? plan.list_capacity * (sizeof(float) + sizeof(int)) : 0);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "select states kernel: shared memory");
  kernel<<<static_cast<unsigned>(plan.rows) * plan.num_segments, kWarps * 32, bytes, stream>>>(
      p, plan, w);
  check_launch("select states kernel");
}

}  // namespace

std::size_t states_shared_bytes(SelectPlan const& plan) {
  std::size_t const critical = plan.num_warps * sizeof(CriticalKeys);
  if (plan.num_warps == kWideWarps) return sizeof(StatesShared<kWideWarps, true>) + critical;
  return plan.short_chunks ? sizeof(StatesShared<kNarrowWarps, true>) + critical
                           : sizeof(StatesShared<kNarrowWarps, false>);
}

void launch_states(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& w,
                   cudaStream_t stream) {
  unsigned const segments = static_cast<unsigned>(plan.rows) * plan.num_segments;
  if (plan.num_segments > 1) {
    condense_kernel<false><<<segments, kCondenseThreads, 0, stream>>>(p, plan, w);
    check_launch("select condense kernel");
    condense_kernel<true>
        <<<static_cast<unsigned>(plan.rows) * plan.num_groups, kCondenseThreads, 0, stream>>>(
            p, plan, w);
    check_launch("select condense kernel");
  }
  if (plan.num_warps == kWideWarps) {
    plan.shared_list ? launch_states_kernel<kWideWarps, true, true>(p, plan, w, stream)
                     : launch_states_kernel<kWideWarps, false, true>(p, plan, w, stream);
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
