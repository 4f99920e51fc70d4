// A decode call as the kernels take it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "problem.hpp"

namespace sparsek::cuda::portable {

// Division by a number that only the host knows, 0 <= n < 2^31.
// NOTE: the hardware has no integer division; the compiler's takes some 30 instructions, and where
// a warp works alone every instruction of a step is waited for.
struct Divisor {
  std::uint32_t divisor, multiplier;
  int shift;

  Divisor() = default;
  explicit Divisor(std::int64_t d)
      : divisor(static_cast<std::uint32_t>(d)), multiplier(0), shift(0) {
    if (d <= 1) return;
    while ((std::int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + shift)) + d - 1) / d);
    --shift;
  }
  __device__ int quotient(int n) const {
    return divisor <= 1 ? n : static_cast<int>(__umulhi(n, multiplier) >> shift);
  }
  __device__ int remainder(int n) const { return n - quotient(n) * static_cast<int>(divisor); }
};

struct DecodeCall {
  DecodeProblem problem;
  Divisor kv_heads, group, chunk_size, ring_rows;
  int cluster_log2;         // of the number of blocks that share a head's rows
  bool aligned_tokens;      // k and v: rows start at multiples of 16 bytes
  bool aligned_queries;     // q and out likewise
  std::byte* lists;         // of evictions, in the workspace; null: in shared memory
  std::int64_t list_bytes;  // of one block, or of one head's part of the workspace
};

}  // namespace sparsek::cuda::portable
