// How Python passes tensors and contexts: plain tuples of integers.
//
// A tensor is (data_ptr, dtype code, shape, strides) with strides in elements; the dtype code is
// sparsek::DataType's value. Tuples are used because they are quick: reading six of them takes
// about 1 us, six nb::ndarray 16 us and more.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "sparsek/attend.hpp"
#include "sparsek/context.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek::bindings {

namespace nb = nanobind;

// The items of a tuple (or of a subclass of it, such as torch.Size) as integers. False, with the
// Python error cleared, where the object is no tuple of `size` integers.
inline bool read_integers(PyObject* tuple, std::int64_t* values, std::size_t size) noexcept {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != static_cast<Py_ssize_t>(size)) return false;
  for (std::size_t i = 0; i < size; ++i) {
    values[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, static_cast<Py_ssize_t>(i)));
    if (values[i] == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

template <typename View>
bool read_view(PyObject* tuple, View& view) noexcept {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 4) return false;
  view.data = PyLong_AsVoidPtr(PyTuple_GetItem(tuple, 0));
  auto const dtype = PyLong_AsLong(PyTuple_GetItem(tuple, 1));
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  view.dtype = static_cast<DataType>(dtype);
  return read_integers(PyTuple_GetItem(tuple, 2), view.shape.data(), view.shape.size()) &&
         read_integers(PyTuple_GetItem(tuple, 3), view.stride.data(), view.stride.size());
}

// Where a call runs, as Python passes it: (device type, device index, backend, stream, threads,
// workspace, its bytes).
struct Call {
  Context context{};
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
};

inline bool read_call(PyObject* tuple, Call& call) noexcept {
  std::int64_t values[7];
  if (!read_integers(tuple, values, 7)) return false;
  call.context.device.type = static_cast<DeviceType>(values[0]);
  call.context.device.index = static_cast<int>(values[1]);
  call.context.backend = static_cast<Backend>(values[2]);
  call.context.stream = reinterpret_cast<void*>(values[3]);
  call.context.num_threads = static_cast<int>(values[4]);
  call.workspace = reinterpret_cast<void*>(values[5]);
  call.workspace_bytes = static_cast<std::size_t>(values[6]);
  return true;
}

// Runs `stage(context)` without the interpreter lock. On CUDA the workspace is the caller's buffer
// and nothing else, so that no memory is taken behind torch's back; on the CPU it is the heap.
template <typename Stage>
void run(Call const& call, Stage&& stage) {
  BufferAllocator buffer(call.workspace, call.workspace_bytes);
  Context context = call.context;
  if (context.device.type == DeviceType::kCuda) context.allocator = &buffer;
  nb::gil_scoped_release release;
  stage(context);
}

inline SelectionOrigin origin_of(bool is_foreign) {
  return is_foreign ? SelectionOrigin::kForeign : SelectionOrigin::kSelect;
}

void define_score(nb::module_& module);
void define_select(nb::module_& module);
void define_attend(nb::module_& module);
void define_attend_backward(nb::module_& module);
void define_decode(nb::module_& module);
void define_fused(nb::module_& module);
void define_projection(nb::module_& module);
void define_capability(nb::module_& module);

}  // namespace sparsek::bindings

namespace nanobind::detail {

template <std::size_t Rank>
struct type_caster<sparsek::ConstTensorView<Rank>> {
  NB_TYPE_CASTER(sparsek::ConstTensorView<Rank>, const_name("tuple"))
  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    return sparsek::bindings::read_view(source.ptr(), value);
  }
};

template <std::size_t Rank>
struct type_caster<sparsek::TensorView<Rank>> {
  NB_TYPE_CASTER(sparsek::TensorView<Rank>, const_name("tuple"))
  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    return sparsek::bindings::read_view(source.ptr(), value);
  }
};

template <>
struct type_caster<sparsek::bindings::Call> {
  NB_TYPE_CASTER(sparsek::bindings::Call, const_name("tuple"))
  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    return sparsek::bindings::read_call(source.ptr(), value);
  }
};

}  // namespace nanobind::detail
