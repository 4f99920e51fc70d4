// Roles, shared memory and work order of the gathering Hopper kernel.
#pragma once
#include <cstdint>

#include "cuda/portable/attend/geometry.cuh"

namespace sparsek::cuda::sm90::gather {

inline constexpr int kTile = portable::kQueryTile;  // queries of a tile, keys of a block

// Two warpgroups gather, one K (and Q), one V: 256 threads have copies in flight. Two compute, 64
// queries each.
enum class Role { kKeys, kValues, kLower, kUpper };
inline constexpr int kThreads = 4 * 128;
inline constexpr int kConsumerWarps = 8;
// 65 536 registers for 512 threads: 128 at launch. Consumers hold 64 output accumulators, 64
// scores, 32 registers of weights and 32 of queries.
inline constexpr int kConsumerRegisters = 224, kProducerRegisters = 32;
static_assert(2 * kConsumerRegisters + 2 * kProducerRegisters <= 4 * 128);

// What a consumer warp needs when it stores its rows; in shared memory meanwhile, for the
// registers' sake.
struct StoreTarget {
  std::int64_t out, lse;  // of the sequence's position 0: bytes, elements
  int first, last, end;   // positions
};

// Shared memory in bytes from a base aligned to 1024. A block of 128 rows lies in halves of 64
// columns, each with the 128-byte swizzle that the matrix descriptors name. kDim: 64 or 128 columns
// (a head_dim of 96 lies in 128, the rest zero).
template <int kDim>
struct Layout {
  static constexpr int kBlockBytes = kTile * kDim * 2;
  static constexpr int kHalfBytes = kTile * 128;
  static constexpr int kStagesK = 3, kStagesV = 2;  // K is released late: its gates are read last
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kBlockBytes;
  static constexpr int kV = kK + kStagesK * kBlockBytes;
  // Of each key of a stage of K: log2(gate) / scale, -inf for keys that do not exist; and the gate.
  static constexpr int kBias = kV + kStagesV * kBlockBytes;
  static constexpr int kGate = kBias + kStagesK * kTile * 4;
  // Positions of the keys being gathered: two buffers for each of the two producers.
  static constexpr int kPositions = kGate + kStagesK * kTile * 4;
  static constexpr int kBarriers = kPositions + 4 * kTile * 4;
  static constexpr int kTargets = kBarriers + 16 * 8;  // where each consumer warp's rows go
  static constexpr int kBytes = kTargets + kConsumerWarps * static_cast<int>(sizeof(StoreTarget));
  static_assert(kBytes <= 232448, "shared memory of a block on Hopper");
};

// mbarriers. "Full" is waited for by the consumers, "empty" by a producer.
template <int kDim>
struct Barriers {
  static constexpr int kFullQ = 0, kEmptyQ = 1;
  static constexpr int kFullK = 2, kEmptyK = kFullK + Layout<kDim>::kStagesK;
  static constexpr int kFullV = kEmptyK + Layout<kDim>::kStagesK;
  static constexpr int kEmptyV = kFullV + Layout<kDim>::kStagesV;
  static_assert(kEmptyV + Layout<kDim>::kStagesV <= 16);
};

// A place in a ring of buffers, and the parity of its current use.
template <int kStages>
struct RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// One tile of one query head. Every warpgroup works it out for itself: nothing is sent around.
struct WorkItem {
  portable::Sequence sequence;
  int q_head, kv_head;
  int begin;        // position of row 0
  int first, last;  // rows that exist, as positions
  int end;          // rows and keys that exist within the sequence's length end here
  int key_first;    // the contiguous keys begin here
  int contiguous_blocks, list_size;
  std::int64_t list;  // index among the lists

  __device__ __forceinline__ int list_blocks() const { return (list_size + kTile - 1) / kTile; }
};

// Items in order: the query heads of a group, tiles, KV heads. The tiles of successive heads are
// rotated against each other, so that blocks with a fixed stride through the items see all kinds of
// tiles.
__device__ __forceinline__ WorkItem locate_item(portable::AttendParams const& p, int x) {
  WorkItem item;
  int const in_group = x % p.group;
  x /= p.group;
  item.kv_head = x / p.num_tiles;
  int const tile = (x + item.kv_head) % p.num_tiles;
  item.q_head = item.kv_head * p.group + in_group;
  portable::TileSpan const span = portable::locate_tile(p, tile);
  item.sequence = span.sequence;
  item.begin = span.begin;
  item.first = span.first;
  item.last = span.last;
  item.end = min(span.last, span.sequence.length);
  item.list = static_cast<std::int64_t>(item.kv_head) * p.num_tiles + tile;
  item.key_first = item.contiguous_blocks = item.list_size = 0;
  if (item.first < item.end) {
    item.key_first = portable::list_end(p, item.first);
    item.contiguous_blocks = (item.end - item.key_first + kTile - 1) / kTile;
    item.list_size = p.list_count[item.list];
  }
  return item;
}

}  // namespace sparsek::cuda::sm90::gather
