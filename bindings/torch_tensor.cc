#include "torch_tensor.hpp"

#include <stdexcept>
#include <string>

#include "sparsek/error.hpp"

namespace sparsek::bindings {
namespace {

nb::object interned(char const* text) { return nb::steal(PyUnicode_InternFromString(text)); }

// What a call needs of torch.
struct Torch {
  dlpack::ExchangeApi const* api;
  nb::object module, tensor_type, parameter_type;
  nb::object empty, empty_like, uint8, get_num_threads;
  // For need_no_dispatcher.
  nb::object is_grad_enabled, is_function_mode_enabled, is_profiler_enabled, included_keys;
  nb::object forward_ad;
  nb::object is_neg = interned("is_neg"), requires_grad = interned("requires_grad");
  nb::object raw_repr = interned("raw_repr"), current_level = interned("_current_level");
  std::uint64_t ordinary_keys, inference_mode_keys;

  Torch() : module(nb::module_::import_("torch")) {
    nb::object const& torch = module;
    tensor_type = torch.attr("Tensor"), parameter_type = torch.attr("nn").attr("Parameter");
    empty = torch.attr("empty"), empty_like = torch.attr("empty_like");
    uint8 = torch.attr("uint8"), get_num_threads = torch.attr("get_num_threads");
    nb::object const capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    api = static_cast<dlpack::ExchangeApi const*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    if (!api) nb::raise_python_error();
    if (api->version.major != 1) {
      throw std::runtime_error("torch: expected version 1 of DLPack's C exchange interface, got " +
                               std::to_string(api->version.major));
    }
    nb::object const internals = torch.attr("_C"), keys = internals.attr("DispatchKey");
    is_grad_enabled = torch.attr("is_grad_enabled");
    is_function_mode_enabled = internals.attr("_is_torch_function_mode_enabled");
    is_profiler_enabled = torch.attr("autograd").attr("_profiler_enabled");
    included_keys = internals.attr("_dispatch_tls_local_include_set");
    forward_ad = nb::module_::import_("torch.autograd.forward_ad");
    nb::object const least = internals.attr("DispatchKeySet")(keys.attr("BackendSelect"));
    nb::object const usual = least.attr("add")(keys.attr("ADInplaceOrView"));
    inference_mode_keys = nb::cast<std::uint64_t>(least.attr("raw_repr")());
    ordinary_keys = nb::cast<std::uint64_t>(usual.attr("raw_repr")());
  }
};

// Kept until the process ends: it may outlive the interpreter's teardown of this module.
Torch const* connected = nullptr;
Torch const& torch() { return *connected; }

nb::object checked(PyObject* result) {
  if (!result) nb::raise_python_error();
  return nb::steal(result);
}

dlpack::Tensor view_of(nb::handle tensor) {
  dlpack::Tensor view;
  if (torch().api->view_py_object(tensor.ptr(), &view) != 0) nb::raise_python_error();
  return view;
}

std::string text(nb::handle object) { return nb::str(object).c_str(); }

[[noreturn]] void fail(TensorName name, std::string const& expected, std::string const& got) {
  throw InvalidArgument(std::string(name.name) + ": expected " + expected + ", got " + got);
}

std::optional<DataType> data_type_of(dlpack::ElementType type) {
  if (type.lanes != 1) return std::nullopt;
  switch (type.code) {
    case dlpack::kFloat:
      if (type.bits == 16) return DataType::kFloat16;
      if (type.bits == 32) return DataType::kFloat32;
      if (type.bits == 64) return DataType::kFloat64;
      return std::nullopt;
    case dlpack::kBFloat:
      return DataType::kBFloat16;
    case dlpack::kInt:
      if (type.bits == 32) return DataType::kInt32;
      return std::nullopt;
    default:
      return std::nullopt;
  }
}

bool is_host(dlpack::Device device) {
  return device.type == dlpack::kCpu || device.type == dlpack::kCudaHost;
}

}  // namespace

void connect_torch() { connected = new Torch; }

Place::Place(nb::handle first, Backend backend) : device_(view_of(first).device) {
  context_.backend = backend;
  if (device_.type == dlpack::kCuda) {
    context_.device = {DeviceType::kCuda, device_.index};
    if (torch().api->current_stream(device_.type, device_.index, &context_.stream) != 0) {
      nb::raise_python_error();
    }
  } else if (is_host(device_)) {
    device_ = {dlpack::kCpu, 0};
    nb::object const threads = checked(PyObject_CallNoArgs(torch().get_num_threads.ptr()));
    context_.num_threads = nb::cast<int>(threads);
  } else {
    throw Unsupported("device " + text(first.attr("device").attr("type")) +
                      ": supported are cpu and cuda");
  }
}

dlpack::Tensor Place::read(nb::handle tensor, TensorName name, std::size_t rank,
                           DataType& dtype) const {
  dlpack::Tensor const seen = view_of(tensor);
  if (seen.num_dims != static_cast<std::int32_t>(rank)) {
    fail(name, std::to_string(rank) + " dimensions [" + name.dims + "]",
         "shape " + text(nb::list(tensor.attr("shape"))));
  }
  bool const is_here =
      is_cuda() ? seen.device.type == dlpack::kCuda && seen.device.index == context_.device.index
                : is_host(seen.device);
  if (!is_here) {
    std::string const here =
        is_cuda() ? "cuda:" + std::to_string(context_.device.index) : std::string("cpu");
    fail(name, "a tensor on " + here + " like the others", "one on " + text(tensor.attr("device")));
  }
  auto const known = data_type_of(seen.dtype);
  if (!known) {
    fail(name, "a floating-point tensor (int32 for lengths and cu_seqlens)",
         text(tensor.attr("dtype")).substr(sizeof("torch.") - 1));
  }
  dtype = *known;
  return seen;
}

Bytes::Bytes(Place const& place, std::size_t size) {
  auto num_bytes = static_cast<std::int64_t>(size);
  std::int64_t stride = 1;
  dlpack::Device const device = place.device();
  dlpack::Tensor prototype{nullptr, device, 1, {dlpack::kUnsigned, 8, 1}, &num_bytes, &stride, 0};
  auto const ignore = [](void*, char const*, char const*) {};
  if (torch().api->allocate(&prototype, &owned_, nullptr, ignore) == 0) {
    data_ = static_cast<std::byte*>(owned_->tensor.data) + owned_->tensor.byte_offset;
    return;
  }
  // The interface reports a text; torch.empty raises torch's own error, or does find memory.
  nb::gil_scoped_acquire const lock;
  nb::object const where =
      is_host(device) ? nb::str("cpu") : nb::str(("cuda:" + std::to_string(device.index)).c_str());
  nb::object tensor =
      torch().empty(num_bytes, nb::arg("dtype") = torch().uint8, nb::arg("device") = where);
  data_ = static_cast<std::byte*>(view_of(tensor).data);
  tensor_ = tensor.release();
}

Bytes::~Bytes() {
  if (owned_ && owned_->deleter) owned_->deleter(owned_);
  if (tensor_) {
    nb::gil_scoped_acquire const lock;
    tensor_.dec_ref();
  }
}

nb::object empty_like(nb::handle tensor) {
  return checked(PyObject_CallOneArg(torch().empty_like.ptr(), tensor.ptr()));
}

nb::object empty_rows_of(nb::handle tensor, DataType dtype) {
  nb::object const sizes = tensor.attr("shape");
  nb::object const rows =
      checked(PyTuple_GetSlice(sizes.ptr(), 0, PyTuple_GET_SIZE(sizes.ptr()) - 1));
  return torch().empty(rows, nb::arg("dtype") = torch().module.attr(name_of(dtype)),
                       nb::arg("device") = tensor.attr("device"));
}

namespace {

bool call_bool(nb::object const& function) {
  return checked(PyObject_CallNoArgs(function.ptr())).is(nb::handle(Py_True));
}

// A tensor of torch's own types whose memory holds its values.
bool is_plain(nb::handle tensor) {
  auto const type = tensor.type();
  if (!type.is(torch().tensor_type) && !type.is(torch().parameter_type)) return false;
  auto* const is_neg = PyObject_CallMethodNoArgs(tensor.ptr(), torch().is_neg.ptr());
  return checked(is_neg).is(nb::handle(Py_False));
}

bool is_on_cuda(nb::handle tensor) {
  dlpack::Tensor view;
  if (torch().api->view_py_object(tensor.ptr(), &view) == 0) {
    return view.device.type == dlpack::kCuda;
  }
  PyErr_Clear();  // sparse, for example
  return false;
}

bool requires_grad(nb::handle tensor) {
  auto* const wanted = PyObject_GetAttr(tensor.ptr(), torch().requires_grad.ptr());
  return checked(wanted).is(nb::handle(Py_True));
}

}  // namespace

bool need_no_dispatcher(nb::args const& tensors) {
  bool const may_want_gradients = call_bool(torch().is_grad_enabled);
  for (nb::handle const tensor : tensors) {
    if (tensor.is_none()) continue;
    if (!is_plain(tensor) || (may_want_gradients && requires_grad(tensor))) return false;
  }
  // The dispatcher calls the CUDA implementation as soon as one tensor is there; that one checks
  // the others.
  if (!is_on_cuda(tensors[0])) return false;
  nb::object const included = checked(PyObject_CallNoArgs(torch().included_keys.ptr()));
  auto const keys = nb::cast<std::uint64_t>(
      checked(PyObject_CallMethodNoArgs(included.ptr(), torch().raw_repr.ptr())));
  if (keys != torch().ordinary_keys && keys != torch().inference_mode_keys) return false;
  auto* const level = PyObject_GetAttr(torch().forward_ad.ptr(), torch().current_level.ptr());
  if (nb::cast<std::int64_t>(checked(level)) >= 0) return false;
  return !call_bool(torch().is_function_mode_enabled) && !call_bool(torch().is_profiler_enabled);
}

}  // namespace sparsek::bindings
