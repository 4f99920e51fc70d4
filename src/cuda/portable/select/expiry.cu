// From the k-th ranked key of every pool to the expiry of every key: one thread per key.
//
// A key leaves at the first chunk whose pool holds it and whose k-th key ranks before it. The k-th
// keys never fall in rank as pools grow, so the chunk is found by bisection. Most keys never enter
// the first k: their first chunk settles it.
#include "cuda/portable/select/geometry.cuh"
#include "cuda/portable/select/plan.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr int kThreads = 256;
constexpr int kKeysPerThread = 4;

// The chunk that drops a key which chunk `first` still keeps; `end` if none does.
__device__ int dropping_chunk(RankedKey const* kth, RankedKey const& key, int first, int end) {
  int last = end;
  // Gallop, then bisect: lifetimes are short compared with the row.
  for (int step = 1;; step *= 2) {
    int const probe = first + step;
    if (probe >= end) break;
    if (ranks_after(key.score, key.position, kth[probe])) {
      last = probe;
      break;
    }
    first = probe;
  }
  while (last - first > 1) {
    int const middle = first + (last - first) / 2;
    if (ranks_after(key.score, key.position, kth[middle])) {
      last = middle;
    } else {
      first = middle;
    }
  }
  return last;
}

__global__ void __launch_bounds__(kThreads)
    expiry_kernel(SelectProblem p, SelectWorkspace w, int tiles_per_row) {
  // Keys that outlive their first chunk, a minority, are queued so that whole warps search.
  __shared__ RankedKey queue[kThreads * kKeysPerThread];
  __shared__ int queue_first[kThreads * kKeysPerThread];
  __shared__ int queued;
  Row const r = row_of(p, blockIdx.x / tiles_per_row);
  RankedKey const* const kth = w.kth + r.chunks;
  auto const chunk_size = static_cast<unsigned>(p.chunk_size);
  auto const window = static_cast<unsigned>(p.window);
  int* const expiry = p.expiry + r.expiry;
  int constexpr kTile = kThreads * kKeysPerThread;
  unsigned const step_chunks = kThreads / chunk_size, step_rest = kThreads % chunk_size;
  int const lane = threadIdx.x % 32;
  for (int begin = blockIdx.x % tiles_per_row * kTile; begin < r.num_keys;
       begin += tiles_per_row * kTile) {
    float u[kKeysPerThread];
    float const* const scores = r.scores + (begin + static_cast<int>(threadIdx.x)) * r.stride;
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      int const j = begin + i * kThreads + threadIdx.x;
      u[i] = j < r.valid ? sanitized(scores[i * kThreads * r.stride]) : 0.0f;
    }
    __syncthreads();  // the last tile's queue is done with
    if (threadIdx.x == 0) queued = 0;
    __syncthreads();
    // The first chunk whose pool holds a key is (j + w) / C + 1: divided once, then stepped.
    unsigned const shifted = begin + threadIdx.x + window;
    unsigned chunk = shifted / chunk_size + 1, rest = shifted % chunk_size;
    int first[kKeysPerThread];
    unsigned searching[kKeysPerThread];
    int total = 0;
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      int const j = begin + i * kThreads + threadIdx.x;
      first[i] = static_cast<int>(chunk);
      bool search = false;
      if (j < r.valid && first[i] < r.used_chunks) {
        search = !ranks_after(u[i], j, kth[first[i]]);
        if (!search) expiry[j] = first[i] * static_cast<int>(chunk_size);
      } else if (j < r.num_keys) {
        expiry[j] = j < r.valid ? r.valid : j;  // never dropped, or does not exist
      }
      searching[i] = __ballot_sync(~0u, search);
      total += __popc(searching[i]);
      chunk += step_chunks, rest += step_rest;
      if (rest >= chunk_size) ++chunk, rest -= chunk_size;
    }
    int at = 0;
    if (lane == 0) at = atomicAdd(&queued, total);
    at = __shfl_sync(~0u, at, 0);
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      if (searching[i] >> lane & 1) {
        int const mine = at + __popc(searching[i] & ((1u << lane) - 1));
        queue[mine] = {u[i], begin + i * kThreads + static_cast<int>(threadIdx.x)};
        queue_first[mine] = first[i];
      }
      at += __popc(searching[i]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < queued; i += kThreads) {
      RankedKey const key = queue[i];
      int const last = dropping_chunk(kth, key, queue_first[i], r.used_chunks);
      expiry[key.position] = last >= r.used_chunks ? r.valid : last * static_cast<int>(chunk_size);
    }
  }
}

}  // namespace

void launch_expiry(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& w,
                   cudaStream_t stream) {
  // As many blocks for a packed sequence as one of average length fills; longer ones loop.
  std::int64_t const keys = p.cu_seqlens_k ? (p.seq_len + p.batch - 1) / p.batch : p.seq_len;
  int const tiles = ceil_div(keys, kThreads * kKeysPerThread);
  expiry_kernel<<<static_cast<unsigned>(plan.rows) * tiles, kThreads, 0, stream>>>(p, w, tiles);
  check_launch("select expiry kernel");
}

}  // namespace sparsek::cuda::portable
