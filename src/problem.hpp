// Validated, resolved problems: what validate.cc makes of a public call and every backend receives.
// Plain pointers, sizes and strides (in elements); a backend checks nothing again.
//
// One form serves dense batches and packed sequences. Sequence b (0 ... batch - 1) has
//   dense:   keys [0, seq_len_k) at stride_<tensor>_batch * b, queries likewise, lengths[b] optional;
//   packed:  keys cu_seqlens_k[b] ... cu_seqlens_k[b + 1], at
//            stride_<tensor>_position * cu_seqlens_k[b]; stride_*_batch is 0.
// Selection rows: dense [B, Hkv, Sk] and [B, Hkv, num_chunks]; packed [Hkv, total_k] and
// [Hkv, num_chunks], where sequence b's first key is cu_seqlens_k[b] and its first chunk is
// cu_seqlens_k[b] / chunk_size + b (rows of different sequences never overlap).
#pragma once
#include <cstdint>
#include <string>

#include "sparsek/attend.hpp"
#include "sparsek/context.hpp"
#include "sparsek/decode.hpp"
#include "sparsek/select.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek {

struct ScoreProblem {
  std::int64_t batch, num_kv_heads, seq_len, head_dim;
  DataType dtype;
  void const* k;
  std::int64_t stride_k_batch, stride_k_head, stride_k_position;
  std::int32_t const* lengths;       // [batch] or null
  std::int32_t const* cu_seqlens_k;  // [batch + 1] or null
  DataType score_dtype;
  void* scores;
  std::int64_t stride_scores_batch, stride_scores_head, stride_scores_position;
};

struct SelectProblem {
  std::int64_t batch, num_kv_heads;
  std::int64_t seq_len;     // dense: Sk; packed: total_k
  std::int64_t num_chunks;  // row length of threshold and last_candidate: ceil(Sk / C), or total_k
                            // / C + batch
  std::int64_t num_selected, window, chunk_size, num_candidates;
  DataType score_dtype;  // float32; float64 on the reference backend
  void const* scores;
  std::int64_t stride_scores_batch, stride_scores_head, stride_scores_position;
  std::int32_t const* lengths;       // [batch] or null
  std::int32_t const* cu_seqlens_k;  // [batch + 1] or null
  std::int32_t* expiry;
  void* threshold;               // score_dtype
  std::int32_t* last_candidate;  // null: not wanted
  // Offsets into the selection: stride_expiry_batch * b + stride_expiry_head * h + first key, and
  // the same for chunks.
  std::int64_t stride_expiry_batch, stride_expiry_head, stride_chunk_batch, stride_chunk_head;
};

struct AttendProblem {
  std::int64_t batch, num_q_heads, num_kv_heads, group;  // group = num_q_heads / num_kv_heads
  std::int64_t seq_len_q, seq_len_k;                     // dense: Sq, Sk; packed: total_q, total_k
  std::int64_t head_dim, num_chunks;
  DataType dtype;        // q, k, v, out
  DataType score_dtype;  // scores, threshold, lse
  Gate gate;
  double sm_scale;
  // A selection of ours: its configuration. A foreign one: num_selected < 0, window = 0, chunk_size
  // = 1, and max_keys_per_tile >= 0 or -1 (unknown).
  std::int64_t num_selected, window, chunk_size, num_candidates, max_keys_per_tile;
  void const *q, *k, *v;
  std::int64_t stride_q_batch, stride_q_head, stride_q_position;
  std::int64_t stride_k_batch, stride_k_head, stride_k_position;
  std::int64_t stride_v_batch, stride_v_head, stride_v_position;
  void const* scores;  // null: no gate
  std::int64_t stride_scores_batch, stride_scores_head, stride_scores_position;
  std::int32_t const* expiry;
  void const* threshold;               // null: no gate
  std::int32_t const* last_candidate;  // null: not given
  std::int64_t stride_expiry_batch, stride_expiry_head, stride_chunk_batch, stride_chunk_head;
  std::int32_t const* lengths;                      // [batch] or null
  std::int32_t const *cu_seqlens_q, *cu_seqlens_k;  // [batch + 1] or null
  void* out;
  std::int64_t stride_out_batch, stride_out_head, stride_out_position;
  void* lse;  // null: not wanted
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_position;
};

