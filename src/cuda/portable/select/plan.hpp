// How a selection is cut into blocks and what memory it takes: a pure function of problem and device.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/portable/select/geometry.cuh"
#include "cuda/runtime.hpp"
#include "problem.hpp"

namespace sparsek::cuda::portable {

inline constexpr int kMaxRoundMarks = 16;
inline constexpr int kNarrowWarps =
    2;  // of a block where there are rows enough for all multiprocessors
inline constexpr int kNarrowBlocks =
    12;  // of them side by side: 64 threads * 12 leave 80 registers each
inline constexpr int kWideWarps = 16;  // where there are few rows

struct SelectPlan {
  int rows;            // batch * num_kv_heads
  int num_warps;       // of a block
  int num_segments;    // blocks of a row
  int group_size;      // segments whose candidates are merged before the blocks read them
  int num_groups;      // of a row
  int round_marks;     // marks between two trimmings of the candidate list
  int list_capacity;   // keys
  bool short_chunks;   // several of them to a mark
  bool shared_list;    // the list lies in shared memory, else in the workspace
  int start_capacity;  // keys that a block may find in the lists of the segments before it
  std::int64_t num_keys, num_chunks;  // of all rows together
};

SelectPlan plan_select(SelectProblem const& p, DeviceProperties const& device);

// The arrays in a selection's workspace. With null as base: only their size.
struct SelectWorkspace {
  // The k-th ranked key of every chunk's pool.
  RankedKey* kth;
  // Candidate lists that do not fit in shared memory.
  float* list_score;
  int* list_position;
  // With several segments: the candidates of each segment and of each group, at the offset of their first key; their
  // numbers; and what each block gathers from them.
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
