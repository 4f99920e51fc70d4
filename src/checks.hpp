// What the checkers of all stages share: expectations of one tensor or one option, each with the
// message that its violation gets.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "sparsek/context.hpp"
#include "sparsek/error.hpp"
#include "sparsek/tensor.hpp"

namespace sparsek {

inline constexpr std::int64_t kMaxPositions = std::numeric_limits<std::int32_t>::max() - 1;

template <std::size_t Rank>
std::string describe(std::array<std::int64_t, Rank> const& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < Rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

[[noreturn]] inline void fail(std::string const& name, std::string const& expected,
                              std::string const& got) {
  throw InvalidArgument(name + ": expected " + expected + ", got " + got);
}

template <std::size_t Rank>
std::int64_t num_elements(std::array<std::int64_t, Rank> const& shape) {
  std::int64_t n = 1;
  for (std::int64_t const size : shape) n *= size;
  return n;
}

template <std::size_t Rank>
void expect_data(char const* name, ConstTensorView<Rank> const& t) {
  for (std::int64_t const size : t.shape) {
    if (size < 0) fail(name, "sizes >= 0", describe(t.shape));
  }
  if (!t.data && num_elements(t.shape) > 0) fail(name, "memory of " + describe(t.shape), "null");
}

// `dims` spells the shape, e.g. "[B, Hkv, Sk]".
template <std::size_t Rank>
void expect_shape(char const* name, char const* dims, ConstTensorView<Rank> const& t,
                  std::array<std::int64_t, Rank> const& expected) {
  if (t.shape != expected) {
    fail(name, std::string("shape ") + dims + " = " + describe(expected), describe(t.shape));
  }
  expect_data(name, t);
}

template <std::size_t Rank>
void expect_dtype(char const* name, ConstTensorView<Rank> const& t, DataType dtype) {
  if (t.dtype != dtype) fail(name, std::string("dtype ") + name_of(dtype), name_of(t.dtype));
}

template <std::size_t Rank>
void expect_contiguous_rows(char const* name, ConstTensorView<Rank> const& t) {
  if (t.shape[Rank - 1] > 1 && t.stride[Rank - 1] != 1 && num_elements(t.shape) > 0) {
    fail(name, "a contiguous last dimension (stride 1)",
         "stride " + std::to_string(t.stride[Rank - 1]));
  }
}

template <std::size_t Rank>
void expect_contiguous(char const* name, ConstTensorView<Rank> const& t) {
  if (num_elements(t.shape) == 0) return;
  auto const wanted = contiguous_stride(t.shape);
  for (std::size_t i = 0; i < Rank; ++i) {
    if (t.shape[i] > 1 && t.stride[i] != wanted[i]) {
      fail(name, "contiguous strides " + describe(wanted), describe(t.stride));
    }
  }
}

// Two elements of an output must not share memory; a stride of 0 (an expanded tensor) is the way
// that happens.
template <std::size_t Rank>
void expect_writable(char const* name, ConstTensorView<Rank> const& t) {
  if (num_elements(t.shape) == 0) return;  // contiguous strides of an empty tensor may be 0
  for (std::size_t i = 0; i < Rank; ++i) {
    if (t.shape[i] > 1 && t.stride[i] == 0) {
      fail(name, "an output whose elements do not overlap", "strides " + describe(t.stride));
    }
  }
}

inline bool is_reference(Context const& c) { return c.backend == Backend::kReference; }
inline bool is_host(Context const& c) { return c.device.type == DeviceType::kCpu; }

inline void check_context(Context const& c) {
  bool const cuda_backend = c.backend == Backend::kPortable || c.backend == Backend::kSm90;
  bool const cpu_backend = c.backend == Backend::kReference || c.backend == Backend::kCpu;
  if (is_host(c) && cuda_backend) fail("backend", "one that runs on the CPU", "a CUDA backend");
  if (!is_host(c) && cpu_backend) {
    fail("backend", "one that runs on CUDA",
         is_reference(c) ? "reference, which reads host memory" : "cpu");
  }
  if (c.num_threads < 0) fail("num_threads", "a number >= 0", std::to_string(c.num_threads));
}

// The dtypes that each backend takes for q, k, v.
inline void expect_float_dtype(Context const& context, char const* name, DataType dtype) {
  if (dtype == DataType::kInt32) fail(name, "a floating-point dtype", "int32");
  if (is_reference(context)) return;
  if (dtype == DataType::kFloat64) {
    throw Unsupported(std::string(name) +
                      ": dtype float64 is served by the reference backend only; supported here: "
                      "float16, bfloat16" +
                      (is_host(context) ? ", float32" : ""));
  }
  if (!is_host(context) && dtype == DataType::kFloat32) {
    throw Unsupported(std::string(name) +
                      ": dtype float32 is not served on CUDA; supported there: float16, bfloat16");
  }
}

// Dtype of scores, threshold and lse.
inline DataType score_dtype_for(DataType dtype) {
  return dtype == DataType::kFloat64 ? DataType::kFloat64 : DataType::kFloat32;
}

inline void check_score_dtype(Context const& context, char const* name, DataType dtype) {
  if (dtype == DataType::kFloat32) return;
  if (dtype == DataType::kFloat64) {
    if (is_reference(context)) return;
    throw Unsupported(std::string(name) +
                      ": dtype float64 is served by the reference backend only; supported here: "
                      "float32");
  }
  fail(name, "dtype float32", name_of(dtype));
}

inline void check_seq_len(char const* name, std::int64_t n) {
  if (n > kMaxPositions) {
    fail(name, "at most " + std::to_string(kMaxPositions) + " positions", std::to_string(n));
  }
}

inline std::int32_t const* check_lengths(Context const& context,
                                         std::optional<ConstTensorView<1>> const& lengths,
                                         std::int64_t batch, std::int64_t seq_len) {
  if (!lengths) return nullptr;
  expect_shape("lengths", "[B]", *lengths, {batch});
  expect_dtype("lengths", *lengths, DataType::kInt32);
  expect_contiguous("lengths", *lengths);
  auto const* values = static_cast<std::int32_t const*>(lengths->data);
  for (std::int64_t b = 0; is_host(context) && b < batch; ++b) {
    if (values[b] < 0 || values[b] > seq_len) {
      fail("lengths", "values from 0 to Sk = " + std::to_string(seq_len),
           "lengths[" + std::to_string(b) + "] = " + std::to_string(values[b]));
    }
  }
  return values;
}

inline std::int32_t const* check_cu_seqlens(Context const& context, char const* name,
                                            ConstTensorView<1> const& t, std::int64_t total) {
  if (t.shape[0] < 1) fail(name, "shape [N + 1] with N >= 0", describe(t.shape));
  expect_data(name, t);
  expect_dtype(name, t, DataType::kInt32);
  expect_contiguous(name, t);
  auto const* values = static_cast<std::int32_t const*>(t.data);
  if (!is_host(context)) return values;
  std::int64_t const n = t.shape[0] - 1;
  if (values[0] != 0) fail(name, "a first value of 0", std::to_string(values[0]));
  for (std::int64_t b = 0; b < n; ++b) {
    if (values[b + 1] < values[b]) {
      fail(name, "values that never fall",
           std::to_string(values[b]) + " then " + std::to_string(values[b + 1]) + " at " +
               std::to_string(b + 1));
    }
  }
  if (values[n] != total) {
    fail(name, "a last value of " + std::to_string(total), std::to_string(values[n]));
  }
  return values;
}

// Whether a row of scores holds no infinity and no NaN, that is, no exponent of all ones. Written so
// that the compiler vectorises it: adding 1 to such an exponent carries into the sign bit.
inline bool is_finite_row(float const* row, std::int64_t n) {
  std::uint32_t carries = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    carries |= (std::bit_cast<std::uint32_t>(row[j]) & 0x7f800000u) + 0x00800000u;
  }
  return carries >> 31 == 0;
}

inline void check_heads(std::int64_t num_q_heads, std::int64_t num_kv_heads) {
  if (num_kv_heads == 0 ? num_q_heads != 0 : num_q_heads % num_kv_heads != 0) {
    fail("q", "a number of heads divisible by Hkv = " + std::to_string(num_kv_heads),
         std::to_string(num_q_heads));
  }
}

}  // namespace sparsek
