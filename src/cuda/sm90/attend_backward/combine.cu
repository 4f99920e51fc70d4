// The small kernels around the large ones of the backward.
#include <algorithm>

#include "cuda/device/mma_sync.cuh"
#include "cuda/device/wgmma_shared.cuh"
#include "cuda/runtime.hpp"
#include "cuda/sm90/attend_backward/key_schedule.cuh"
#include "cuda/sm90/attend_backward/launch.hpp"

namespace sparsek::cuda::sm90::backward {
namespace {

constexpr int kWarps = 8;

unsigned blocks(std::int64_t wanted, std::int64_t most) {
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(wanted, most)));
}

// A warp per row; blocks along y share the heads.
__global__ void __launch_bounds__(32 * kWarps) clear_dq(__grid_constant__ BackwardParams const p) {
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int const heads = p.num_kv_heads * p.group;
  for (std::int64_t item = blockIdx.y; item < static_cast<std::int64_t>(p.batch) * heads;
       item += gridDim.y) {
    int const b = static_cast<int>(item / heads), head = static_cast<int>(item % heads);
    int const valid = min(max(p.lengths[b], 0), p.seq_len_k);
    int const first = max(0, valid - (p.seq_len_k - p.seq_len_q));
    for (int row = first + blockIdx.x * kWarps + warp; row < p.seq_len_q;
         row += gridDim.x * kWarps) {
      char* const dq =
          p.dq_rows + b * p.stride_dq_batch + head * p.stride_dq_head + row * p.stride_dq_position;
      for (int chunk = lane; chunk < p.head_dim / 8; chunk += 32) {
        reinterpret_cast<int4*>(dq)[chunk] = make_int4(0, 0, 0, 0);
      }
    }
  }
}

// A range of a segment, for all its slots.
__device__ SlotRange range_of(BackwardParams const& p, int row, int segment) {
  SlotRange range;
  range.set(p, (row * p.num_segments + segment) * p.num_blocks);
  return range;
}

// Where a segment's slots hold the key, or -1. They are ascending in (key % 128, key), then -1.
__device__ int find_inherited(BackwardParams const& p, std::int32_t const* keys, int key) {
  auto const rank = [](int j) {
    return j < 0 ? ~0ull
                 : static_cast<unsigned long long>(j % kTile) << 32 | static_cast<unsigned>(j);
  };
  int low = 0, high = p.num_blocks * kTile;
  while (low < high) {
    int const middle = (low + high) / 2;
    if (rank(keys[middle]) < rank(key))
      low = middle + 1;
    else
      high = middle;
  }
  return low < p.num_blocks * kTile && keys[low] == key ? low : -1;
}

// A warp per inherited slot. The first segment that inherited a key adds what all did, in order.
template <typename T, int kDim>
__global__ void __launch_bounds__(32 * kWarps)
    add_inherited_rows(__grid_constant__ BackwardParams const p) {
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int const slots = p.num_blocks * kTile;
  int const row = blockIdx.y, segment = 1 + blockIdx.z;
  SlotRange const range = range_of(p, row, segment);
  if (range.first >= range.end) return;
  std::int32_t const* const keys = p.inherited_keys + range.inherited_at(p, 0);
  int before = segment - 1;  // the last segment before that has tiles
  while (before >= 1) {
    SlotRange const other = range_of(p, row, before);
    if (other.first < other.end) break;
    --before;
  }
  constexpr int kEach = 2 * kDim / 32;  // columns of dk and dv a lane
  int const column = lane * kEach;
  for (int slot = blockIdx.x * kWarps + warp; slot < slots; slot += gridDim.x * kWarps) {
    int const key = keys[slot];
    if (key < 0) return;
    if (before >= 1 &&
        find_inherited(p, p.inherited_keys + range_of(p, row, before).inherited_at(p, 0), key) >=
            0) {
      continue;
    }
    float sum[kEach] = {}, score = 0.f;
    for (int s = segment; s < p.num_segments; ++s) {
      SlotRange const other = range_of(p, row, s);
      if (other.first >= other.end) continue;
      std::int64_t const base = other.inherited_at(p, 0);
      int const at = find_inherited(p, p.inherited_keys + base, key);
      if (at < 0) break;
      float const* const from = p.inherited_rows + (base + at) * (2 * kDim) + column;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum[i] += from[i];
      if (p.gate_gradients) score += p.inherited_scores[base + at];
    }
    bool const is_dk = column < kDim;
    int const c = is_dk ? column : column - kDim;
    if (c < p.head_dim) {
      auto* const to = reinterpret_cast<std::uint32_t*>(
          (is_dk ? range.head.dk_row(p, key) : range.head.dv_row(p, key)) + c * 2);
#pragma unroll
      for (int i = 0; i < kEach / 2; ++i) {
        float2 const x = device::unpack2<T>(to[i]);
        to[i] = device::pack2<T>(x.x + sum[2 * i], x.y + sum[2 * i + 1]);
      }
    }
    if (p.gate_gradients && lane == 0) p.dscores[range.head.dscore_at(p, key)] += score;
  }
}

