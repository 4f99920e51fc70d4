// From the k-th ranked key of every pool to the expiry of every key: one thread per key.
//
// A key leaves at the first chunk whose pool holds it and whose k-th key ranks before it. The k-th keys never fall in rank as
// pools grow, so the chunk is found by bisection. Most keys never enter the first k: their first chunk settles it.
#include "cuda/portable/select/geometry.cuh"
#include "cuda/portable/select/plan.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr int kThreads = 256;
constexpr int kKeysPerThread = 4;

__global__ void __launch_bounds__(kThreads)
    expiry_kernel(SelectProblem p, SelectWorkspace w, int tiles_per_row) {
  Row const r = row_of(p, blockIdx.x / tiles_per_row);
  int const tile = blockIdx.x % tiles_per_row;
  float const* const kth_score = w.kth_score + r.chunks;
  int const* const kth_position = w.kth_position + r.chunks;
  int const chunk_size = static_cast<int>(p.chunk_size), window = static_cast<int>(p.window);
  float u[kKeysPerThread];
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    int const j = (tile * kKeysPerThread + i) * kThreads + threadIdx.x;
    u[i] = j < r.valid ? sanitized(r.scores[j * r.stride]) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    int const j = (tile * kKeysPerThread + i) * kThreads + threadIdx.x;
    if (j >= r.num_keys) continue;
    int expiry = j;  // of a key that does not exist
    if (j < r.valid) {
      auto const dropped = [&](int chunk) {
        return ranks_after(u[i], j, RankedKey{kth_score[chunk], kth_position[chunk]});
      };
      int first = static_cast<int>((std::int64_t{j} + window) / chunk_size) + 1;
      int last = r.used_chunks;  // here: never dropped
      if (first < last && dropped(first)) last = first;
      // Gallop, then bisect: lifetimes are short compared with the row.
      for (int step = 1; first < last; step *= 2) {
        int const probe = min(first + step, last);
        if (probe == last || dropped(probe)) {
          last = probe;
          break;
        }
        first = probe;
      }
      // Chunk `first` keeps the key (or first == last), chunk `last` drops it or is the end.
      while (last - first > 1) {
        int const middle = first + (last - first) / 2;
        if (dropped(middle)) {
          last = middle;
        } else {
          first = middle;
        }
      }
      expiry = last >= r.used_chunks ? r.valid : last * chunk_size;
    }
    p.expiry[r.expiry + j] = expiry;
  }
}

}  // namespace

void launch_expiry(SelectProblem const& p, SelectPlan const& plan, SelectWorkspace const& w,
                   cudaStream_t stream) {
  int const tiles = ceil_div(p.seq_len, kThreads * kKeysPerThread);
  expiry_kernel<<<static_cast<unsigned>(plan.rows) * tiles, kThreads, 0, stream>>>(p, w, tiles);
  check_launch("select expiry kernel");
}

}  // namespace sparsek::cuda::portable
