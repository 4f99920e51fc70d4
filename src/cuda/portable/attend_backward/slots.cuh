// Which listed key lies where while dk and dv are summed.
//
// A KV head has as many slots as a tile lists keys. A listed key takes a free slot when it enters
// and keeps it while it is listed, so a block that owns slots has useful work in every tile, and
// writes a key's sums when the key leaves. The tiles of a sequence are cut into pieces that are
// worked on independently. In a piece's first tile slot x has the x-th key of the tile's list. Sums
// of a key in the piece where it enters become its dk, dv and dscores; those in later pieces are
// carried in rows of their own, [piece, slot in the piece's first tile], and added up in order.
#pragma once
#include <cuda_runtime.h>

#include "cuda/portable/attend_backward/params.cuh"

namespace sparsek::cuda::portable {

// Tiles of a piece: [first, last).
struct PieceSpan {
  int first, last;
};

__device__ inline PieceSpan locate_piece(BackwardParams const& p, int piece) {
  AttendParams const& a = p.a;
  if (a.cu_seqlens_k) {
    int const first = piece * p.tiles_per_piece;
    return {first, min(first + p.tiles_per_piece, a.num_tiles)};
  }
  int const begin = piece / p.pieces_per_sequence * a.tiles_per_sequence;
  int const first = begin + piece % p.pieces_per_sequence * p.tiles_per_piece;
  return {first, min(first + p.tiles_per_piece, begin + a.tiles_per_sequence)};
}

__device__ inline int piece_of_tile(BackwardParams const& p, int tile) {
  AttendParams const& a = p.a;
  if (a.cu_seqlens_k) return tile / p.tiles_per_piece;
  int const b = tile / a.tiles_per_sequence;
  return b * p.pieces_per_sequence + (tile - b * a.tiles_per_sequence) / p.tiles_per_piece;
}

// First tile of a sequence.
__device__ inline int first_tile_of(AttendParams const& a, Sequence const& s) {
  return a.cu_seqlens_k ? a.first_tile[s.index] : s.index * a.tiles_per_sequence;
}

// Keys before this position are carried in a piece that begins with this tile: the tile before
// listed them already.
__device__ inline int carried_end(AttendParams const& a, int tile, TileSpan const& span) {
  if (span.sequence.index < 0 || tile == first_tile_of(a, span.sequence)) return 0;
  int const before = max(span.begin - kQueryTile, span.sequence.query_offset());
  return list_end(a, before);
}

__device__ inline std::int32_t* slot_row(BackwardParams const& p, int kv_head, int tile) {
  return p.slot_keys + (static_cast<std::int64_t>(kv_head) * p.a.num_tiles + tile) * p.num_slots;
}

// Row of carried_dk, carried_dv and carried_dscores.
__device__ inline std::int64_t carried_row(BackwardParams const& p, int kv_head, int piece,
                                           int slot) {
  return (static_cast<std::int64_t>(kv_head) * p.num_pieces + piece) * p.num_slots + slot;
}

// Fills slot_keys from the lists.
void assign_slots(BackwardParams const& params, cudaStream_t stream);

// gate_gradient_sums from gate_gradient.
void sum_gate_gradients(BackwardParams const& params, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
