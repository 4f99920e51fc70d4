// What is done to a block of scores before they are weighed: the causal mask, maxima.
//
// S holds two rows of a thread, `row` and `row + 8`, as the matrix units leave them: columns
// 8 j + 2 quad and the next one in S[4 j] and S[4 j + 1] for the first row, S[4 j + 2] and
// S[4 j + 3] for the second.
#pragma once
#include <cmath>

namespace sparsek::cuda::sm90 {

// Causal mask of the diagonal tile's keys kBegin ...
template <int kBegin, int N>
__device__ __forceinline__ void mask_future(float (&S)[N], int row, int quad) {
  int const last = row - 2 * quad;
#pragma unroll
  for (int j = kBegin / 8; j < N / 4; ++j) {
    if (8 * j > last) S[4 * j] = -INFINITY;
    if (8 * j + 1 > last) S[4 * j + 1] = -INFINITY;
    if (8 * j > last + 8) S[4 * j + 2] = -INFINITY;
    if (8 * j + 1 > last + 8) S[4 * j + 3] = -INFINITY;
  }
}

// The largest of a row's elements, which lie in the four threads of a quad.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
// Maxima of both rows, times `scale`.
template <int N>
__device__ __forceinline__ void row_max(float (&S)[N], float scale, float& x0, float& x1) {
  x0 = S[0], x1 = S[2];
  float y0 = S[1], y1 = S[3];
#pragma unroll
  for (int j = 1; j < N / 4; ++j) {
    x0 = fmaxf(x0, S[4 * j]), y0 = fmaxf(y0, S[4 * j + 1]);
    x1 = fmaxf(x1, S[4 * j + 2]), y1 = fmaxf(y1, S[4 * j + 3]);
  }
  x0 = quad_max(fmaxf(x0, y0)) * scale, x1 = quad_max(fmaxf(x1, y1)) * scale;
}

}  // namespace sparsek::cuda::sm90
