// DLPack's C exchange interface, as much of it as is used here: how C++ sees a tensor of torch, and
// asks for memory and for the current stream, without a header or a library of torch. torch.Tensor
// has it since 2.10.
//
// The standard fixes these layouts within major version 1: https://dmlc.github.io/dlpack/latest
#pragma once
#include <cstdint>

namespace sparsek::bindings::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };  // kCudaHost: pinned

struct Device {
  std::int32_t type;
  std::int32_t index;
};

enum ElementCode : std::uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBFloat = 4 };

struct ElementType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t num_dims;
  ElementType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct Version {
  std::uint32_t major, minor;
};

// A tensor that belongs to whoever holds it, until `deleter` was called with it.
struct OwnedTensor {
  Version version;
  void* manager;
  void (*deleter)(OwnedTensor* self);
  std::uint64_t flags;
  Tensor tensor;
};

// What the capsule torch.Tensor.__dlpack_c_exchange_api__ points at. Functions return 0 on success.
struct ExchangeApi {
  Version version;
  ExchangeApi const* previous;
  // Uninitialised memory of the prototype's dtype, shape and device. Needs no interpreter lock.
  int (*allocate)(Tensor* prototype, OwnedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, char const* kind, char const* message));
  int (*own_py_object)(void* object, OwnedTensor** out);
  int (*to_py_object)(OwnedTensor* tensor, void** object);
  // A view that is valid as long as the object is; a Python error is set where it fails.
  int (*view_py_object)(void* object, Tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device_index, void** stream);
};
inline constexpr char const* kCapsule = "dlpack_exchange_api";

}  // namespace sparsek::bindings::dlpack
