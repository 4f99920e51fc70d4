// Prepares the tiles of an attention call: where the tiles of packed sequences lie, the latest
// expiry of each group of keys, and for each tile the ascending list of the pool keys that it sees.
//
// A key that has left never returns, and a tile's first query sees every pool key of the tile's
// list. So the list of a tile is the list of the tile before without what expired, followed by
// those keys of the tile's advance that are still visible: a warp walks a run of consecutive tiles.
// Where a run begins in mid-sequence the first list comes from a scan of all keys before it, which
// skips the groups of keys that are wholly expired.
#include "cuda/portable/attend/tile_lists.cuh"

#include <algorithm>
#include <cstdint>

namespace sparsek::cuda::portable {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kEnumerateThreads = 1024;
// Runs of tiles are cut so that this many warps have work, if there are as many tiles: 16 for each
// of 132 processors.
constexpr int kTargetWarps = 2048;
// But not shorter than this: a run pays one scan.
constexpr int kMinRun = 4;

// Packed batches: first_tile[b] and tile_sequence, by one block. NOTE: one block is enough; 64
// sequences of 8192 tokens are 4096 tiles.
__global__ void __launch_bounds__(kEnumerateThreads) enumerate_tiles(AttendParams const p) {
  __shared__ int warp_total[kEnumerateThreads / kWarp];
  int const tid = threadIdx.x, lane = tid % kWarp, warp = tid / kWarp;
  int before = 0;
  for (int base = 0; base < p.batch; base += kEnumerateThreads) {
    int tiles = 0;
    if (base + tid < p.batch) {
      Sequence const s = load_sequence(p, base + tid);
      tiles = count_tiles(s.query_offset(), s.num_keys);
    }
    int sum = tiles;
    for (int d = 1; d < kWarp; d *= 2) {
      int const other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == kWarp - 1) warp_total[warp] = sum;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kEnumerateThreads / kWarp; ++w) {
      if (w < warp) sum += warp_total[w];
      all += warp_total[w];
    }
    if (base + tid < p.batch) p.first_tile[base + tid] = before + sum - tiles;
    before += all;
    __syncthreads();
  }
  if (tid == 0) p.first_tile[p.batch] = before;
  __syncthreads();
  for (int tile = tid; tile < p.num_tiles; tile += kEnumerateThreads) {
    int low = 0, high = p.batch;  // the last sequence with first_tile <= tile
    while (high - low > 1) {
      int const middle = (low + high) / 2;
      (p.first_tile[middle] <= tile ? low : high) = middle;
    }
    p.tile_sequence[tile] = tile < before ? low : -1;
  }
}

// blocks_per_row blocks for each (sequence, KV head); each warp takes groups of keys in turn.
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    find_group_expiry(AttendParams const p, int blocks_per_row) {
  int const row = blockIdx.x / blocks_per_row, lane = threadIdx.x % kWarp;
  int const kv_head = row % p.num_kv_heads;
  Sequence const s = load_sequence(p, row / p.num_kv_heads);
  std::int32_t const* const expiry = expiry_row(p, s, kv_head);
  std::int32_t* const out = group_expiry_row(p, s, kv_head);
  int const groups = (s.num_keys + kKeyGroup - 1) / kKeyGroup;
  int const first = blockIdx.x % blocks_per_row * kWarpsPerBlock + threadIdx.x / kWarp;
  for (int g = first; g < groups; g += blocks_per_row * kWarpsPerBlock) {
    int latest = 0;
    for (int j = g * kKeyGroup + lane; j < min((g + 1) * kKeyGroup, s.num_keys); j += kWarp)
      latest = max(latest, expiry[j]);
    latest = __reduce_max_sync(~0u, latest);
    if (lane == 0) out[g] = latest;
  }
}

// A list that a warp appends to in lane order. What exceeds the capacity is dropped: no list of a
// true selection does.
struct ListWriter {
  std::int32_t* list;
  int capacity, size;

  __device__ void append(int key, bool keep, int lane) {
    unsigned const mask = __ballot_sync(~0u, keep);
    int const slot = size + __popc(mask & ((1u << lane) - 1));
    if (keep && slot < capacity) list[slot] = key;
    size = min(size + __popc(mask), capacity);
  }
};

// Appends the keys of [first, last) that expire after position i.
__device__ void append_range(ListWriter& out, std::int32_t const* expiry, int first, int last,
                             int i, int lane) {
  constexpr int kUnroll = 4;  // loads in flight
  for (int base = first; base < last; base += kUnroll * kWarp) {
    int e[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int const j = base + u * kWarp + lane;
      e[u] = j < last ? expiry[j] : INT_MIN;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) out.append(base + u * kWarp + lane, e[u] > i, lane);
  }
}

