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

// Query rows (query head of the group, token) are the columns of m16n8k16's operand P^T: 8 to a
// tile.
inline constexpr int kTileRows = 8;
// Keys that a warp takes at a time: the rows of that operand.
inline constexpr int kBlockKeys = 16;
// Portable; larger clusters need an attribute and are scheduled less well.
inline constexpr int kMaxClusterSize = 8;
// Tokens that attend at once. A query sees only the earlier ones of them, so more would be in vain.
inline constexpr int kMaxRun = 128;

// A run's query rows are cut into passes.
struct Pass {
  int begin, end;    // the run's tokens, positions in the sequence
  int pool_end;      // that they see
  int first, count;  // query rows
};

template <int kMaxDim_, int kTiles_>
struct DecodeConfig {
  static constexpr int kMaxDim = kMaxDim_, kTiles = kTiles_;
  static constexpr int kQueryRows = kTiles * kTileRows;
  // Warps that load rows straight to registers, the next 16 under way while 16 are attended to, and
  // one for the other rows (kernel.cuh).
  static constexpr int kRowWarps = 3, kWarps = kRowWarps + 1;
  static constexpr int kThreads = 32 * kWarps;
  // Registers of a thread: operands (next rows of k and v) and outputs take 96 at 128 dimensions
  // with one tile, 128 with two, 192 at 256 dimensions; some 30 more are needed. Bytes under way:
  // 12 warps with up to 8 KB each, where 4.5 TB/s * 0.8 us over 132 multiprocessors ask for 27 KB.
  static constexpr int kBlocksPerSm = kMaxDim > 128 ? 2 : kTiles == 2 ? 3 : 4;
  // Where blocks form clusters, there are no more than two on a multiprocessor.
  // NOTE: with 255 registers a step of few heads takes half a microsecond less.
  static constexpr int kClusteredBlocksPerSm = 2;
  static constexpr int kMaxRegisters = 65536 / (kBlocksPerSm * kThreads) / 8 * 8;
  static_assert(kMaxRegisters >= kMaxDim / 2 + kTiles * kMaxDim / 4 + 30 || kMaxDim > 128);
  using Evict = EvictionConfig<kThreads, 1>;

  static constexpr int kChunks = kMaxDim / 8;  // 16-byte pieces of a row
  static constexpr int kPitch = kMaxDim * 2;   // bytes from one row to the next
  // Pieces of a row that a lane holds, of k and of v (attend_rows.cuh).
  static constexpr int kKeyPieces = kChunks / 4, kValuePieces = (kChunks + 7) / 8;
  static_assert(kChunks % 4 == 0);

  // A warp's stage for rows that are not loaded directly: 16 of k, 16 of v, scores.
  static constexpr int kTensorBytes = kBlockKeys * kPitch;
  static constexpr int kStageBytes = 2 * kTensorBytes + kBlockKeys * 4;
  // Then its outputs [kQueryRows, kOutPitch] in float32; the block's follow, [kQueryRows, kMaxDim].
  static constexpr int kOutPitch = kMaxDim + 4;
  static constexpr int kOutBytes = kQueryRows * kOutPitch * 4;
  static constexpr int kWarpBytes = kStageBytes > kOutBytes ? kStageBytes : kOutBytes;
  static constexpr int kSharedBytes = kWarps * kWarpBytes + kQueryRows * kMaxDim * 4;
  // Lists of evictions that fit lie there before.
  static constexpr int kMaxSharedLists = kWarps * kWarpBytes;

  struct Shared {
    Head head;
    Pass pass;
    int missing;  // tokens of the call that do not exist
    bool exists;  // the sequence
    EvictionScratch<Evict> eviction;
    float2 of_warp[kWarps][kQueryRows];  // reference and sum of its weights
    float2 of_block[kQueryRows];
    alignas(16) std::byte queries[2 * kTileRows * kPitch];  // as operands
  };
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

// Enqueues the kernel's instance for T and up to kMaxDim dimensions.
template <typename T, int kMaxDim>
void launch_decode(DecodeCall const& call, DecodePlan const& plan, DeviceProperties const& device,
                   cudaStream_t stream);

// Enqueues the kernel that only appends.
void launch_append(DecodeCall const& call, DecodePlan const& plan, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
