// Stage 1, score.
#include "sparsek/score.hpp"

#include "arguments.hpp"

namespace sparsek::bindings {

void define_score(nb::module_& module) {
  module.def("key_norm_scores", [](Call const& call, ConstTensorView<4> const& k,
                                   std::optional<ConstTensorView<1>> const& lengths,
                                   TensorView<3> const& scores) {
    run(call, [&](Context const& context) { key_norm_scores(context, k, lengths, scores); });
  });
  module.def("key_norm_scores_varlen", [](Call const& call, ConstTensorView<3> const& k,
                                          TensorView<2> const& scores) {
    run(call, [&](Context const& context) { key_norm_scores_varlen(context, k, scores); });
  });
}

}  // namespace sparsek::bindings
