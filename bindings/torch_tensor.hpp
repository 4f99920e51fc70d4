// Torch tensors as the core's views, and memory of torch, without a header or a library of torch.
//
// NOTE: a call that launches nothing takes 1.5 us through DLPack's C interface. On the same host it
// took 3.8 us through Python's attributes (data_ptr(), dtype, shape, stride(), device) and
// torch.empty.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "dlpack.hpp"
#include "sparsek/context.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek::bindings {

namespace nb = nanobind;

// Looks up what the functions below need of torch. Once, when the extension is imported: later, two
// threads could wait for each other, one importing, one holding the interpreter lock.
void connect_torch();

using OptionalTensor = std::optional<nb::object>;

// What a tensor is called in messages, and how its shape is spelled there, e.g. "B, Hkv, Sk".
struct TensorName {
  char const* name;
  char const* dims;
};

// Where a call runs: where its first tensor is.
class Place {
 public:
  // On CUDA the device's current stream, on the CPU torch's number of threads. Throws Unsupported
  // for other devices.
  Place(nb::handle first, Backend backend);

  Context const& context() const { return context_; }
  bool is_cuda() const { return context_.device.type == DeviceType::kCuda; }
  dlpack::Device device() const { return device_; }

  // The tensor's view. Throws InvalidArgument unless it has Rank dimensions, a dtype that the core
  // knows and is on this device.
  template <std::size_t Rank>
  ConstTensorView<Rank> read(nb::handle tensor, TensorName name) const {
    ConstTensorView<Rank> view;
    dlpack::Tensor const seen = read(tensor, name, Rank, view.dtype);
    view.data = static_cast<std::byte*>(seen.data) + seen.byte_offset;
    std::copy_n(seen.shape, Rank, view.shape.begin());
    std::copy_n(seen.strides, Rank, view.stride.begin());
    return view;
  }
  template <std::size_t Rank>
  std::optional<ConstTensorView<Rank>> read_optional(OptionalTensor const& tensor,
                                                     TensorName name) const {
    if (!tensor) return std::nullopt;
    return read<Rank>(*tensor, name);
  }
  template <std::size_t Rank>
  TensorView<Rank> read_output(nb::handle tensor, TensorName name) const {
    auto const view = read<Rank>(tensor, name);
    return {const_cast<void*>(view.data), view.dtype, view.shape, view.stride};
  }

 private:
  dlpack::Tensor read(nb::handle tensor, TensorName name, std::size_t rank, DataType& dtype) const;

  dlpack::Device device_;
  Context context_{};
};

// Bytes of torch's allocator, given back in stream order when they go out of scope. Made and
// destroyed without the interpreter lock: others may wait for it while they hold the allocator's.
class Bytes {
 public:
  Bytes(Place const& place, std::size_t size);
  ~Bytes();
  Bytes(Bytes const&) = delete;
  Bytes& operator=(Bytes const&) = delete;

  std::byte* data() const { return data_; }

 private:
  dlpack::OwnedTensor* owned_ = nullptr;
  nb::handle tensor_;  // instead, where that failed at first
  std::byte* data_ = nullptr;
};

// torch.empty_like(tensor).
nb::object empty_like(nb::handle tensor);

// An uninitialised tensor of the shape of `tensor` without its last dimension, where that is.
nb::object empty_rows_of(nb::handle tensor, DataType dtype);

// Whether a call on these tensors (or None) may go past torch's dispatcher, since all that it would
// do is call the implementation: plain CUDA tensors (no subclass, no lazy negation) of which none
// wants a gradient, on a thread on which nothing traces, transforms, profiles or watches calls.
bool need_no_dispatcher(nb::args const& tensors);

}  // namespace sparsek::bindings
