// Rows of q, k and v from global to shared memory.
#pragma once
#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/portable/attend/config.cuh"
#include "cuda/portable/attend/geometry.cuh"

namespace sparsek::cuda::portable {

// load_rows by elements, for rows that do not begin at multiples of 16 bytes.
template <typename Config, int kNumRows, typename T>
__device__ __noinline__ void load_rows_slowly(T (*destination)[Config::kRowElements],
                                              char const* base, std::int64_t stride, int first,
                                              std::int32_t const* position, int low, int high,
                                              int head_dim) {
  for (int x = threadIdx.x; x < kNumRows * Config::kPieces; x += Config::kNumThreads) {
    int const r = x / Config::kPieces, column = x % Config::kPieces * 8;
    bool const valid = r >= low && r < high;
    std::int64_t const row = !valid ? 0 : position ? position[r] : first + r;
    auto const* const source =
        reinterpret_cast<unsigned short const*>(base) + stride * row + column;
    alignas(16) unsigned short piece[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) piece[e] = valid && column + e < head_dim ? source[e] : 0;
    *reinterpret_cast<uint4*>(&destination[r][column]) = *reinterpret_cast<uint4 const*>(piece);
  }
}

// kNumRows rows of q, k or v to shared memory, zeros for those not in [low, high). Row r is row
// `first` + r of `base`, or `position`[r] where that is given.
template <typename Config, int kNumRows, typename T>
__device__ __forceinline__ void load_rows(AttendParams const& p,
                                          T (*destination)[Config::kRowElements], char const* base,
                                          std::int64_t stride, int first,
                                          std::int32_t const* position, int low, int high) {
  if (!p.aligned_loads) {
    load_rows_slowly<Config, kNumRows>(destination, base, stride, first, position, low, high,
                                       p.head_dim);
    return;
  }
  constexpr int kRowsPerThread = kNumRows * Config::kLanesPerRow / Config::kNumThreads;
  int const row = static_cast<int>(threadIdx.x) / Config::kLanesPerRow * kRowsPerThread;
  int const column = static_cast<int>(threadIdx.x) % Config::kLanesPerRow * 8;
  std::uint32_t const target = device::shared_address(&destination[row][column]);
  auto const stride_bytes =
      static_cast<std::uint32_t>(2 * stride);  // aligned_loads: no larger stride
  base += 2 * column;
  std::uint32_t index[kRowsPerThread];
  if (position) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; r += 2) {
      int2 const pair = *reinterpret_cast<int2 const*>(position + row + r);
      index[r] = pair.x;
      index[r + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) index[r] = max(first + row + r, 0);
  }
  if (low <= 0 && high >= kNumRows && p.head_dim == Config::kHeadDim) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      char const* const source = base + static_cast<std::uint64_t>(index[r]) * stride_bytes;
#pragma unroll
      for (int piece = 0; piece < Config::kPieces; piece += Config::kLanesPerRow)
        device::cp_async_16(target + r * Config::kRowBytes + piece * 16, source + piece * 16);
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      char const* const source = base + static_cast<std::uint64_t>(index[r]) * stride_bytes;
      bool const valid = row + r >= low && row + r < high;
#pragma unroll
      for (int piece = 0; piece < Config::kPieces; piece += Config::kLanesPerRow)
        device::cp_async_16(target + r * Config::kRowBytes + piece * 16, source + piece * 16,
                            valid && column + piece * 8 < p.head_dim);
    }
  }
}

}  // namespace sparsek::cuda::portable
