// Which tiles a block works on: static contiguous ranges of equal cost.
//
// The order is: sequences, KV heads, tiles, query heads of the group. A tile's cost is the number
// of its 128-key blocks. Every block takes the tiles whose first unit of cost lies in its share of
// the total; it may start in the middle of a head.
#pragma once
#include "cuda/sm90/attend/config.hpp"

namespace sparsek::cuda::sm90 {

// Blocks of tile t: diagonal, window, slots in use.
__device__ __forceinline__ int slot_blocks(int t, int num_blocks) {
  return max(0, min(num_blocks, t - 1));
}
__device__ __forceinline__ int tile_cost(int t, int num_blocks) {
  return t == 0 ? 1 : 2 + slot_blocks(t, num_blocks);
}
// Cost of tiles 0 ... t - 1.
__device__ __forceinline__ std::int64_t cost_before(int t, int num_blocks) {
  if (t <= 0) return 0;
  // Tile s in 1 ... num_blocks + 1 costs s + 1, later ones 2 + num_blocks.
  std::int64_t const rising = min(t - 1, num_blocks + 1);
  return 1 + rising * (rising + 3) / 2 + (t - 1 - rising) * (2 + num_blocks);
}

// Where a sequence lies and which of its tiles have queries. Bad values are clamped: results are
// then unspecified, accesses are not.
struct SequenceTiles {
  int first_q, first_k;  // in a packed tensor
  int q_offset;          // position of its first query
  int valid;             // positions that exist
  int begin, end;        // tiles

  __device__ __forceinline__ std::int64_t cost(int num_blocks) const {
    return end > begin ? cost_before(end, num_blocks) - cost_before(begin, num_blocks) : 0;
  }
};

__device__ __forceinline__ SequenceTiles sequence_tiles(Params const& p, int b) {
  SequenceTiles s{};
  int num_queries = p.seq_len_q, num_keys = p.seq_len_k;
  if (p.cu_seqlens_k) {
    s.first_k = min(max(p.cu_seqlens_k[b], 0), p.seq_len_k);
    num_keys = min(max(p.cu_seqlens_k[b + 1], s.first_k), p.seq_len_k) - s.first_k;
    s.first_q = min(max(p.cu_seqlens_q[b], 0), p.seq_len_q);
    num_queries =
        min(min(max(p.cu_seqlens_q[b + 1], s.first_q), p.seq_len_q) - s.first_q, num_keys);
    s.valid = num_keys;
  } else {
    s.valid = p.lengths ? min(max(p.lengths[b], 0), p.seq_len_k) : p.seq_len_k;
  }
  s.q_offset = num_keys - num_queries;
  s.begin = s.q_offset / kTile;
  s.end = num_queries > 0 && s.valid > s.q_offset ? (s.valid + kTile - 1) / kTile : s.begin;
  return s;
}

// Walks the tiles of a range.
struct Cursor {
  int sequence, kv_head, t, g;  // the current tile of query head kv_head * group + g
  SequenceTiles tiles;
  // Cost from the current tile to the end of the range; the tile is in it where this is positive.
  int left;

  __device__ __forceinline__ bool done() const { return left <= 0; }

  // To the first tile of this thread block's range.
  __device__ __forceinline__ void start(Params const& p) {
    std::int64_t total, base = 0;
    if (p.cost_prefix) {
      total = p.cost_prefix[p.batch];
    } else {
      tiles = sequence_tiles(p, 0);
      total = tiles.cost(p.num_blocks) * p.group * p.num_kv_heads * p.batch;
    }
    std::int64_t const wanted = total * blockIdx.x / gridDim.x;
    left = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x - wanted);
    if (done()) return;
    if (p.cost_prefix) {
      // The last sequence that starts at or before `wanted`; it is not empty.
      int low = 0, high = p.batch;
      while (high - low > 1) {
        int const middle = (low + high) / 2;
        (p.cost_prefix[middle] <= wanted ? low : high) = middle;
      }
      sequence = low;
      base = p.cost_prefix[low];
    } else {
      std::int64_t const per_sequence = total / p.batch;
      sequence = static_cast<int>(wanted / per_sequence);
      base = sequence * per_sequence;
    }
    tiles = sequence_tiles(p, sequence);
    std::int64_t const per_head = tiles.cost(p.num_blocks) * p.group;
    kv_head = static_cast<int>((wanted - base) / per_head);
    base += kv_head * per_head;
    std::int64_t const skipped = cost_before(tiles.begin, p.num_blocks);
    // The last tile that starts at or before `wanted`.
    int low = tiles.begin, high = tiles.end;
    while (high - low > 1) {
      int const middle = (low + high) / 2;
      ((cost_before(middle, p.num_blocks) - skipped) * p.group <= wanted - base ? low : high) =
          middle;
    }
    t = low;
    g = 0;
    left += static_cast<int>(wanted - base - (cost_before(t, p.num_blocks) - skipped) * p.group);
    for (std::int64_t at = base + (cost_before(t, p.num_blocks) - skipped) * p.group;
         at < wanted;) {
      at += tile_cost(t, p.num_blocks);
      advance(p);
    }
  }

  // Whether another tile of the range follows the current one.
  __device__ __forceinline__ bool has_next(Params const& p) const {
    return left > tile_cost(t, p.num_blocks);
  }

  // To the next tile; true where it belongs to another head.
  __device__ __forceinline__ bool advance(Params const& p) {
    left -= tile_cost(t, p.num_blocks);
    if (++g < p.group) return false;
    g = 0;
    if (++t < tiles.end) return false;
    enter_next_head(p);
    return true;
  }
  // The same past the other query heads of the group, to the next tile of keys. False at the end of
  // the range.
  __device__ __forceinline__ bool advance_keys(Params const& p, bool& new_head) {
    left -= tile_cost(t, p.num_blocks) * (p.group - g);
    if (done()) return false;
    g = 0;
    new_head = ++t == tiles.end;
    if (new_head) enter_next_head(p);
    return true;
  }

 private:
  __device__ __forceinline__ void enter_next_head(Params const& p) {
    if (++kv_head == p.num_kv_heads) {
      kv_head = 0;
      ++sequence;
      if (p.cost_prefix) {
        while (sequence < p.batch &&
               (tiles = sequence_tiles(p, sequence), tiles.end <= tiles.begin)) {
          ++sequence;
        }
      }
    }
    t = tiles.begin;
  }
};

}  // namespace sparsek::cuda::sm90
