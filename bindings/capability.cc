// What runs where, and what this build is.
#include "sparsek/capability.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include "arguments.hpp"

namespace sparsek::bindings {

namespace {

using Query = Capability (*)(Context const&, DataType, std::array<std::int64_t, 4> const&,
                             std::array<std::int64_t, 4> const&, AttendOptions const&);

// -> (supported, kernel, reason)
void define_query(nb::module_& module, char const* name, Query query) {
  module.def(name, [query](Call const& call, int dtype, std::array<std::int64_t, 4> const& q_shape,
                           std::array<std::int64_t, 4> const& k_shape, std::int64_t num_selected,
                           std::int64_t window, std::int64_t chunk_size,
                           std::optional<std::int64_t> num_candidates, bool is_foreign,
                           std::optional<std::int64_t> max_keys_per_tile, int gate) {
    AttendOptions const options{static_cast<Gate>(gate),
                                std::nullopt,
                                {num_selected, window, chunk_size, num_candidates},
                                origin_of(is_foreign),
                                max_keys_per_tile};
    Capability const capability =
        query(call.context, static_cast<DataType>(dtype), q_shape, k_shape, options);
    return nb::make_tuple(capability.supported, capability.kernel, capability.reason);
  });
}

}  // namespace

void define_capability(nb::module_& module) {
  define_query(module, "attend_capability", &attend_capability);
  define_query(module, "attend_backward_capability", &attend_backward_capability);
  define_query(module, "decode_capability", &decode_capability);
  module.def("cpu_isa", &cpu_isa);
  module.def("built_with_cuda", &built_with_cuda);
  module.def("cuda_architectures", &cuda_architectures);
  module.def("version", &version);
}

}  // namespace sparsek::bindings
