// The resident kernels' constants, shared-memory layouts and parameters.
//
// Queries are cut into tiles of 128 positions, aligned to position 0. For tile t the keys that any
// of its queries sees lie in
//   - the diagonal tile (keys of tile t),
//   - the window tile (keys of tile t - 1), which was the diagonal tile before,
//   - the slots: every key before tile t - 1 that is alive at the tile's first query
//     (expiry > 128 t).
// A key enters the slots from the window tile and leaves when it expires, so each row of K and V is
// fetched about once.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "cuda/device/divisor.hpp"
#include "sparsek/attend.hpp"

namespace sparsek::cuda::sm90 {

inline constexpr int kTile = 128;  // queries of a tile, keys of a block
inline constexpr int kThreads =
    384;  // a producer warpgroup and two consumer warpgroups of 64 query rows each

// How the gates reach the weights. The forward has a kernel for each mode.
//   kAligned  chunk_size is a multiple of the tile and the window covers the window tile: a key's
//             gate is one number per tile and enters as the initial value of the score
//             accumulators (log2 m / scale). Every producer warp has one job and walks the tiles by
//             itself (role.cuh, consumer.cuh).
//   kGeneral  visibility and gate are worked out for every (row, key). The producer warps work
//             together, admit keys to the slots while they would wait, and the consumers ask
//             barriers ahead (general_producer.cuh, general_consumer.cuh).
enum class Mode { kAligned, kGeneral };

// One query tile of one query head, as the producer tells the consumers.
struct TilePlan {
  int tile;           // t
  int num_blocks;     // 128-slot blocks in use, for the backward: the forward finds them in flags
  int q_position;     // of the tile's first row, in the q tensor (may be negative) ...
  int q_head, batch;  // ... and its other coordinates
  int row_begin;      // rows of the tile that exist: [row_begin, row_end)
  int row_end;
  int flags;
  std::int64_t lse_offset;    // of the tile's first row
  std::int64_t chunk_offset;  // of the sequence's first chunk in threshold
};
// Read by the forward in aligned mode (A), in general mode (G) and the backward's query kernel (B);
// by all three where nothing is said.
enum PlanFlag : int {
  kSwapHalves = 1,     // warpgroup 0 takes rows 64 ... 127
  kSingle = 2,         // tile 0: the diagonal tile is all there is
  kDiagonalFirst = 4,  // the diagonal tile comes first, the window tile last
  kFirstIsFresh = 8,   // the first block was filled for this tile; else it is still there
  // The window slot is free once the last block is used: the next tile needs something else there.
  // A: only where that block lies there.
  kReleaseLast = 16,
  kReleaseSlots = 32,  // the last tile that uses the slots as they are
  kMore = 64,          // another tile follows
  // A, G:
  kLowerWhole = 128,  // rows 0 ... 63 all exist
  kUpperWhole = 256,  // rows 64 ... 127 all exist
  // A:
  kLastIsFresh = 512,    // the last block was filled for this tile
  kReleaseFirst = 1024,  // the window slot is free once the first block is used
  kSlotsFresh = 2048,    // the slots were filled for this tile
  kFirstPhase = 4096,    // parity of the phase that the fill of the first block completes ...
  kLastPhase = 8192,     // ... and of the last
  kReleaseLate = 16384,  // kReleaseSlots once the last block is used, which lies there, too
};
inline constexpr int kBlocksShift = 16;  // A, G: num_blocks again, in the flags
// A: where the first and the last block lie (places of AlignedLayout).
inline constexpr int kFirstPlaceShift = 20, kLastPlaceShift = 24;

// Shared memory of the general mode's kernel, and of the backward's query kernel in both modes.
// Bytes from a base aligned to 1024. kDim: 64 or 128 columns of 16 bits (a head_dim of 96 lies in
// 128, the rest zero).
template <int kDim, Mode kMode>
struct Layout {
  static constexpr int kBlockBytes =
      kTile * kDim * 2;  // 128 keys of K or V: halves of 64 columns, 128-byte swizzle
  static constexpr int kHalfBytes = kTile * 64 * 2;  // 64 columns of a block
  static constexpr int kMaxBlocks =
      kDim == 128 ? 2 : 4;  // what fits: 256 rows of K and V at 128 columns, 512 at 64
  static constexpr int kSlots = kMaxBlocks * kTile;

  static constexpr int kSlotK = 0;
  static constexpr int kSlotV = kSlotK + kMaxBlocks * kBlockBytes;
  static constexpr int kWindowK =
      kSlotV + kMaxBlocks * kBlockBytes;  // the diagonal tile, which becomes the next window
  static constexpr int kWindowV = kWindowK + kBlockBytes;
  static constexpr int kQ =
      kWindowV + kBlockBytes;  // one part per consumer warpgroup; also stages the output
  static constexpr int kQBytes = 64 * kDim * 2;  // of one warpgroup
  // Aligned: log2 of the slots' gates, two buffers. General: the slots' scores and how long each is
  // seen, in rows of this tile, and the same for the window slot (in rows of the tile that it was
  // the diagonal of).
  static constexpr int kGate = kQ + 2 * kQBytes;
  static constexpr int kGateBytes = kSlots * 4;
  static constexpr int kSlotScore = kGate;
  static constexpr int kSlotExpiry = kSlotScore + kSlots * 4;
  static constexpr int kWindowScore = kSlotExpiry + kSlots * 2;
  static constexpr int kWindowExpiry = kWindowScore + kTile * 4;
  static constexpr int kPlans =
      kMode == Mode::kAligned ? kGate + 2 * kGateBytes : kWindowExpiry + kTile * 2;
  static constexpr int kQueue =  // keys on their way into the slots
      kPlans + 2 * static_cast<int>(sizeof(TilePlan));
  static constexpr int kCounts = kQueue + kTile;
  static constexpr int kBarriers = kCounts + 32;
  static constexpr int kBytes = kBarriers + 16 * 8;
  static_assert(kBytes <= 232448, "shared memory of a block on Hopper");
  static_assert(kQ % 1024 == 0 && kPlans % 8 == 0 && kBarriers % 8 == 0);

