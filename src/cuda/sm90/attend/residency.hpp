// What the resident kernels, forward and backward, share on the host.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cuda/sm90/attend/config.hpp"
#include "problem.hpp"

namespace sparsek::cuda::sm90 {

// A selection that was not made by select: expiry alone.
bool is_foreign(AttendProblem const& p);
// Whether sequences have lengths of their own.
bool sequences_differ(AttendProblem const& p);
Mode mode_of(AttendProblem const& p);
// The most keys that the slots can have to hold at a time.
std::int64_t slots_needed(AttendProblem const& p);
// Columns in shared memory: 64 or 128.
int padded_dim(AttendProblem const& p);

// Whether dtype, head_dim, gates and the number of slots suit the resident kernels; if not,
// `reason` says what stands in the way.
bool fits_resident(AttendProblem const& p, std::string* reason);

// A tensor that the copy engine reads or writes, as a 4-D tensor (packed ones have batch 1).
struct Operand {
  char const* name;
  void const* data;
  std::int64_t batch, heads, positions;                     // sizes
  std::int64_t stride_batch, stride_head, stride_position;  // elements
};

void operands_of(AttendProblem const& p, Operand (&operands)[4]);  // q, k, v, out

// Whether the copy engine can address the tensor: 16-byte steps everywhere.
bool is_addressable(Operand const& t, std::string* why);

// Boxes of 64 columns x `rows` positions, 128-byte swizzle; zeros outside the tensor.
CUtensorMap tensor_map(AttendProblem const& p, Operand const& t, int rows);

// What the kernels receive. `cost_prefix`: where schedule_sequences writes, null if sequences are
// alike.
Params resident_params(AttendProblem const& p, std::int64_t const* cost_prefix);

// Enqueues the prefix sums of the sequences' costs, [batch + 1].
void schedule_sequences(Params const& p, std::int64_t* prefix, cudaStream_t stream);

}  // namespace sparsek::cuda::sm90
