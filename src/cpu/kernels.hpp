// The kernels that are compiled once per instruction set, as a table of functions. Plain data only:
// the translation units behind it share no inline function with the rest of the library.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/isa.hpp"
#include "sparsek/attend.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek::cpu {

// Attention of some query rows, all of one KV head, over a list of that head's keys. Row r sees key
// j of the list if j <= position[r] < expiry[j]. Strides count elements.
struct AttendTile {
  DataType dtype;  // q, k, v, out
  std::int64_t head_dim;
  Gate gate;
  float sm_scale;

  std::int64_t num_rows;
  void const* const* q;          // [num_rows] -> [head_dim]
  void* const* out;              // [num_rows] -> [head_dim]
  float* const* lse;             // [num_rows] -> one float; null: not wanted
  std::int32_t const* position;  // [num_rows], never falling within a run of rows of one head
  float const* threshold;        // [num_rows]; only read with a gate
  std::int32_t const* pool_end;  // [num_rows]; keys at positions >= pool_end[r] have gate 1

  std::int64_t num_keys;
  std::int32_t const* keys;  // [num_keys], ascending positions
  std::int32_t const*
      key_rows;                // [num_keys]: the key's index into what follows; null: its position
  std::int32_t const* expiry;  // null: no key expires
  float const* scores;         // only read with a gate
  std::int64_t stride_scores;
  void const *k, *v;
  std::int64_t stride_k, stride_v;

  std::byte* workspace;  // attend_workspace(head_dim, num_rows) bytes, aligned to kTileAlignment
};

// Gradients of some query rows, all of one KV head, over a list of that head's keys; rows and keys
// as in AttendTile.
struct AttendBackwardTile {
  DataType dtype;  // q, k, v, out and gradients
  std::int64_t head_dim;
  Gate gate;
  float sm_scale;

  std::int64_t num_rows;
  void const* const* q;  // [num_rows] -> [head_dim], as are out, dout and dq
  void const* const* out;
  void const* const* dout;
  void* const* dq;
  float const* lse;              // [num_rows]
  std::int32_t const* position;  // [num_rows], never falling within a run of rows of one head
  float const* threshold;        // [num_rows]; this and what follows is only read with a gate
  float const* interior_end;     // [num_rows]; a key's gate is strictly between 0 and 1 if
                                 // threshold < score < interior_end
  std::int32_t const* pool_end;  // [num_rows]
  float* gate_gradient;          // [num_rows]: the sum over the row's selected keys with such a
                                 // gate of the gates' gradients; null: nobody wants dscores

  std::int64_t num_keys;
  std::int32_t const* keys;  // [num_keys], ascending positions; what follows is indexed by position
  std::int32_t const* expiry;
  float const* scores;  // only read with a gate
  std::int64_t stride_scores;
  void const *k, *v;
  std::int64_t stride_k, stride_v;

  // Key number t adds its gradients to row gradient_rows[t] of `gradients`: rows of
  // gradient_row_size(head_dim) floats, aligned to kTileAlignment, read by write_gradients.
  std::int32_t const* gradient_rows;  // [num_keys]
  float* gradients;

  std::byte* workspace;  // attend_backward_workspace(...) bytes, aligned to kTileAlignment
};

inline constexpr std::size_t kTileAlignment = 64;

struct KernelTable {
  void (*attend)(AttendTile const& tile);
  std::size_t (*attend_workspace)(std::int64_t head_dim, std::int64_t num_rows);
  void (*attend_backward)(AttendBackwardTile const& tile);
  std::size_t (*attend_backward_workspace)(std::int64_t head_dim, std::int64_t num_rows);
  std::int64_t (*gradient_row_size)(std::int64_t head_dim);
  // Writes a key's row of gradients to dk and dv; returns the gradient of its score.
  float (*write_gradients)(DataType dtype, std::int64_t head_dim, float sm_scale, float const* row,
                           void* dk, void* dv);
  // scores[j * stride_scores] = -||k_j||_2 for j < num_keys.
  void (*negative_norms)(DataType dtype, void const* k, std::int64_t stride_k,
                         std::int64_t num_keys, std::int64_t head_dim, float* scores,
                         std::int64_t stride_scores);
};

KernelTable const& kernels(Isa isa);

}  // namespace sparsek::cpu
