// How a selection is cut into blocks and what memory it takes: a pure function of problem and
// device.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/portable/select/geometry.cuh"
#include "cuda/runtime.hpp"
#include "problem.hpp"

namespace sparsek::cuda::portable {

// Warps of a block: where there are rows enough for all multiprocessors, where their lists are too
// long for many blocks side by side, and where there are few rows.
inline constexpr int kNarrowWarps = 4, kMiddleWarps = 8, kWideWarps = 16;
// Blocks side by side, at least: 128 threads * 6 leave 80 registers each, 256 * 4 leave 64.
constexpr int side_by_side(int num_warps) {
  return num_warps == kNarrowWarps ? 6 : num_warps == kMiddleWarps ? 4 : 1;
}

// Keys that a round looks at, at most: each thread holds a few.
constexpr int keys_per_thread(int num_warps) { return num_warps == kMiddleWarps ? 4 : 8; }
constexpr int round_keys(int num_warps) { return num_warps * 32 * keys_per_thread(num_warps); }
constexpr int max_round_marks(int num_warps) { return round_keys(num_warps) / 128; }

// Entries [count, count + kListPadding) of a candidate list rank after every key and lie in no
// pool, so that a warp may look at 32 entries wherever it stands.
inline constexpr int kListPadding = 32;
constexpr std::size_t padded(int capacity) { return std::size_t(capacity) + kListPadding; }

struct SelectPlan {
  int rows;            // batch * num_kv_heads
  int num_warps;       // of a block
  int num_segments;    // blocks of a row
  int group_size;      // segments whose candidates are merged before the blocks read them
  int num_groups;      // of a row
  int round_marks;     // marks between two sorts of the candidate list, at most
  int list_capacity;   // keys
  bool short_chunks;   // several of them to a mark
  bool shared_list;    // the list lies in shared memory, else in the workspace
  int condense_room;   // keys that fit in the shared memory of a block that condenses them
  int start_capacity;  // keys that a block may find in the lists of the segments before it
  std::int64_t num_keys, num_chunks;  // of all rows together
};

SelectPlan plan_select(SelectProblem const& p, DeviceProperties const& device);

// The arrays in a selection's workspace. With null as base: only their size.
struct SelectWorkspace {
  // Candidate lists that do not fit in shared memory, and copies of them while they are sorted.
  RankedKey *list, *spare;
  // With several segments: the candidates of each segment and of each group, at the offset of their
  // first key; their numbers; and what each block gathers from them.
  float *segment_score, *group_score, *start_score;
  int *segment_position, *group_position, *start_position;
  int *segment_count, *group_count;
  std::size_t bytes;
};

SelectWorkspace lay_out(SelectPlan const& plan, std::byte* base);

// Shared memory of a block that computes states, with the list where it lies there.
std::size_t states_shared_bytes(SelectPlan const& plan);

void launch_states(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& workspace,
                   cudaStream_t stream);

}  // namespace sparsek::cuda::portable