struct AttendBackwardProblem {
  AttendProblem forward;  // out and lse are inputs here
  void const* dout;
  std::int64_t stride_dout_batch, stride_dout_head, stride_dout_position;
  void *dq, *dk, *dv;
  std::int64_t stride_dq_batch, stride_dq_head, stride_dq_position;
  std::int64_t stride_dk_batch, stride_dk_head, stride_dk_position;
  std::int64_t stride_dv_batch, stride_dv_head, stride_dv_position;
  void* dscores;  // score_dtype, or null: not wanted
  std::int64_t stride_dscores_batch, stride_dscores_head, stride_dscores_position;
};

struct DecodeProblem {
  std::int64_t batch, num_q_heads, num_kv_heads, group;
  std::int64_t seq_len;  // dense: S; packed: total
  std::int64_t head_dim;
  DataType dtype;
  Gate gate;
  double sm_scale;
  DecodeStateLayout layout;  // holds k, w, C and M
  void* state;
  std::int64_t num_blocks, stride_block;  // bytes
  std::int32_t const* block_index;        // [batch]
  std::int32_t const* continues;          // [batch] or null: all do
  void const *q, *k, *v;                  // q null: only append
  std::int64_t stride_q_batch, stride_q_head, stride_q_position;
  std::int64_t stride_k_batch, stride_k_head, stride_k_position;
  std::int64_t stride_v_batch, stride_v_head, stride_v_position;
  float const* scores;
  std::int64_t stride_scores_batch, stride_scores_head, stride_scores_position;
  std::int32_t const* lengths;     // [batch] or null
  std::int32_t const* cu_seqlens;  // [batch + 1] or null
  void* out;
  std::int64_t stride_out_batch, stride_out_head, stride_out_position;
  float* lse;  // null: not wanted
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_position;
};

// The backends. `select_workspace` and `attend_workspace` give bytes.
namespace reference {
void key_norm_scores(ScoreProblem const&);
void select(SelectProblem const&);
void attend(AttendProblem const&);
void attend_backward(AttendBackwardProblem const&);
}  // namespace reference

namespace cpu {
void key_norm_scores(Context const&, ScoreProblem const&);
void select(Context const&, SelectProblem const&);
void attend(Context const&, AttendProblem const&);
void attend_backward(Context const&, AttendBackwardProblem const&);
void decode(Context const&, DecodeProblem const&);
}  // namespace cpu

namespace cuda {
void key_norm_scores(Context const&, ScoreProblem const&);
void select(Context const&, SelectProblem const&);
std::size_t select_workspace(Context const&, SelectProblem const&);
void attend(Context const&, AttendProblem const&);
std::size_t attend_workspace(Context const&, AttendProblem const&);
// The kernel that attend would run, e.g. "sm90/resident"; empty if none serves the problem, and
// then `reason` says what is missing. A kernel other than the fastest is named with the reason why
// the faster one does not apply.
std::string attend_kernel_name(Context const&, AttendProblem const&, std::string* reason);
void attend_backward(Context const&, AttendBackwardProblem const&);
std::size_t attend_backward_workspace(Context const&, AttendBackwardProblem const&);
std::string attend_backward_kernel_name(Context const&, AttendBackwardProblem const&,
                                        std::string* reason);
void decode(Context const&, DecodeProblem const&);
std::size_t decode_workspace(Context const&, DecodeProblem const&);
std::string decode_kernel_name(Context const&, DecodeProblem const&, std::string* reason);
}  // namespace cuda

}  // namespace sparsek