// A warp per chunk; blocks along y share the heads.
template <Mode kMode>
__global__ void __launch_bounds__(32 * kWarps)
    sum_chunks(__grid_constant__ BackwardParams const p) {
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int const rows = (p.cu_seqlens_k ? 1 : p.batch) * p.num_kv_heads;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    int const kv_head = row % p.num_kv_heads;
    for (int at = blockIdx.x * kWarps + warp; at < p.num_chunks; at += gridDim.x * kWarps) {
      int sequence = row / p.num_kv_heads, chunk = at;
      if (p.cu_seqlens_k) {
        // The last sequence whose chunks begin at or before `at`.
        auto const first_chunk = [&](int b) {
          return min(max(p.cu_seqlens_k[b], 0), p.seq_len_k) / p.chunk_size + b;
        };
        int low = 0, high = p.batch;
        while (high - low > 1) {
          int const middle = (low + high) / 2;
          (first_chunk(middle) <= at ? low : high) = middle;
        }
        sequence = low, chunk = at - first_chunk(low);
      }
      KeyHead head;
      head.set(p, sequence, kv_head);
      std::int64_t const position = static_cast<std::int64_t>(chunk) * p.chunk_size;
      float sum = 0.f;
      if (kMode == Mode::kAligned) {
        int const tiles = p.chunk_size / kTile, each = p.num_blocks * 8;
        std::int64_t const begin = max(max(2, head.tiles.begin),
                                       static_cast<int>(min(position / kTile, INT64_C(1) << 30)));
        std::int64_t const end =
            min(static_cast<std::int64_t>(head.tiles.end), position / kTile + tiles);
        std::int64_t const first = static_cast<std::int64_t>(kv_head) * p.num_key_tiles +
                                   first_key_tile(p, sequence, head.tiles.first_k);
        for (std::int64_t i = begin * each + lane; i < end * each; i += 32) {
          int const t = static_cast<int>(i / each), block = static_cast<int>(i % each) / 8;
          if (t >= block + 2) sum += p.gate_partials[first * each + i];
        }
      } else {
        std::int64_t const begin = max(position, static_cast<std::int64_t>(head.tiles.q_offset));
        std::int64_t const end =
            min(position + p.chunk_size, static_cast<std::int64_t>(head.tiles.valid));
        for (int g = 0; g < p.group; ++g) {
          float const* const from = p.row_data + head.batch_coordinate(p) * p.stride_row_batch +
                                    (kv_head * p.group + g) * p.stride_row_head +
                                    kRowGateGradient * p.stride_row_array + head.tiles.first_q -
                                    head.tiles.q_offset;
          for (std::int64_t i = begin + lane; i < end; i += 32) sum += from[i];
        }
      }
#pragma unroll
      for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) {
        std::int64_t const to = p.cu_seqlens_k ? at : sequence * p.stride_chunk_batch + at;
        p.gate_gradient_sums[kv_head * p.stride_chunk_head + to] = sum;
      }
    }
  }
}

}  // namespace

void clear_missing_rows(BackwardParams const& p, cudaStream_t stream) {
  dim3 const grid(blocks((p.seq_len_q + kWarps - 1) / kWarps, 64),
                  blocks(static_cast<std::int64_t>(p.batch) * p.num_kv_heads * p.group, 65535));
  clear_dq<<<grid, 32 * kWarps, 0, stream>>>(p);
  check_launch("clear_dq");
}

template <typename T>
void add_inherited(BackwardParams const& p, int padded_dim, cudaStream_t stream) {
  dim3 const grid(p.num_blocks * kTile / kWarps / 4, p.batch * p.num_kv_heads, p.num_segments - 1);
  if (padded_dim == 64)
    add_inherited_rows<T, 64><<<grid, 32 * kWarps, 0, stream>>>(p);
  else
    add_inherited_rows<T, 128><<<grid, 32 * kWarps, 0, stream>>>(p);
  check_launch("add_inherited_rows");
}
template void add_inherited<__half>(BackwardParams const&, int, cudaStream_t);
template void add_inherited<__nv_bfloat16>(BackwardParams const&, int, cudaStream_t);

void sum_gate_gradients(BackwardParams const& p, Mode mode, cudaStream_t stream) {
  dim3 const grid(
      blocks((p.num_chunks + kWarps - 1) / kWarps, 1024),
      blocks(static_cast<std::int64_t>(p.cu_seqlens_k ? 1 : p.batch) * p.num_kv_heads, 65535));
  if (mode == Mode::kAligned)
    sum_chunks<Mode::kAligned><<<grid, 32 * kWarps, 0, stream>>>(p);
  else
    sum_chunks<Mode::kGeneral><<<grid, 32 * kWarps, 0, stream>>>(p);
  check_launch("sum_chunks");
}

}  // namespace sparsek::cuda::sm90::backward
