// Views of memory that somebody else owns: a pointer, a dtype, a shape and strides in elements.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace sparsek {

enum class DataType : std::uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64, kInt32 };

// Bytes of one element.
constexpr std::size_t size_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kFloat32:
    case DataType::kInt32:
      return 4;
    case DataType::kFloat64:
      return 8;
  }
  return 0;
}

// The dtype's name as PyTorch spells it, e.g. "bfloat16".
constexpr char const* name_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
      return "float16";
    case DataType::kBFloat16:
      return "bfloat16";
    case DataType::kFloat32:
      return "float32";
    case DataType::kFloat64:
      return "float64";
    case DataType::kInt32:
      return "int32";
  }
  return "unknown";
}

// Row-major strides, in elements.
template <std::size_t Rank>
constexpr std::array<std::int64_t, Rank> contiguous_stride(
    std::array<std::int64_t, Rank> const& shape) {
  std::array<std::int64_t, Rank> stride{};
  std::int64_t step = 1;
  for (std::size_t i = Rank; i-- > 0;) {
    stride[i] = step;
    step *= shape[i];
  }
  return stride;
}

// A read-only strided view. `data` points at element (0, ..., 0); strides count elements, not
// bytes.
template <std::size_t Rank>
struct ConstTensorView {
  void const* data = nullptr;
  DataType dtype = DataType::kFloat32;
  std::array<std::int64_t, Rank> shape{};
  std::array<std::int64_t, Rank> stride{};

  ConstTensorView() = default;
  ConstTensorView(void const* data, DataType dtype, std::array<std::int64_t, Rank> shape)
      : data(data), dtype(dtype), shape(shape), stride(contiguous_stride(shape)) {}
  ConstTensorView(void const* data, DataType dtype, std::array<std::int64_t, Rank> shape,
                  std::array<std::int64_t, Rank> stride)
      : data(data), dtype(dtype), shape(shape), stride(stride) {}
};

// A writable strided view.
template <std::size_t Rank>
struct TensorView {
  void* data = nullptr;
  DataType dtype = DataType::kFloat32;
  std::array<std::int64_t, Rank> shape{};
  std::array<std::int64_t, Rank> stride{};

  TensorView() = default;
  TensorView(void* data, DataType dtype, std::array<std::int64_t, Rank> shape)
      : data(data), dtype(dtype), shape(shape), stride(contiguous_stride(shape)) {}
  TensorView(void* data, DataType dtype, std::array<std::int64_t, Rank> shape,
             std::array<std::int64_t, Rank> stride)
      : data(data), dtype(dtype), shape(shape), stride(stride) {}

  operator ConstTensorView<Rank>() const { return {data, dtype, shape, stride}; }  // NOLINT
};

}  // namespace sparsek
