// Constants, shared-memory layout and parameters of the three kernels of the backward.
//
//   query_kernel  dq, one block walks the tiles of a head as the forward does (its schedule, its
//                 producer, its shared memory); it also makes delta = dout . out for the others
//   window_kernel dk, dv of the queries that find the key in the diagonal or the window tile
//   slot_kernel   dk, dv of the queries that find the key in the slots, added to those
//
// Each score, and each gradient of a weight, is computed twice: once by rows of queries for dq,
// once by rows of keys for dk and dv. So nothing is reduced between blocks.
#pragma once
#include "cuda/sm90/attend/config.hpp"

namespace sparsek::cuda::sm90::backward {

inline constexpr int kPiece = 64;  // queries that pass by the resident keys at a time

// What the query kernel leaves for the key kernels, float32 or int32 per query.
enum RowArray : int {
  kRowLse = 0,      // log2 of the normaliser; +inf where a row sees no key
  kRowShift,        // -delta = -(dout . out)
  kRowThreshold,    // general mode: of the query's chunk
  kRowPoolEnd,      // general mode: int32, keys before it have gates
  kRowGateGradient  // general mode, for the sums over chunks only
};
constexpr int row_arrays(Mode mode) { return mode == Mode::kAligned ? 2 : 4; }  // the keys need
constexpr int all_row_arrays(Mode mode) { return mode == Mode::kAligned ? 2 : 5; }
// From array to array: multiples of 16 bytes, so that bulk copies can fetch them.
constexpr std::int64_t row_array_stride(std::int64_t num_queries) {
  return (num_queries + 3) / 4 * 4;
}

struct BackwardParams : Params {
  CUtensorMap dout;    // boxes of 64 rows; `out` is an input here
  CUtensorMap dk, dv;  // boxes of 64 rows
  // Rows of a partly missing piece are fetched one by one.
  char const *q_rows, *dout_rows;
  std::int64_t stride_q_batch, stride_q_head, stride_q_position;  // bytes
  std::int64_t stride_dout_batch, stride_dout_head, stride_dout_position;
  char *dq_rows, *dk_rows, *dv_rows;
  std::int64_t stride_dq_batch, stride_dq_head, stride_dq_position;
  std::int64_t stride_dk_batch, stride_dk_head, stride_dk_position;
  std::int64_t stride_dv_batch, stride_dv_head, stride_dv_position;
  float* dscores;  // null: not wanted
  std::int64_t stride_dscores_batch, stride_dscores_head, stride_dscores_position;
  bool gate_gradients;  // whether dscores is wanted and there are gates

  float* row_data;  // [batch, q heads, arrays, queries]
  std::int64_t stride_row_batch, stride_row_head, stride_row_array;
  // Aligned mode: sums of the gates' gradients over a tile, one for each consumer warp of the slot
  // kernel: [kv heads, key tiles, num_blocks, 8].
  float* gate_partials;
  float* gate_gradient_sums;  // addressed like threshold
  int num_key_tiles;          // of all sequences
  int num_chunks;

  // Few heads: the tiles of a head are cut into segments. What a segment adds to keys that it
  // inherits from the one before goes here: [batch, kv heads, segments, slots].
  int num_segments;
  float* inherited_rows;    // ... [dk, dv]
  float* inherited_scores;  // ... dscores
  std::int32_t* inherited_keys;

  float sm_scale;
};

// 65 536 registers for 384 threads, in steps of 8: 168 a thread at launch. Consumers take what
// producers leave.
template <int kConsumer, int kProducer>
struct RegisterBudget {
  static constexpr int kConsumerRegisters = kConsumer, kProducerRegisters = kProducer;
  static_assert(2 * kConsumer + kProducer <= 3 * 168);
};
using QueryRegisters = RegisterBudget<232, 40>;
using WindowRegisters = RegisterBudget<232, 40>;
// NOTE: the slot kernel's producer is busy all the time and must not spill.
using SlotRegisters = RegisterBudget<224, 56>;

enum KeyBarrier : int {
  kFullPiece = 0,   // up to three stages
  kEmptyPiece = 3,  // likewise
  kFullKeys = 6,    // two buffers
  kEmptyKeys = 8,   // likewise
  kReadSlots = 10,  // the consumers have read the slots' data
  kNumKeyBarriers
};

// Shared memory of the key kernels, bytes from a base aligned to 1024.
template <int kDim, Mode kMode>
struct KeyLayout {
  static constexpr int kBlockBytes = kTile * kDim * 2;  // 128 rows: halves of 64 columns
  static constexpr int kHalfBytes = kTile * 64 * 2;
  static constexpr int kPieceBytes = kPiece * kDim * 2;
  static constexpr int kPieceHalfBytes = kPiece * 64 * 2;
  // NOTE: general mode keeps four arrays per query; at 128 columns there is no room for them beside
  // three stages.
  static constexpr int kStages = kDim == 128 && kMode == Mode::kGeneral ? 2 : 3;
  static constexpr int kRowBytes = row_arrays(kMode) * kPiece * 4;

  static constexpr int kKeys = 0;  // two buffers of K and V
  static constexpr int kBufferBytes = 2 * kBlockBytes;
  static constexpr int kPieces = kKeys + 2 * kBufferBytes;  // stages of Q and dout
  static constexpr int kRows = kPieces + kStages * 2 * kPieceBytes;
  // Slot kernel: for each slot {key whose gradient is complete, gate or score}, and how long the
  // slot's key is seen (general mode).
  static constexpr int kSlotData = kRows + kStages * kRowBytes;
  static constexpr int kSlotKeys = kSlotData + kTile * 8;
  static constexpr int kSlotExpiry = kSlotKeys + (kMode == Mode::kGeneral ? kTile * 4 : 0);
  static constexpr int kQueue = kSlotExpiry + (kMode == Mode::kGeneral ? kTile * 2 : 0);
  static constexpr int kCounts = kQueue + kTile;
  // Slot kernel, aligned mode: 16 x 8 ones.
  static constexpr int kOnes = kCounts + 32;
  static constexpr int kBarriers = kOnes + (kMode == Mode::kAligned ? 256 : 0);
  static constexpr int kBytes = kBarriers + kNumKeyBarriers * 8;
  static_assert(kBytes <= 232448, "shared memory of a block on Hopper");
  static_assert(kPieces % 1024 == 0 && kRows % 128 == 0 && kOnes % 16 == 0 && kBarriers % 8 == 0);
};

// Instead of the key that leaves a slot: nobody does; one that a segment has inherited.
inline constexpr int kNobody = -1, kInherited = -2;

}  // namespace sparsek::cuda::sm90::backward
