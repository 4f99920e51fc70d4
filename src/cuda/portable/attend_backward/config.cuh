// Tilings of the portable backward kernels, and what they keep in shared memory.
#pragma once
#include <cstdint>

#include "cuda/portable/attend/geometry.cuh"

namespace sparsek::cuda::portable {

// The smallest limit of a block among the architectures served (sm_86, sm_89, sm_120).
inline constexpr int kMaxSharedBytes = 99 * 1024;

// Warps of a block. NOTE: measured; at 64, where a warp's products are short, eight warps with half
// of the registers are faster than four, at 128 they are slower (attend_backward_portable.md).
constexpr int num_warps(int head_dim) { return head_dim <= 64 ? 8 : 4; }

// What load_rows wants to know of a tiling (attend/load_rows.cuh).
template <int kHeadDimension>
struct RowConfig {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kNumWarps = num_warps(kHeadDimension);
  static constexpr int kNumThreads = kNumWarps * 32;
  // 16 bytes more than a row: eight consecutive rows then lie in eight different groups of four
  // banks.
  static constexpr int kRowElements = kHeadDim + 8;
  static constexpr int kRowBytes = kRowElements * 2;
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, in a row
  static constexpr int kLanesPerRow = kPieces;
  static_assert(32 % kLanesPerRow == 0);
};

// Where the rows of a KV head begin: kept in shared memory to leave the registers to the products.
struct KeyRows {
  char const *k, *v;
  std::int32_t const* expiry;
  float const* scores;
};

// dq: a block owns kRows queries and goes through keys, kKeys at once.
//
// Registers of a thread, of 255, at kHeadDim = 128: 128 accumulators of dq, 32 of S and 32 of dP;
// at 256, where a warp has only 16 rows: 128, 8 and 8; at 64, of 128: 32, 32 and 32. K has two
// buffers: dq needs it last.
template <typename T, int kHeadDimension>
struct QueryConfig : RowConfig<kHeadDimension> {
  using Base = RowConfig<kHeadDimension>;
  static constexpr int kRows = kHeadDimension <= 128 ? 128 : 64;
  static constexpr int kRowsPerWarp = kRows / Base::kNumWarps;
  static constexpr int kKeys = kHeadDimension <= 64 ? 64 : kHeadDimension <= 128 ? 32 : 16;
  static constexpr int kBlocksPerProcessor = kHeadDimension <= 128 ? 2 : 1;
  static constexpr int kStages = 2;  // of K, of positions, of key data

  struct SharedStorage {
    alignas(16) T q[kRows][Base::kRowElements];  // at the end dq
    alignas(16) T dout[kRows][Base::kRowElements];
    alignas(16) T k[kStages][kKeys][Base::kRowElements];
    alignas(16) T v[kKeys][Base::kRowElements];
    alignas(16) std::int32_t position[kStages][kKeys];  // of listed keys
    alignas(16) std::int32_t expiry[kStages][kKeys];
    alignas(16) float score[kStages][kKeys];
    float lse2[kRows], delta[kRows], threshold[kRows];
    std::int32_t window_begin[kRows];
    KeyRows keys;
  };
  static_assert(sizeof(SharedStorage) <= kMaxSharedBytes);
  static_assert(kQueryTile % kRows == 0 && kKeyGroup % kKeys == 0);
};

// dk and dv: a block owns kKeys keys and goes through queries, kQueries at once. Two by two warps
// (at 64 two by four): of S and dP each has half of the keys and a part of the queries, of dk and
// dv half of the keys and a part of the head dimension. P and dS change hands through shared
// memory.
//
// Registers of a thread, of 255, at kHeadDim = 128: 64 accumulators each of dk and dv, 32 each of S
// and dP. With 32 keys to a warp a fragment serves two products, which costs 220 bytes of shared
// memory per product (1.7 cycles); 16 keys to a warp, P and dS kept in registers: 288.
template <typename T, int kHeadDimension>
struct KeyConfig : RowConfig<kHeadDimension> {
  using Base = RowConfig<kHeadDimension>;
  static constexpr int kKeyWarps = 2, kColumnWarps = Base::kNumWarps / kKeyWarps;
  static constexpr int kKeys = kHeadDimension <= 128 ? 64 : 32;
  static constexpr int kQueries = kHeadDimension <= 128 ? 64 : 32;
  static constexpr int kBlocksPerProcessor = kHeadDimension <= 128 ? 2 : 1;
  static constexpr int kKeysPerWarp = kKeys / kKeyWarps;
  static constexpr int kQueriesPerWarp = kQueries / kColumnWarps;
  static constexpr int kDimsPerWarp = kHeadDimension / kColumnWarps;
  static constexpr int kWeightElements = kQueries + 8;  // of a row of P and dS, padded likewise

  struct SharedStorage {
    alignas(16) T k[kKeys][Base::kRowElements];
    alignas(16) T v[kKeys][Base::kRowElements];
    alignas(16) T q[kQueries][Base::kRowElements];     // at the end dk
    alignas(16) T dout[kQueries][Base::kRowElements];  // at the end dv
    alignas(16) T p[kKeys][kWeightElements];
    alignas(16) T ds[kKeys][kWeightElements];
    alignas(16) float lse2[kQueries], delta[kQueries], threshold[kQueries];
    alignas(16) std::int32_t window_begin[kQueries];
    std::int32_t position[kKeys];  // -1: an empty slot
    std::int32_t expiry[kKeys];
    float score[kKeys];
    float dscores[kColumnWarps][kKeys];  // of the warps with each part of the queries
    // A bit for each slot; two buffers, so that one barrier is enough.
    std::uint32_t leaving[2][2], entering[2][2];
    std::int32_t first_piece[kKeys], last_piece[kKeys];  // that list the key; first -1: none does
  };
  static_assert(sizeof(SharedStorage) <= kMaxSharedBytes);
  static_assert(kKeys == kQueries && kQueryTile % kQueries == 0 && kKeyGroup % kKeys == 0);
};

}  // namespace sparsek::cuda::portable
