// One row of sparsek_cuda_check at one dtype: inputs, and what the fp64 reference makes of them.
//
// Rank 4: a dense batch; rank 3: packed sequences. The library's two forms of every stage are
// overloads here, so that the check itself is written once.
#pragma once
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cuda_check_rows.hpp"

namespace sparsek::testing {

// Views of one call; on the host or on the device.
template <std::size_t Rank>
struct Operands {
  ConstTensorView<Rank> q, k, v;
  ConstTensorView<Rank - 1> scores;
  std::optional<ConstTensorView<1>> lengths{};                       // dense
  std::optional<ConstTensorView<1>> cu_seqlens_q{}, cu_seqlens_k{};  // packed
};

inline void run_select(Context const& context, Operands<4> const& in, SelectOptions const& options,
                       SelectionView const& selection) {
  select(context, in.scores, in.lengths, options, selection);
}
inline void run_select(Context const& context, Operands<3> const& in, SelectOptions const& options,
                       PackedSelectionView const& selection) {
  select_varlen(context, in.scores, *in.cu_seqlens_k, options, selection);
}
inline std::size_t select_bytes(Context const& context, Operands<4> const& in,
                                SelectOptions const& options) {
  auto const& shape = in.scores.shape;
  return select_workspace_bytes(context, shape[0], shape[1], shape[2], options);
}
inline std::size_t select_bytes(Context const& context, Operands<3> const& in,
                                SelectOptions const& options) {
  return select_varlen_workspace_bytes(context, in.cu_seqlens_k->shape[0] - 1, in.scores.shape[1],
                                       in.scores.shape[0], options);
}

// Which optional arguments a call gets.
enum class Optionals { kGiven, kLeftOut };

inline void run_attend(Context const& context, Operands<4> const& in,
                       ConstSelectionView const& selection, AttendOptions const& options,
                       TensorView<4> const& out, std::optional<TensorView<3>> const& lse,
                       Optionals optionals) {
  std::optional<ConstTensorView<3>> scores = in.scores;
  if (optionals == Optionals::kLeftOut && options.gate == Gate::kNone) scores.reset();
  attend(context, in.q, in.k, in.v, scores, selection, in.lengths, options, out, lse);
}
inline void run_attend(Context const& context, Operands<3> const& in,
                       ConstPackedSelectionView const& selection, AttendOptions const& options,
                       TensorView<3> const& out, std::optional<TensorView<2>> const& lse,
                       Optionals optionals) {
  std::optional<ConstTensorView<2>> scores = in.scores;
  if (optionals == Optionals::kLeftOut && options.gate == Gate::kNone) scores.reset();
  attend_varlen(context, in.q, in.k, in.v, scores, selection, *in.cu_seqlens_q, *in.cu_seqlens_k,
                options, out, lse);
}
inline std::size_t attend_bytes(Context const& context, Operands<4> const& in,
                                AttendOptions const& options) {
  return attend_workspace_bytes(context, in.q.dtype, in.q.shape, in.k.shape, options);
}
inline std::size_t attend_bytes(Context const& context, Operands<3> const& in,
                                AttendOptions const& options) {
  return attend_varlen_workspace_bytes(context, in.q.dtype, in.cu_seqlens_q->shape[0] - 1,
                                       in.q.shape, in.k.shape, options);
}

// A selection's memory on the host.
template <std::size_t Rank>
struct HostSelection {
  Tensor<Rank> expiry, threshold, last_candidate;

  BasicSelectionView<Rank> view() {
    return {expiry.view(), threshold.view(), last_candidate.view()};
  }
};

template <std::size_t Rank>
class CheckProblem {
 public:
  CheckProblem(Row const& row, DataType dtype);

  Row row;
  DataType dtype;
  AttendOptions options;
  Tensor<Rank> q, k, v;
  Tensor<Rank - 1> scores;
  std::vector<std::int32_t> lengths, cu_seqlens_q, cu_seqlens_k;

  // The reference's answers. A foreign selection has an expiry alone.
  HostSelection<Rank - 1> selection;
  Tensor<Rank> out;      // float64
  Tensor<Rank - 1> lse;  // float64

  bool foreign() const { return options.origin == SelectionOrigin::kForeign; }

  // A poisoned tensor laid out like the output, in the row's dtype.
  Tensor<Rank> make_out() const { return {dtype, q.shape(), q.view().stride}; }
  HostSelection<Rank - 1> make_selection() const;
  // Whether a chunk's threshold and last_candidate have a meaning.
  bool chunk_counts(std::array<std::int64_t, Rank - 1> const& index) const;
  // Whether the planted NaN excuses what comes out at q's leading index (b, h) or (t, h).
  bool ignored(std::int64_t first, std::int64_t second) const;

 private:
  static constexpr bool kPacked = Rank == 3;

  void make_data();
  void plant_nan();
  void make_foreign_expiry();
  std::int64_t max_keys_per_tile() const;
  void run_reference();
  Operands<Rank> operands(Tensor<Rank> const& q, Tensor<Rank> const& k,
                          Tensor<Rank> const& v) const;
};

extern template class CheckProblem<3>;
extern template class CheckProblem<4>;

}  // namespace sparsek::testing
