// Stage 5, decode: generation token by token in constant memory.
//
// A key that leaves the top k never returns (select.hpp), so what a sequence needs from its past has
// a fixed size: k selected rows, the w + C rows of the window, and the scores of at most M
// candidates for the threshold. They lie in a state block, one per sequence (and layer), in a pool
// that the caller owns. Invariant: tokens appended in pieces of any sizes, in any number of calls,
// give the rows of one attend over the whole sequence.
//
// Everything that changes from step to step (counters, thresholds, positions) lies in the blocks: a
// step needs nothing from the host but the addresses of its arguments.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "sparsek/attend.hpp"
#include "sparsek/context.hpp"
#include "sparsek/select.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek {

// The start of a KV head's part of a state block. Heads of a sequence agree on num_tokens.
//
// With n = num_tokens > 0: the last token's chunk is c = (n - 1) / C, the pool ends at b = max(0, c
// C - w), min(k, b) selected rows are in use, and the window holds the positions b ... n - 1.
struct DecodeHeadHeader {
  std::int32_t num_tokens;      // appended so far; 0: an empty block, nothing else in it is read
  std::int32_t num_candidates;  // entries of `candidates` in use
  float threshold;              // tau of chunk c
  std::int32_t reserved;
};

// Where everything lies in a state block: a pure function of dtype, shape and options. The part of
// KV head h starts at byte h * head_bytes; the other offsets are bytes from there. Offsets are
// multiples of kDecodeStateAlignment.
//
//   0                  DecodeHeadHeader
//   candidates_offset  float32 [M]: the scores of the candidates T_c above the threshold, in any
//                      order (the others can never count again)
//   positions_offset   int32 [k]: the selected rows' positions
//   scores_offset      float32 [num_rows]
//   k_offset, v_offset dtype [num_rows, head_dim]
//
// Rows 0 ... k - 1 hold the selected keys in any order; the key at position p of the window is in
// row k + p % (w + C).
struct DecodeStateLayout {
  DataType dtype = DataType::kFloat32;
  std::int64_t num_kv_heads = 0, head_dim = 0;
  std::int64_t num_selected = 0, window = 0, chunk_size = 0, num_candidates = 0;  // k, w, C, M
  std::int64_t num_rows = 0;                                                      // k + w + C
  std::int64_t candidates_offset = 0, positions_offset = 0, scores_offset = 0;
  std::int64_t k_offset = 0, v_offset = 0;
  std::int64_t head_bytes = 0;
  std::int64_t block_bytes = 0;  // num_kv_heads * head_bytes
};

// Bytes; what a pool's address, its stride and all offsets are multiples of.
inline constexpr std::int64_t kDecodeStateAlignment = 64;

// Throws InvalidArgument on wrong options, Unsupported for a dtype other than float16, bfloat16 and
// float32.
DecodeStateLayout decode_state_layout(DataType dtype, std::int64_t num_kv_heads,
                                      std::int64_t head_dim, SelectOptions const& options);

struct DecodeOptions {
  SelectOptions selection{};
  Gate gate = Gate::kSoftmax;
  std::optional<double> sm_scale{};  // unset: head_dim^-0.5
};

// A pool of state blocks, and which of them the sequences of a call use.
struct DecodeStateView {
  void* data = nullptr;
  std::int64_t num_blocks = 0;
  std::int64_t stride_block = 0;  // bytes from one block to the next, at least block_bytes
  // int32 [N], contiguous: the block of each sequence, no two the same.
  ConstTensorView<1> block_index{};
  // int32 [N], contiguous: 0 where the sequence starts afresh, whatever its block holds. Unset: all
  // continue. (A block of zeros is an empty one.)
  std::optional<ConstTensorView<1>> continues{};
};

// Appends tokens to N sequences and attends from each of them. What a token sees is what the query
// at its position sees in attend: its sequence's window and selected keys, itself included.
//
// q          [N, Hq, S, D]: the new tokens' queries
// k, v       [N, Hkv, S, D], their keys and values; like q, any strides with a contiguous last
//            dimension
// scores     float32 [N, Hkv, S], any strides, finite
// lengths    int32 [N] or none: of sequence b only the first lengths[b] tokens exist
// out        like q, out; 0 where a token does not exist
// lse        float32 [N, Hq, S] out or none, contiguous; as attend gives it
//
// Any number of tokens at once: one in a generation step, a few in speculative decoding, many in a
// prompt. Throws InvalidArgument on a wrong shape, dtype or value and Unsupported where nothing
// serves the call; the state is unchanged then. (Values in memory are checked on the CPU only.)
//
//   DecodeStateLayout const layout = decode_state_layout(dtype, num_kv_heads, head_dim, selection);
//   std::vector<std::byte> pool = ...;  // layout.block_bytes per sequence, zeros, aligned
//   decode(context, q, k, v, scores, std::nullopt, options,
//          {pool.data(), num_blocks, layout.block_bytes, block_index}, out, std::nullopt);
void decode(Context const& context, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
            ConstTensorView<4> const& v, ConstTensorView<3> const& scores,
            std::optional<ConstTensorView<1>> const& lengths, DecodeOptions const& options,
            DecodeStateView const& state, TensorView<4> const& out,
            std::optional<TensorView<3>> const& lse);

// Only appends: the state afterwards is that of decode, up to the rounding of the threshold's last
// bit. O(S log M) for the scores, and no more copies of k and v than the block has rows.
void decode_append(Context const& context, ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                   ConstTensorView<3> const& scores,
                   std::optional<ConstTensorView<1>> const& lengths, SelectOptions const& options,
                   DecodeStateView const& state);

// Packed tokens, so that one call serves prompts and single steps: sequence b appends the tokens
// cu_seqlens[b] ... cu_seqlens[b + 1] - 1.
//
// q, out      [total, Hq, D]; k, v [total, Hkv, D]; scores float32 [total, Hkv]; lse [total, Hq]
// cu_seqlens  int32 [N + 1]: first 0, never falling, last total
void decode_varlen(Context const& context, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
                   ConstTensorView<3> const& v, ConstTensorView<2> const& scores,
                   ConstTensorView<1> const& cu_seqlens, DecodeOptions const& options,
                   DecodeStateView const& state, TensorView<3> const& out,
                   std::optional<TensorView<2>> const& lse);

void decode_append_varlen(Context const& context, ConstTensorView<3> const& k,
                          ConstTensorView<3> const& v, ConstTensorView<2> const& scores,
                          ConstTensorView<1> const& cu_seqlens, SelectOptions const& options,
                          DecodeStateView const& state);

// Bytes that any of the four takes from the context's allocator for this many sequences, whatever
// the number of tokens.
std::size_t decode_workspace_bytes(Context const& context, DataType dtype,
                                   std::int64_t num_sequences, std::int64_t num_kv_heads,
                                   std::int64_t head_dim, SelectOptions const& options);

}  // namespace sparsek