  // 65 536 registers for 384 threads, in steps of 8: 168 at launch. Consumers hold output, scores,
  // weights and queries.
  static constexpr int kConsumerRegisters = kDim == 128 ? 224 : 216;
  static constexpr int kProducerRegisters = kDim == 128 ? 56 : 72;
  static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * 168);
};

// mbarriers; the aligned mode's forward shares those before kFullGate. "Full" is waited for by the
// consumers, "empty" by the producer.
enum Barrier {
  kFullQ = 0,   // one per consumer warpgroup
  kEmptyQ = 2,  // likewise
  kFullWindowK = 4,
  kEmptyWindowK,
  kFullWindowV,
  kEmptyWindowV,
  kFullSlotK,
  kEmptySlotK,
  kFullSlotV,
  kEmptySlotV,
  kFullGate,  // general mode: the slots' scores; aligned: two buffers of gates
  kNumBarriers = kFullGate + 2
};
static_assert(kNumBarriers <= 16);

// Shared memory of the aligned mode's forward kernel. A place holds 128 keys of K, and the same of
// V further on: blocks of slots 0 ... kMaxBlocks - 1, then the window slot.
template <int kDim>
struct AlignedLayout {
  static constexpr int kBlockBytes = kTile * kDim * 2;
  static constexpr int kHalfBytes = kTile * 64 * 2;
  static constexpr int kMaxBlocks = kDim == 128 ? 2 : 4;
  static constexpr int kSlots = kMaxBlocks * kTile;
  static constexpr int kWindow = kMaxBlocks;  // the window slot's place
  static constexpr int kPlaces = kMaxBlocks + 1;

  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + kPlaces * kBlockBytes;
  static constexpr int kQ = kValues + kPlaces * kBlockBytes;
  static constexpr int kQBytes = 64 * kDim * 2;
  static constexpr int kGate = kQ + 2 * kQBytes;  // log2 of the slots' gates, each twice
  static constexpr int kStart = kGate;            // before: keys of a head that is entered late
  static constexpr int kRowList = kGate + kSlots * 8;  // rows that enter, two lists of kTile
  static constexpr int kRowCount = kRowList + 2 * kTile * 2;
  static constexpr int kScan = kRowCount + 16;
  static constexpr int kPlans = kScan + (kThreads / 32) * 4;
  static constexpr int kBarriers = kPlans + 2 * static_cast<int>(sizeof(TilePlan));
  static constexpr int kBytes = kBarriers + 21 * 8;
  static_assert(kBytes <= 232448, "shared memory of a block on Hopper");
  static_assert(kQ % 1024 == 0 && kPlans % 16 == 0 && kBarriers % 8 == 0);

  static constexpr int kConsumerRegisters = kDim == 128 ? 224 : 208;
  static constexpr int kProducerRegisters = kDim == 128 ? 56 : 88;
  static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * 168);
};

// Its mbarriers beyond kEmptySlotV. kFullHeadK, kFullHeadV: tiles 0 and 1 of a head, in the first
// two blocks of slots. kFullRows, kEmptyRows: the two lists of rows that enter the slots.
enum AlignedBarrier {
  kFullHeadK = kEmptySlotV + 1,
  kFullHeadV = kFullHeadK + 2,
  kFullRows = kFullHeadV + 2,
  kEmptyRows = kFullRows + 2,
  kEmptyGate = kEmptyRows + 2,
  kNumAlignedBarriers
};
static_assert(kNumAlignedBarriers == 21);

struct Params {
  CUtensorMap q, k, v, out;  // {column, position, head, batch}
  // Rows of K and V that enter the slots are fetched one by one; rows of a partly valid tile are
  // stored one by one.
  char const *k_rows, *v_rows;
  char* out_rows;
  std::int64_t stride_k_batch, stride_k_head, stride_k_position;  // bytes
  std::int64_t stride_v_batch, stride_v_head, stride_v_position;
  std::int64_t stride_out_batch, stride_out_head, stride_out_position;
  float const* scores;
  std::int64_t stride_scores_batch, stride_scores_head, stride_scores_position;
  std::int32_t const* expiry;
  float const* threshold;
  std::int64_t stride_expiry_batch, stride_expiry_head, stride_chunk_batch, stride_chunk_head;
  float* lse;
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_position;
  std::int32_t const *lengths, *cu_seqlens_q, *cu_seqlens_k;
  std::int64_t const* cost_prefix;  // [batch + 1] where sequences differ, else null
  int batch, num_kv_heads, group, seq_len_q, seq_len_k, head_dim;
  int chunk_size, window;
  device::Divisor chunks;  // by chunk_size
  int num_blocks;          // 128-slot blocks that the slots can need
  bool gated;              // whether selected keys have gates
  bool diagonal_plain;     // no key expires or leaves the window within its own tile
  float scale_log2;
};

}  // namespace sparsek::cuda::sm90
