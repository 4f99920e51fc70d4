// What the blocks of the key kernels work on, and which queries pass by.
#pragma once
#include "cuda/sm90/attend/schedule.cuh"
#include "cuda/sm90/attend_backward/config.hpp"

namespace sparsek::cuda::sm90::backward {

// The first key tile of a sequence, among those of all sequences. Packed: an upper bound of what
// the sequences before it take, so that no prefix sum is needed.
__device__ __forceinline__ int first_key_tile(BackwardParams const& p, int sequence, int first_k) {
  return p.cu_seqlens_k ? first_k / kTile + sequence
                        : sequence * ((p.seq_len_k + kTile - 1) / kTile);
}

// One KV head of one sequence.
struct KeyHead {
  int sequence, kv_head;
  SequenceTiles tiles;
  int num_rows;  // keys that have rows in dk and dv: also those that do not exist (lengths)

  __device__ __forceinline__ void set(BackwardParams const& p, int sequence_, int kv_head_) {
    sequence = sequence_, kv_head = kv_head_;
    tiles = sequence_tiles(p, sequence);
    num_rows = p.cu_seqlens_k ? tiles.valid : p.seq_len_k;
  }
  __device__ __forceinline__ int batch_coordinate(BackwardParams const& p) const {
    return p.cu_seqlens_k ? 0 : sequence;
  }
  __device__ __forceinline__ std::int64_t expiry_row(BackwardParams const& p) const {
    return sequence * p.stride_expiry_batch + kv_head * p.stride_expiry_head + tiles.first_k;
  }
  __device__ __forceinline__ std::int64_t score_at(BackwardParams const& p, int key) const {
    return sequence * p.stride_scores_batch + kv_head * p.stride_scores_head +
           (tiles.first_k + key) * p.stride_scores_position;
  }
  __device__ __forceinline__ std::int64_t dscore_at(BackwardParams const& p, int key) const {
    return sequence * p.stride_dscores_batch + kv_head * p.stride_dscores_head +
           (tiles.first_k + key) * p.stride_dscores_position;
  }
  __device__ __forceinline__ std::int64_t chunk_row(BackwardParams const& p) const {
    std::int64_t const first = p.cu_seqlens_k ? tiles.first_k / p.chunk_size + sequence : 0;
    return sequence * p.stride_chunk_batch + kv_head * p.stride_chunk_head + first;
  }
  __device__ __forceinline__ char* dk_row(BackwardParams const& p, int key) const {
    return p.dk_rows + batch_coordinate(p) * p.stride_dk_batch + kv_head * p.stride_dk_head +
           (tiles.first_k + key) * p.stride_dk_position;
  }
  __device__ __forceinline__ char* dv_row(BackwardParams const& p, int key) const {
    return p.dv_rows + batch_coordinate(p) * p.stride_dv_batch + kv_head * p.stride_dv_head +
           (tiles.first_k + key) * p.stride_dv_position;
  }
  // Rows of a piece that exist: [begin, end) of 64.
  __device__ __forceinline__ int piece_begin(int tile, int half) const {
    return max(0, tiles.q_offset - (tile * kTile + half * kPiece));
  }
  __device__ __forceinline__ int piece_end(int tile, int half) const {
    return min(kPiece, tiles.valid - (tile * kTile + half * kPiece));
  }
  __device__ __forceinline__ bool has_piece(int tile, int half) const {
    return piece_begin(tile, half) < piece_end(tile, half);
  }
};

// One key tile of one head. A block of the window kernel takes every gridDim.x-th, in the order of
// KV heads, sequences, tiles.
struct KeyTile {
  KeyHead head;
  int tile;
  bool exists;

