// What the kernels of this folder are given.
#pragma once
#include <cstdint>

#include "cuda/portable/attend/geometry.cuh"

namespace sparsek::cuda::portable {

// What the pairs of a warp's products need: whether all are visible, and one gate or several.
enum class PairKind {
  kPlain,    // visible, gate 1
  kCausal,   // visible where the key is not after the query, gate 1
  kKeyGate,  // visible, one gate for each key
  kGeneral,  // everything for each pair
};

struct BackwardParams {
  // The forward's: tensors, sizes, lists. `out` and `lse` are inputs here, and `aligned_loads`
  // speaks of dout too.
  AttendParams a;
  float sm_scale, scale_log2;  // with sign; scale_log2 = sm_scale log2(e)
  bool aligned_out;            // rows of out begin at multiples of 16 bytes
  bool aligned_gradients;      // rows of dq, dk, dv do

  void const* dout;
  std::int64_t stride_dout_batch, stride_dout_head, stride_dout_position;
  void *dq, *dk, *dv;
  std::int64_t stride_dq_batch, stride_dq_head, stride_dq_position;
  std::int64_t stride_dk_batch, stride_dk_head, stride_dk_position;
  std::int64_t stride_dv_batch, stride_dv_head, stride_dv_position;
  float* dscores;  // or null: not wanted
  std::int64_t stride_dscores_batch, stride_dscores_head, stride_dscores_position;
  float* gate_gradient_sums;  // like threshold, or null: not wanted

  // Workspace. Of each query row of each query head (row_index):
  float* lse2;           // lse log2(e); +inf where the row sees no key
  float* delta;          // dout . out
  float* gate_gradient;  // sum of g over the row's selected keys in I_c; null where sums are

  // Slots (slots.cuh).
  std::int32_t num_slots;  // of a KV head; 0: no lists
  std::int32_t tiles_per_piece;
  std::int32_t pieces_per_sequence;  // dense
  std::int32_t num_pieces;           // of one head, all sequences
  std::int32_t* slot_keys;           // [num_kv_heads, num_tiles, num_slots]
  float *carried_dk, *carried_dv;    // [num_kv_heads, num_pieces, num_slots, head_dim]
  float* carried_dscores;            // [num_kv_heads, num_pieces, num_slots]
};

// Row of lse2, delta and gate_gradient for query row r of a sequence.
__device__ inline std::int64_t row_index(AttendParams const& a, Sequence const& s, int q_head,
                                         int r) {
  std::int64_t const heads = static_cast<std::int64_t>(a.num_kv_heads) * a.group;
  std::int64_t const row = a.cu_seqlens_q ? q_head : s.index * heads + q_head;
  return row * a.seq_len_q + s.first_query + r;
}

// The gate u - tau lies strictly between 0 and 1. The sum, rounded up, is the smallest score with a
// gate of 1, so both comparisons are exact.
__device__ inline bool is_interior(float score, float threshold) {
  return score > threshold && score < __fadd_ru(threshold, 1.f);
}

// Where the elements of a row of a tensor begin, in bytes: T is a 16-bit type.
__device__ inline std::int64_t row_bytes(std::int64_t stride_batch, std::int64_t stride_head,
                                         std::int64_t stride_position, int b, int head,
                                         std::int64_t position) {
  return 2 * (stride_batch * b + stride_head * head + stride_position * position);
}

}  // namespace sparsek::cuda::portable
