// What the decode kernels agree on with their launcher: the call in the kernels' terms, tiles,
// shared memory.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/portable/decode/evict.cuh"
#include "cuda/runtime.hpp"
#include "problem.hpp"

namespace sparsek::cuda::portable {

// Appending alone: wide blocks, because one block streams a whole prompt's scores.
using AppendEviction = EvictionConfig<512, 4>;

// Query rows (query head of the group, token) are the columns of m16n8k16's results: 8 to a tile.
inline constexpr int kTileRows = 8;
// Keys that a warp takes at a time: the rows of those results.
inline constexpr int kBlockKeys = 16;
// Portable; larger clusters need an attribute and are scheduled less well.
inline constexpr int kMaxClusterSize = 8;
// Tokens that attend at once. A query sees only the earlier ones of them, so more would be in vain.
inline constexpr int kMaxRun = 128;

template <int kMaxDim_, int kTiles_>
struct DecodeConfig {
  static constexpr int kMaxDim = kMaxDim_, kTiles = kTiles_;
  static constexpr int kQueryRows = kTiles * kTileRows;
  // A warp's rows in flight are what hides the memory's latency: (kStages - 1) blocks of 16 keys, 8
  // KB each at 128 dimensions; 8 warps with 2 blocks each make 128 KB per multiprocessor, three
  // times what 4.5 TB/s * 0.8 us over 132 of them asks for.
  static constexpr int kWarps = kMaxDim > 128 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMaxStages = 3, kMinStages = 2;
  using Evict = EvictionConfig<kThreads, 128 / kThreads>;

  static constexpr int kChunks = kMaxDim / 8;  // 16-byte pieces of a row
  static constexpr int kPitch = kMaxDim * 2;   // bytes from one row to the next
  static constexpr int kTensorBytes = kBlockKeys * kPitch;
  // Rows of k, rows of v, their scores.
  static constexpr int kStageBytes = 2 * kTensorBytes + kBlockKeys * 4;

  // Then the same memory holds the warps' outputs [kQueryRows, kOutPitch] and the block's
  // [kQueryRows, kMaxDim] in float32; the pitch spreads a fragment's lanes over all banks.
  static constexpr int kOutPitch = kMaxDim + 4;
  static_assert(kQueryRows * (kWarps * kOutPitch + kMaxDim) * 4 <=
                kMinStages * kWarps * kStageBytes);
  // Lists of evictions that fit into one stage of all warps lie there.
  static constexpr int kMaxSharedLists = kWarps * kStageBytes;

  struct Shared {
    EvictionScratch<Evict> eviction;
    float2 of_warp[kWarps][kQueryRows];  // reference and sum of its weights
    float2 of_block[kQueryRows];
  };
  static constexpr int shared_bytes(int num_stages) { return num_stages * kWarps * kStageBytes; }
  // By their shared memory, with kMaxStages where a multiprocessor has 227 KB.
  static constexpr int kBlocksPerSm = 2;
};

// How the launcher cuts a call: a pure function of problem and device.
struct DecodePlan {
  int max_query_rows;       // of a run: query heads of a group times tokens
  int cluster_log2;         // of the number of blocks that share a head
  std::int64_t list_bytes;  // of an eviction
  bool lists_in_workspace;  // else in shared memory
  std::size_t workspace_bytes;
};
DecodePlan plan_decode(DecodeProblem const& p, DeviceProperties const& device);

// Enqueues the kernel's instance for T and up to kMaxDim dimensions. What of `call` depends on the
// instance is filled in there.
template <typename T, int kMaxDim>
void launch_decode(DecodeCall call, DecodePlan const& plan, DeviceProperties const& device,
                   cudaStream_t stream);

// Enqueues the kernel that only appends.
void launch_append(DecodeCall const& call, DecodePlan const& plan, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