  __device__ __forceinline__ void set(BackwardParams const& p, int kv_head, int sequence,
                                      int tile_) {
    tile = tile_;
    if (p.cu_seqlens_k) {
      // The last sequence whose tiles begin at or before this one of all sequences.
      int low = 0, high = p.batch;
      while (high - low > 1) {
        int const middle = (low + high) / 2;
        int const first_k = min(max(p.cu_seqlens_k[middle], 0), p.seq_len_k);
        (first_key_tile(p, middle, first_k) <= tile_ ? low : high) = middle;
      }
      sequence = low;
    }
    head.set(p, sequence, kv_head);
    if (p.cu_seqlens_k) tile -= first_key_tile(p, sequence, head.tiles.first_k);
    exists = tile >= 0 && tile * kTile < head.num_rows;
  }
  // Query tiles that find these keys in their diagonal or window tile.
  __device__ __forceinline__ int begin() const { return max(tile, head.tiles.begin); }
  __device__ __forceinline__ int end() const { return min(tile + 2, head.tiles.end); }
  __device__ __forceinline__ bool has_queries() const { return begin() < end(); }
};

// The key tiles of a block of the window kernel. NOTE: counted in three digits, so that no tile
// takes divisions. Packed sequences count as one.
class KeyTileCursor {
 public:
  __device__ __forceinline__ void start(BackwardParams const& p) {
    num_sequences_ = p.cu_seqlens_k ? 1 : p.batch;
    num_tiles_ = p.num_key_tiles / num_sequences_;
    int const first = blockIdx.x, step = gridDim.x;
    tile_ = first % num_tiles_, tile_step_ = step % num_tiles_;
    sequence_ = first / num_tiles_ % num_sequences_;
    sequence_step_ = step / num_tiles_ % num_sequences_;
    kv_head_ = first / p.num_key_tiles, head_step_ = step / p.num_key_tiles;
  }
  __device__ __forceinline__ bool done(BackwardParams const& p) const {
    return kv_head_ >= p.num_kv_heads;
  }
  __device__ __forceinline__ KeyTile tile(BackwardParams const& p) const {
    KeyTile keys;
    keys.set(p, kv_head_, sequence_, tile_);
    return keys;
  }
  __device__ __forceinline__ void advance() {
    tile_ += tile_step_;
    bool const next_sequence = tile_ >= num_tiles_;
    if (next_sequence) tile_ -= num_tiles_;
    sequence_ += sequence_step_ + next_sequence;
    bool const next_head = sequence_ >= num_sequences_;
    if (next_head) sequence_ -= num_sequences_;
    kv_head_ += head_step_ + next_head;
  }

 private:
  int num_sequences_, num_tiles_;
  int kv_head_, sequence_, tile_;  // the packed sequences': among all their tiles
  int head_step_, sequence_step_, tile_step_;
};

// A part of the tiles of a head, for one block of 128 slots: what a block of the slot kernel does.
struct SlotRange {
  KeyHead head;
  int segment, block;
  int first, end;  // tiles

  __device__ __forceinline__ void set(BackwardParams const& p, int index) {
    block = index % p.num_blocks, index /= p.num_blocks;
    segment = index % p.num_segments, index /= p.num_segments;
    head.set(p, index / p.num_kv_heads, index % p.num_kv_heads);
    int const begin = max(2, head.tiles.begin), count = max(0, head.tiles.end - begin);
    first = begin + static_cast<int>(static_cast<std::int64_t>(count) * segment / p.num_segments);
    end =
        begin + static_cast<int>(static_cast<std::int64_t>(count) * (segment + 1) / p.num_segments);
  }
  // Whether the block's slots can hold keys: they fill in order.
  __device__ __forceinline__ bool uses(int tile) const { return tile >= block + 2; }
  // Where the segment's slots lie among the inherited ones.
  __device__ __forceinline__ std::int64_t inherited_at(BackwardParams const& p, int slot) const {
    std::int64_t const row =
        (static_cast<std::int64_t>(head.sequence) * p.num_kv_heads + head.kv_head) *
            p.num_segments +
        segment;
    return (row * p.num_blocks + block) * kTile + slot;
  }
};

}  // namespace sparsek::cuda::sm90::backward
