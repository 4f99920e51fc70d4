// Tiling of the portable attention kernel, and what it keeps in shared memory.
#pragma once
#include <cstdint>

#include "cuda/portable/attend/geometry.cuh"

namespace sparsek::cuda::portable {

// What all threads of a block share and rarely need: kept in shared memory to leave the registers
// to the products.
struct BlockConstants {
  Sequence sequence;
  char const *k, *v;  // rows of the KV head's first key, bytes
  std::int32_t const* expiry;
  float const* scores;
  float const* threshold;
  std::int32_t const* list;
  std::int32_t const* group_expiry;
};

// Tiling for head dimensions up to kHeadDim.
//
// Registers of a thread, of 255: at kHeadDim = 128 a warp with 32 rows holds 128 output
// accumulators and 64 scores; at 256 only 16 rows fit. With 32 rows every fragment of K and V
// serves two products, which halves the shared-memory traffic: 160 bytes per product at D = 128,
// 1.25 cycles.
template <typename T, int kHeadDimension>
struct AttendConfig {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kNumWarps = 4;
  static constexpr int kNumThreads = kNumWarps * 32;
  static constexpr int kRowsPerWarp = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kRows = kNumWarps * kRowsPerWarp;
  static constexpr int kKeys = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kBlocksPerProcessor = kHeadDim <= 64 ? 3 : 2;
  // 16 bytes more than a row: eight consecutive rows then lie in eight different groups of four
  // banks.
  static constexpr int kRowElements = kHeadDim + 8;
  static constexpr int kRowBytes = kRowElements * 2;
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, in a row
  // Lanes that load a row together; each takes kPieces / kLanesPerRow pieces of it.
  static constexpr int kLanesPerRow = kPieces % 8 == 0 ? kPieces : 4;
  static constexpr int kPositionSlots = 3;  // this block's, the next one's, and one in flight

  struct SharedStorage {
    alignas(16) T q[kRows][kRowElements];  // at the end the output
    alignas(16) T k[kKeys][kRowElements];
    alignas(16) T v[kKeys][kRowElements];
    alignas(16) std::int32_t position[kPositionSlots][kKeys];  // of listed keys
    alignas(16) std::int32_t expiry[kKeys];
    alignas(16) float score[kKeys];
    std::int32_t window_begin[kRows];
    float threshold[kRows];
    BlockConstants constants;
  };
  // The smallest limit of a block among the architectures served is 99 KB (sm_86, sm_89, sm_120).
  static_assert(sizeof(SharedStorage) <= 99 * 1024);
  static_assert(kQueryTile % kRows == 0 && kKeyGroup % kKeys == 0);
};

}  // namespace sparsek::cuda::portable
