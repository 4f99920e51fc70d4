// The problems of sparsek_cuda_check: the case table and adversarial rows beyond it.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "case_data.hpp"

namespace sparsek::testing {

// Where the attended selection comes from.
enum class SelectionKind {
  kSelected,       // select, with its configuration
  kForeignSelect,  // select's expiry, passed as foreign
  kForeignWindow,  // every key expires `window` positions later
  kForeignRandom   // any expiry between the key's own position and the end
};

struct Row {
  Case c;  // of packed rows: batch, seq_len_q and seq_len_k are the sums over the sequences
  std::vector<std::int64_t> packed_q{}, packed_k{};  // lengths of packed sequences; empty: dense
  SelectionKind selection = SelectionKind::kSelected;
  bool bounded = false;  // foreign: max_keys_per_tile is given, and tight
  double q_scale = 1.0;
  std::optional<double> sm_scale{};
  // One KV head (dense) or one sequence (packed) is all NaN in q, k and v; the others are compared.
  bool plant_nan = false;

  bool packed() const { return !packed_k.empty(); }
  // Elements of k times the heads that read them: what a row costs, roughly.
  std::int64_t size() const { return c.batch * c.num_q_heads * c.seq_len_k * c.head_dim; }
};

std::vector<Row> all_rows();

}  // namespace sparsek::testing
