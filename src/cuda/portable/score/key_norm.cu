// u_j = -||k_j||_2, accumulated in float32. Bound by reading k once.
//
// Eight lanes share a key: with 16-byte loads they cover 128 bytes, a whole cache line, and a warp holds four keys' loads in flight
// for each step along the head dimension. Rows that are not 16-byte aligned take element loads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/portable/score/key_norm.hpp"
#include "cuda/runtime.hpp"
#include "sparsek/error.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr int kThreads = 256;
constexpr int kLanesPerKey = 8;
constexpr int kKeysPerBlock = kThreads / kLanesPerKey;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    key_norm_kernel(ScoreProblem p, unsigned blocks_per_row) {
  unsigned const row = blockIdx.x / blocks_per_row, block = blockIdx.x % blocks_per_row;
  std::int64_t const b = row / p.num_kv_heads, h = row % p.num_kv_heads;
  std::int64_t first = 0, num_keys = p.seq_len, valid = p.seq_len;
  if (p.cu_seqlens_k) {
    first = p.cu_seqlens_k[b];
    valid = num_keys = min(std::int64_t{p.cu_seqlens_k[b + 1]}, p.seq_len) - first;
  } else if (p.lengths) {
    valid = p.lengths[b];
  }
  int const lane = threadIdx.x % kLanesPerKey;
  int const head_dim = static_cast<int>(p.head_dim);
  for (std::int64_t j = std::int64_t{block} * kKeysPerBlock + threadIdx.x / kLanesPerKey;
       j < (num_keys + kKeysPerBlock - 1) / kKeysPerBlock * kKeysPerBlock;
       j += std::int64_t{blocks_per_row} * kKeysPerBlock) {
    float sum = 0.0f;
    if (j < valid) {
      T const* const key = static_cast<T const*>(p.k) + b * p.stride_k_batch + h * p.stride_k_head +
                           (first + j) * p.stride_k_position;
      if constexpr (kVector) {
        constexpr int kElements = 16 / sizeof(T);
        for (int d = lane * kElements; d < head_dim; d += kLanesPerKey * kElements) {
          alignas(16) T piece[kElements];
          *reinterpret_cast<int4*>(piece) = __ldg(reinterpret_cast<int4 const*>(key + d));
#pragma unroll
          for (int e = 0; e < kElements; ++e) sum += to_float(piece[e]) * to_float(piece[e]);
        }
      } else {
        for (int d = lane; d < head_dim; d += kLanesPerKey) {
          float const x = to_float(key[d]);
          sum += x * x;
        }
      }
    }
#pragma unroll
    for (int d = kLanesPerKey / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane == 0 && j < num_keys) {
      static_cast<float*>(p.scores)[b * p.stride_scores_batch + h * p.stride_scores_head +
                                    (first + j) * p.stride_scores_position] =
          j < valid ? -sqrtf(sum) : 0.0f;
    }
  }
}

template <typename T>
void launch(ScoreProblem const& p, cudaStream_t stream) {
  constexpr std::int64_t kElements = 16 / sizeof(T);
  auto const aligned = [](std::int64_t n) { return n % kElements == 0; };
  bool const vector = reinterpret_cast<std::uintptr_t>(p.k) % 16 == 0 && aligned(p.head_dim) &&
                      aligned(p.stride_k_batch) && aligned(p.stride_k_head) &&
                      aligned(p.stride_k_position);
  // A packed batch has as many blocks for each sequence as one of average length fills; longer ones loop.
  std::int64_t const keys =
      p.cu_seqlens_k ? std::max<std::int64_t>(p.seq_len / p.batch, kKeysPerBlock) : p.seq_len;
  auto const blocks_per_row = static_cast<unsigned>((keys + kKeysPerBlock - 1) / kKeysPerBlock);
  auto const grid = static_cast<unsigned>(p.batch * p.num_kv_heads * blocks_per_row);
  if (vector) {
    key_norm_kernel<T, true><<<grid, kThreads, 0, stream>>>(p, blocks_per_row);
  } else {
    key_norm_kernel<T, false><<<grid, kThreads, 0, stream>>>(p, blocks_per_row);
  }
  check_launch("key norm kernel");
}

}  // namespace

void key_norm_scores(Context const& context, ScoreProblem const& p) {
  switch (p.dtype) {
    case DataType::kFloat16:
      return launch<__half>(p, stream_of(context));
    case DataType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream_of(context));
    case DataType::kFloat32:
      return launch<float>(p, stream_of(context));
    default:
      throw Unsupported(
          std::string("key_norm_scores: k: expected float16, bfloat16 or float32 on CUDA, got ") +
          name_of(p.dtype));
  }
}

}  // namespace sparsek::cuda::portable
