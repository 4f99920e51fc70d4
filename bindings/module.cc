// The extension module blackwell_sparsek._core: the C++ stages, and the library's errors as Python
// exceptions.
#include <nanobind/nanobind.h>

#include <exception>

#include "arguments.hpp"
#include "sparsek/error.hpp"

namespace nb = nanobind;

NB_MODULE(_core, module) {
  module.doc() =
      "C++ core of blackwell_sparsek. Internal: arguments are not checked beyond what the core "
      "checks.";
  nb::register_exception_translator([](std::exception_ptr const& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (sparsek::InvalidArgument const& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (sparsek::Unsupported const& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    } catch (sparsek::Error const& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
  });
  sparsek::bindings::define_score(module);
  sparsek::bindings::define_select(module);
  sparsek::bindings::define_attend(module);
  sparsek::bindings::define_attend_backward(module);
  sparsek::bindings::define_decode(module);
  sparsek::bindings::define_fused(module);
  sparsek::bindings::define_projection(module);
  sparsek::bindings::define_capability(module);
}
