// One checker per stage, shared by all backends: public calls become problems (problem.hpp), or an
// InvalidArgument that names the tensor, what was expected and what came.
#pragma once
#include <optional>

#include "problem.hpp"
#include "sparsek/attend.hpp"
#include "sparsek/attend_backward.hpp"
#include "sparsek/context.hpp"
#include "sparsek/decode.hpp"
#include "sparsek/select.hpp"

namespace sparsek {

// num_candidates with its default applied.
std::int64_t resolved_num_candidates(SelectOptions const& options);
void check_select_options(SelectOptions const& options);

ScoreProblem make_score_problem(Context const&, ConstTensorView<4> const& k,
                                std::optional<ConstTensorView<1>> const& lengths,
                                TensorView<3> const& scores);
ScoreProblem make_score_problem(Context const&, ConstTensorView<3> const& k,
                                TensorView<2> const& scores);

SelectProblem make_select_problem(Context const&, ConstTensorView<3> const& scores,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  SelectOptions const&, SelectionView const&);
SelectProblem make_select_problem(Context const&, ConstTensorView<2> const& scores,
                                  ConstTensorView<1> const& cu_seqlens_k, SelectOptions const&,
                                  PackedSelectionView const&);

AttendProblem make_attend_problem(Context const&, ConstTensorView<4> const& q,
                                  ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                                  std::optional<ConstTensorView<3>> const& scores,
                                  ConstSelectionView const&,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  AttendOptions const&, ConstTensorView<4> const& out,
                                  std::optional<ConstTensorView<3>> const& lse);
AttendProblem make_attend_problem(Context const&, ConstTensorView<3> const& q,
                                  ConstTensorView<3> const& k, ConstTensorView<3> const& v,
                                  std::optional<ConstTensorView<2>> const& scores,
                                  ConstPackedSelectionView const&,
                                  ConstTensorView<1> const& cu_seqlens_q,
                                  ConstTensorView<1> const& cu_seqlens_k, AttendOptions const&,
                                  ConstTensorView<3> const& out,
                                  std::optional<ConstTensorView<2>> const& lse);
AttendBackwardProblem make_attend_backward_problem(
    Context const&, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
    ConstTensorView<4> const& v, std::optional<ConstTensorView<3>> const& scores,
    ConstSelectionView const&, std::optional<ConstTensorView<1>> const& lengths,
    AttendOptions const&, ConstTensorView<4> const& out, ConstTensorView<3> const& lse,
    ConstTensorView<4> const& dout, TensorView<4> const& dq, TensorView<4> const& dk,
    TensorView<4> const& dv, std::optional<TensorView<3>> const& dscores);
AttendBackwardProblem make_attend_backward_problem(
    Context const&, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
    ConstTensorView<3> const& v, std::optional<ConstTensorView<2>> const& scores,
    ConstPackedSelectionView const&, ConstTensorView<1> const& cu_seqlens_q,
    ConstTensorView<1> const& cu_seqlens_k, AttendOptions const&, ConstTensorView<3> const& out,
    ConstTensorView<2> const& lse, ConstTensorView<3> const& dout, TensorView<3> const& dq,
    TensorView<3> const& dk, TensorView<3> const& dv, std::optional<TensorView<2>> const& dscores);

DecodeProblem make_decode_problem(Context const&, ConstTensorView<4> const& q,
                                  ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                                  ConstTensorView<3> const& scores,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  DecodeOptions const&, DecodeStateView const&,
                                  TensorView<4> const& out,
                                  std::optional<TensorView<3>> const& lse);
DecodeProblem make_decode_problem(Context const&, ConstTensorView<3> const& q,
                                  ConstTensorView<3> const& k, ConstTensorView<3> const& v,
                                  ConstTensorView<2> const& scores,
                                  ConstTensorView<1> const& cu_seqlens, DecodeOptions const&,
                                  DecodeStateView const&, TensorView<3> const& out,
                                  std::optional<TensorView<2>> const& lse);
// Without queries.
DecodeProblem make_append_problem(Context const&, ConstTensorView<4> const& k,
                                  ConstTensorView<4> const& v, ConstTensorView<3> const& scores,
                                  std::optional<ConstTensorView<1>> const& lengths,
                                  SelectOptions const&, DecodeStateView const&);
DecodeProblem make_append_problem(Context const&, ConstTensorView<3> const& k,
                                  ConstTensorView<3> const& v, ConstTensorView<2> const& scores,
                                  ConstTensorView<1> const& cu_seqlens, SelectOptions const&,
                                  DecodeStateView const&);

void check_projection(Context const&, ConstTensorView<2> const& z, std::int64_t k,
                      TensorView<2> const& p);
void check_projection_backward(Context const&, ConstTensorView<2> const& p,
                               ConstTensorView<2> const& dp, TensorView<2> const& dz);

}  // namespace sparsek