// Appends the keys before `last` that expire after position i, group by group.
__device__ void append_prefix(ListWriter& out, std::int32_t const* expiry,
                              std::int32_t const* group_expiry, int last, int i, int lane) {
  constexpr int kUnroll = 4;  // groups at once
  int const groups = (last + kKeyGroup - 1) / kKeyGroup;
  for (int base = 0; base < groups; base += kWarp) {
    bool const live = base + lane < groups && group_expiry[base + lane] > i;
    unsigned mask = __ballot_sync(~0u, live);
    while (mask) {
      int key[kUnroll], e[kUnroll][kKeyGroup / kWarp];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        key[u] = mask ? (base + __ffs(mask) - 1) * kKeyGroup + lane : last;
        mask &= mask - 1;
#pragma unroll
        for (int x = 0; x < kKeyGroup / kWarp; ++x) {
          int const j = key[u] + x * kWarp;
          e[u][x] = j < last ? expiry[j] : INT_MIN;
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int x = 0; x < kKeyGroup / kWarp; ++x)
          out.append(key[u] + x * kWarp, e[u][x] > i, lane);
    }
  }
}

// Appends the keys of another list that expire after position i.
__device__ void append_list(ListWriter& out, std::int32_t const* expiry, std::int32_t const* list,
                            int size, int i, int lane) {
  constexpr int kUnroll = 4;
  for (int base = 0; base < size; base += kUnroll * kWarp) {
    int key[kUnroll], e[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int const x = base + u * kWarp + lane;
      key[u] = x < size ? list[x] : -1;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) e[u] = key[u] >= 0 ? expiry[key[u]] : INT_MIN;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) out.append(key[u], e[u] > i, lane);
  }
}

// One warp for each KV head and run of `run` tiles.
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    build_tile_lists(AttendParams const p, int run, int runs) {
  int const lane = threadIdx.x % kWarp;
  std::int64_t const work =
      static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  int const kv_head = static_cast<int>(work / runs);
  if (kv_head >= p.num_kv_heads) return;
  int const first = static_cast<int>(work % runs) * run;
  int sequence = -1, size = 0, end = 0;  // of the tile before
  std::int32_t const* list = nullptr;
  for (int tile = first; tile < min(first + run, p.num_tiles); ++tile) {
    TileSpan const span = locate_tile(p, tile);
    std::int64_t const index = static_cast<std::int64_t>(kv_head) * p.num_tiles + tile;
    ListWriter out{p.lists + index * p.list_capacity, p.list_capacity, 0};
    int const i = span.first;
    int const next_end = span.first < min(span.last, span.sequence.length) ? list_end(p, i) : 0;
    if (next_end > 0) {
      std::int32_t const* const expiry = expiry_row(p, span.sequence, kv_head);
      if (span.sequence.index != sequence) {
        append_prefix(out, expiry, group_expiry_row(p, span.sequence, kv_head), next_end, i, lane);
      } else {
        append_list(out, expiry, list, size, i, lane);
        append_range(out, expiry, end, next_end, i, lane);
      }
    }
    if (lane == 0) p.list_count[index] = out.size;
    sequence = span.sequence.index;
    size = out.size;
    end = next_end;
    list = out.list;
    __syncwarp();  // the next tile's reads come after this one's writes
  }
}

unsigned ceil_div(std::int64_t a, std::int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace

void prepare_tiles(AttendParams const& p, cudaStream_t stream) {
  if (p.cu_seqlens_k) enumerate_tiles<<<1, kEnumerateThreads, 0, stream>>>(p);

  // Long rows are shared by several blocks, many short ones take one each.
  std::int64_t const rows = static_cast<std::int64_t>(p.batch) * p.num_kv_heads;
  std::int64_t const groups = (p.seq_len_k + kKeyGroup - 1) / kKeyGroup;
  std::int64_t const wanted = std::max<std::int64_t>(1, kTargetWarps / rows);
  int const blocks_per_row = static_cast<int>(
      std::clamp<std::int64_t>((groups + kWarpsPerBlock - 1) / kWarpsPerBlock, 1, wanted));
  find_group_expiry<<<static_cast<unsigned>(rows * blocks_per_row), kWarpsPerBlock * kWarp, 0,
                      stream>>>(p, blocks_per_row);

  if (p.source != KeySource::kLists) return;
  std::int64_t const tiles = static_cast<std::int64_t>(p.num_tiles) * p.num_kv_heads;
  int const run = static_cast<int>(
      std::clamp<std::int64_t>(tiles / kTargetWarps, std::min(kMinRun, p.num_tiles), p.num_tiles));
  int const runs = static_cast<int>(ceil_div(p.num_tiles, run));
  build_tile_lists<<<ceil_div(static_cast<std::int64_t>(runs) * p.num_kv_heads, kWarpsPerBlock),
                     kWarpsPerBlock * kWarp, 0, stream>>>(p, run, runs);
}

}  // namespace sparsek::cuda::portable
