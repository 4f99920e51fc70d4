// Stage 2, select: from scores to the keys that each query sees.
//
// Scores are fixed and the pool of past keys only grows, so a key that leaves the top k never
// returns: it is visible for one contiguous interval of queries, j <= i < expiry_j. One int32 per
// key describes the whole mask. (SparseK, arXiv 2406.16747, section 3; the chunked form and the
// finite candidate set are this library's.)
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "sparsek/context.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek {

// The query at position i is in chunk c = i / chunk_size. Keys b_c ... i with b_c = max(0, c *
// chunk_size - window) are always visible; of the pool P_c = {0 ... b_c - 1} the num_selected keys
// with the largest scores are (equal scores: smaller position first).
struct SelectOptions {
  std::int64_t num_selected = 256;  // k >= 0
  std::int64_t window = 128;        // w >= 0
  std::int64_t chunk_size = 128;    // C >= 1
  // M >= num_selected: how many of the pool's first-ranked keys the threshold is computed from.
  // Unset: 4 k. M >= seq_len is the paper's form. A finite M keeps decoding in constant memory and
  // exact.
  std::optional<std::int64_t> num_candidates{};
};

// What select writes and attend reads. All contiguous. Rank 3: a dense batch; rank 2: packed
// sequences (see select_varlen).
template <std::size_t Rank>
struct BasicSelectionView {
  // int32 [B, Hkv, Sk]: first query position that no longer sees the key; Sk (or lengths[b]) if
  // there is none.
  TensorView<Rank> expiry;
  // float32 [B, Hkv, ceil(Sk / C)] (float64 where scores are): tau_c = sup{tau : sum_{j in T_c}
  // clip(u_j - tau, 0, 1) >= k}, rounded down, below u_(k), non-decreasing over c; -inf if |P_c| <=
  // k, +inf if k = 0 < |P_c|. Chunks that start at or after lengths[b] hold an unspecified value
  // that is never read.
  TensorView<Rank> threshold;
  // int32 [B, Hkv, ceil(Sk / C)]: position of the M-th ranked key of P_c; -1 if every key of P_c is
  // a candidate (or M = 0). Unset: not wanted. Only the backward reads it.
  std::optional<TensorView<Rank>> last_candidate{};
};
using SelectionView = BasicSelectionView<3>;
using PackedSelectionView = BasicSelectionView<2>;

template <std::size_t Rank>
struct BasicConstSelectionView {
  ConstTensorView<Rank> expiry;
  std::optional<ConstTensorView<Rank>>
      threshold{};  // unset: a foreign selection, which has no gates
  std::optional<ConstTensorView<Rank>> last_candidate{};

  BasicConstSelectionView() = default;
  explicit BasicConstSelectionView(ConstTensorView<Rank> expiry) : expiry(expiry) {}
  BasicConstSelectionView(BasicSelectionView<Rank> const& s)  // NOLINT(google-explicit-constructor)
      : expiry(s.expiry), threshold(s.threshold) {
    if (s.last_candidate) last_candidate = *s.last_candidate;
  }
};
using ConstSelectionView = BasicConstSelectionView<3>;
using ConstPackedSelectionView = BasicConstSelectionView<2>;

// scores   float32 [B, Hkv, Sk], any strides, finite (float64 on the reference backend)
// lengths  int32 [B] or none: positions >= lengths[b] do not exist; 0 <= lengths[b] <= Sk
//
// Throws InvalidArgument on a wrong shape, dtype or value (non-finite scores: on the CPU only).
// Deterministic; every backend gives the same expiry and last_candidate bit for bit.
//
//   SelectOptions options{.num_selected = 256, .window = 128, .chunk_size = 128};
//   select(Context{}, scores, std::nullopt, options, selection);
void select(Context const& context, ConstTensorView<3> const& scores,
            std::optional<ConstTensorView<1>> const& lengths, SelectOptions const& options,
            SelectionView const& selection);

// Bytes that select takes from the context's allocator for this problem.
std::size_t select_workspace_bytes(Context const& context, std::int64_t batch_size,
                                   std::int64_t num_kv_heads, std::int64_t seq_len,
                                   SelectOptions const& options);

// Packed sequences of different lengths: sequence b has the keys cu_seqlens_k[b] ...
// cu_seqlens_k[b + 1] - 1; positions and chunks count from its own first key. Equals one select per sequence.
//
// scores        float32 [total_k, Hkv], any strides
// cu_seqlens_k  int32 [N + 1], on the scores' device: first 0, never falling, last total_k
// selection     expiry int32 [Hkv, total_k] (positions within the sequence); threshold and
//               last_candidate [Hkv, total_k / C + N] (integer division), where chunk c of
//               sequence b is column cu_seqlens_k[b] / C + b + c. Columns of no chunk are not
//               written.
void select_varlen(Context const& context, ConstTensorView<2> const& scores,
                   ConstTensorView<1> const& cu_seqlens_k, SelectOptions const& options,
                   PackedSelectionView const& selection);

std::size_t select_varlen_workspace_bytes(Context const& context, std::int64_t num_sequences,
                                          std::int64_t num_kv_heads, std::int64_t total_k,
                                          SelectOptions const& options);

}  // namespace sparsek
