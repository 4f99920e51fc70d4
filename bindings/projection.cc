// The SPARSEK operator.
#include "sparsek/projection.hpp"

#include "arguments.hpp"

namespace sparsek::bindings {

void define_projection(nb::module_& module) {
  module.def("sparsek_projection", [](Call const& call, ConstTensorView<2> const& z, std::int64_t k,
                                      TensorView<2> const& p) {
    run(call, [&](Context const& context) { sparsek_projection(context, z, k, p); });
  });
  module.def(
      "sparsek_projection_backward", [](Call const& call, ConstTensorView<2> const& p,
                                        ConstTensorView<2> const& dp, TensorView<2> const& dz) {
        run(call, [&](Context const& context) { sparsek_projection_backward(context, p, dp, dz); });
      });
}

}  // namespace sparsek::bindings
