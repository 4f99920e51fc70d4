// The states of short chunks, of which many lie between two marks: a warp walks from one pool to
// another, 32 keys at a time, and has the state after each. It sees ranks, not scores: entry_of
// says where in the sorted list each key of the round stands.
#pragma once
#include "cuda/portable/select/walk.cuh"

namespace sparsek::cuda::portable {

struct ShortChunks {
  SelectProblem const& p;
  Row const& r;
  SortedList const& list;
  int const* entry_of;           // [keys of the round]: PoolWalker::kNone if not in the list
  float* thresholds;             // [chunks of the round]; of non-empty pools are written
  int first_key, first_chunk;    // of the round
  std::int32_t* last_candidate;  // of the row, or null: not wanted or all -1

  // From the pool of `begin` keys to that of `end`. Writes the thresholds and last candidates of
  // the chunks whose pools end behind `begin`, up to `end`, and when the keys that they drop
  // expire.
  __device__ void walk(PoolWalker& walker, int begin, int end) const {
    int const lane = threadIdx.x % 32;
    auto const chunk_size = static_cast<unsigned>(p.chunk_size);
    auto const window = static_cast<unsigned>(p.window);
    int* const expiry = p.expiry + r.expiry;
    walker.settle(begin);
    for (int base = begin; base < end; base += 32) {
      int const j = base + lane;
      int const index = j < end ? entry_of[j - first_key] : PoolWalker::kNone;
      // The first chunk whose pool holds the key.
      unsigned const chunk = (j + window) / chunk_size + 1;
      PoolWalker::Here const here = walker.enter(base, index);
      // NOTE: a key that is not among the first k of the keys up to any key of the chunk's pool is
      // not among those of the pool.
      int const drops_at = static_cast<int>(chunk * chunk_size);
      if (index != PoolWalker::kNone && index > here.kth) expiry[j] = drops_at;
      if (here.evicted != PoolWalker::kNone) expiry[list.keys[here.evicted].position] = drops_at;
      bool const completes_chunk = j < end && j + 1 + window == chunk * chunk_size;
      if (!completes_chunk) continue;
      thresholds[chunk - first_chunk] = here.threshold(list);
      if (last_candidate) {
        last_candidate[chunk] = here.cut == PoolWalker::kNone ? -1 : list.keys[here.cut].position;
      }
    }
  }
};

}  // namespace sparsek::cuda::portable
