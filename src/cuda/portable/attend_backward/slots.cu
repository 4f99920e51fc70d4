// Small kernels around the products: slots of listed keys, and sums over the queries of a chunk.
#include "cuda/portable/attend_backward/slots.cuh"

#include <algorithm>
#include <cstdint>

namespace sparsek::cuda::portable {
namespace {

constexpr int kThreads = 256, kWarp = 32;

// How many of the block's threads before this one hold true; every thread takes part.
__device__ int count_before(bool value, int* warp_counts) {
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned const mask = __ballot_sync(~0u, value);
  if (lane == 0) warp_counts[warp] = __popc(mask);
  __syncthreads();
  int count = __popc(mask & ((1u << lane) - 1));
  for (int w = 0; w < warp; ++w) count += warp_counts[w];
  __syncthreads();
  return count;
}

// A block for each KV head and piece goes through the piece's tiles in order. A tile's list is the
// one before, without what expired, and behind it what enters (tile_lists.cu): so the first entering
// key stands behind as many entries as there are keys left in their slots.
__global__ void __launch_bounds__(kThreads)
    assign_slots_kernel(__grid_constant__ BackwardParams const p) {
  __shared__ int warp_counts[kThreads / kWarp];
  AttendParams const& a = p.a;
  int const kv_head = blockIdx.x / p.num_pieces, piece = blockIdx.x % p.num_pieces;
  PieceSpan const tiles = locate_piece(p, piece);
  int sequence = -1;  // of the tile before
  for (int tile = tiles.first; tile < tiles.last; ++tile) {
    TileSpan const span = locate_tile(a, tile);
    std::int64_t const index = static_cast<std::int64_t>(kv_head) * a.num_tiles + tile;
    std::int32_t const* const list = a.lists + index * a.list_capacity;
    int const count = a.list_count[index];
    std::int32_t* const slots = slot_row(p, kv_head, tile);
    if (tile == tiles.first || span.sequence.index != sequence) {
      for (int x = threadIdx.x; x < p.num_slots; x += kThreads) slots[x] = x < count ? list[x] : -1;
    } else {
      std::int32_t const* const before = slots - p.num_slots;
      std::int32_t const* const expiry = expiry_row(a, span.sequence, kv_head);
      auto const staying = [&](int x) {
        int const key = x < p.num_slots ? before[x] : -1;
        return key >= 0 && expiry[key] > span.first ? key : -1;
      };
      int stay = 0;
      for (int base = 0; base < p.num_slots; base += kThreads)
        stay += __syncthreads_count(staying(base + threadIdx.x) >= 0);
      for (int base = 0, free = 0; base < p.num_slots; base += kThreads) {
        int const x = base + static_cast<int>(threadIdx.x);
        int const key = staying(x);
        bool const is_free = x < p.num_slots && key < 0;
        int const entry = stay + free + count_before(is_free, warp_counts);
        if (x < p.num_slots) slots[x] = !is_free ? key : entry < count ? list[entry] : -1;
        free += __syncthreads_count(is_free);
      }
    }
    sequence = span.sequence.index;
    __syncthreads();  // the next tile reads what this one wrote
  }
}

// kLanes threads for each chunk, (sequence, KV head) rows in y of the grid.
template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    sum_gate_gradients_kernel(__grid_constant__ BackwardParams const p, int blocks_per_row) {
  __shared__ float warp_sums[kThreads / kWarp];
  AttendParams const& a = p.a;
  int const row = blockIdx.x / blocks_per_row;
  int const kv_head = row % a.num_kv_heads;
  Sequence const s = load_sequence(a, row / a.num_kv_heads);
  int const offset = s.query_offset(), lane = threadIdx.x % kLanes;
  int const first_chunk = offset / a.chunk_size;
  int const chunks = s.length > offset ? (s.length - 1) / a.chunk_size + 1 - first_chunk : 0;
  float* const sums = p.gate_gradient_sums + a.stride_chunk_batch * s.index +
                      a.stride_chunk_head * kv_head +
                      (a.cu_seqlens_k ? s.first_key / a.chunk_size + s.index : 0);
  constexpr int kChunksPerBlock = kThreads / kLanes;
  for (int x = blockIdx.x % blocks_per_row * kChunksPerBlock + threadIdx.x / kLanes;
       x - static_cast<int>(threadIdx.x) / kLanes < chunks; x += blocks_per_row * kChunksPerBlock) {
    float sum = 0.f;
    if (x < chunks) {
      std::int64_t const begin = static_cast<std::int64_t>(first_chunk + x) * a.chunk_size;
      int const first = static_cast<int>(begin < offset ? offset : begin);
      int const last =
          static_cast<int>(min(begin + a.chunk_size, static_cast<std::int64_t>(s.length)));
      for (int h = kv_head * a.group; h < (kv_head + 1) * a.group; ++h) {
        float const* const rows = p.gate_gradient + row_index(a, s, h, 0);
        for (int i = first + lane; i < last; i += kLanes) sum += rows[i - offset];
      }
    }
    if constexpr (kLanes > 1) {
      for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    }
    if constexpr (kLanes > kWarp) {
      __syncthreads();
      if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
      __syncthreads();
      sum = 0.f;
      for (float const part : warp_sums) sum += part;
    }
    if (lane == 0 && x < chunks) sums[first_chunk + x] = sum;
  }
}

template <int kLanes>
void launch_sums(BackwardParams const& p, std::int64_t chunks, cudaStream_t stream) {
  constexpr std::int64_t kMaxBlocks = 256;  // of a row
  constexpr std::int64_t kChunksPerBlock = kThreads / kLanes;
  auto const blocks =
      static_cast<int>(std::min(kMaxBlocks, (chunks + kChunksPerBlock - 1) / kChunksPerBlock));
  auto const rows = static_cast<unsigned>(p.a.batch) * static_cast<unsigned>(p.a.num_kv_heads);
  sum_gate_gradients_kernel<kLanes><<<rows * blocks, kThreads, 0, stream>>>(p, blocks);
}

}  // namespace

void assign_slots(BackwardParams const& p, cudaStream_t stream) {
  assign_slots_kernel<<<p.a.num_kv_heads * p.num_pieces, kThreads, 0, stream>>>(p);
}

void sum_gate_gradients(BackwardParams const& p, cudaStream_t stream) {
  // Of a sequence of mean length.
  std::int64_t const keys =
      p.a.cu_seqlens_k ? (p.a.seq_len_k + p.a.batch - 1) / p.a.batch : p.a.seq_len_k;
  std::int64_t const chunks = keys / p.a.chunk_size + 1;
  if (p.a.chunk_size < kWarp) {
    launch_sums<1>(p, chunks, stream);
  } else if (p.a.chunk_size < 1024) {
    launch_sums<kWarp>(p, chunks, stream);
  } else {
    launch_sums<kThreads>(p, chunks, stream);
  }
}

}  // namespace sparsek::cuda::portable
