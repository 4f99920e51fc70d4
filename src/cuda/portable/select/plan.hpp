// How a selection is cut into blocks and what memory it takes: a pure function of problem and
// device.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/portable/select/geometry.cuh"
#include "cuda/runtime.hpp"
#include "problem.hpp"

namespace sparsek::cuda::portable {

inline constexpr int kMaxRoundMarks = 16;
inline constexpr int kNarrowWarps =
    4;  // of a block where there are rows enough for all multiprocessors
inline constexpr int kNarrowBlocks =
    6;  // of them side by side: 128 threads * 6 leave 80 registers each
inline constexpr int kWideWarps = 16;  // where there are few rows
inline constexpr int kCarriedPerThread =
    1024 / (32 * kNarrowWarps);  // keys of the old list that a thread holds while it is sorted
inline constexpr int kTableChunks =
    64;  // a block that has all of a row with at most so many chunks writes its expiry, too

struct SelectPlan {
  int rows;            // batch * num_kv_heads
  int num_warps;       // of a block
  int num_segments;    // blocks of a row
  int group_size;      // segments whose candidates are merged before the blocks read them
  int num_groups;      // of a row
  int round_marks;     // marks between two sorts of the candidate list, at most
  int list_capacity;   // keys
  int spare_capacity;  // keys of the list in global memory while it is sorted; 0: held in registers
  bool short_chunks;   // several of them to a mark
  bool shared_list;    // the list lies in shared memory, else in the workspace
  bool writes_expiry;  // the blocks that compute states also write expiry
  int start_capacity;  // keys that a block may find in the lists of the segments before it
  std::int64_t num_keys, num_chunks;  // of all rows together
};

SelectPlan plan_select(SelectProblem const& p, DeviceProperties const& device);

// The arrays in a selection's workspace. With null as base: only their size.
struct SelectWorkspace {
  // The k-th ranked key of every chunk's pool.
  RankedKey* kth;
  // Candidate lists that do not fit in shared memory, and copies of lists while they are sorted.
  float *list_score, *spare_score;
  int *list_position, *spare_position;
  // With several segments: the candidates of each segment and of each group, at the offset of their
  // first key; their numbers; and what each block gathers from them.
  float *segment_score, *group_score, *start_score;
  int *segment_position, *group_position, *start_position;
  int *segment_count, *group_count;
  std::size_t bytes;
};

SelectWorkspace lay_out(SelectPlan const& plan, std::byte* base);

// Shared memory of a block that computes states, without the list.
std::size_t states_shared_bytes(SelectPlan const& plan);

void launch_states(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& workspace,
                   cudaStream_t stream);
void launch_expiry(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& workspace,
                   cudaStream_t stream);

}  // namespace sparsek::cuda::portable
