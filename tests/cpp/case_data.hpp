// The case table (cases/attend.csv) and tensors made from its rows.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "sparsek/sparsek.hpp"

namespace sparsek::testing {

struct Case {
  std::string name;
  std::int64_t batch, num_q_heads, num_kv_heads, seq_len_q, seq_len_k, head_dim;
  SelectOptions select;
  Gate gate;
  std::string scores, lengths, layout;

  AttendOptions attend() const;
};

// How GoogleTest names a row.
inline void PrintTo(Case const& c, std::ostream* stream) { *stream << c.name; }

// All rows of the table.
std::vector<Case> const& case_table();
// The row of that name; throws where there is none.
Case const& case_named(std::string const& name);

double load_element(void const* data, DataType dtype, std::int64_t index);
void store_element(void* data, DataType dtype, std::int64_t index, double value);

// A tensor that owns its memory. What its elements do not cover, and elements that were never set,
// hold NaN (or a negative number, in an integer tensor).
template <std::size_t Rank>
class Tensor {
 public:
  using Shape = std::array<std::int64_t, Rank>;

  Tensor() = default;
  // Contiguous.
  Tensor(DataType dtype, Shape const& shape) : Tensor(dtype, shape, contiguous_stride(shape)) {}
  Tensor(DataType dtype, Shape const& shape, Shape const& stride)
      : dtype_(dtype), shape_(shape), stride_(stride) {
    std::int64_t end = 1;
    for (std::size_t i = 0; i < Rank; ++i) {
      if (shape[i] == 0) end = 0;
      end += (shape[i] - 1) * stride[i];
    }
    memory_.resize(std::max<std::int64_t>(0, end) * size_of(dtype));
    poison();
  }

  void poison() {
    auto const count = static_cast<std::int64_t>(memory_.size() / size_of(dtype_));
    for (std::int64_t i = 0; i < count; ++i) {
      store_element(
          memory_.data(), dtype_, i,
          dtype_ == DataType::kInt32 ? -987654321.0 : std::numeric_limits<double>::quiet_NaN());
    }
  }

  Shape const& shape() const { return shape_; }
  double get(Shape const& index) const {
    return load_element(memory_.data(), dtype_, offset(index));
  }
  void set(Shape const& index, double value) {
    store_element(memory_.data(), dtype_, offset(index), value);
  }
  template <typename T>
  T const* data() const {
    return reinterpret_cast<T const*>(memory_.data());
  }
  template <typename T>
  T* data() {
    return reinterpret_cast<T*>(memory_.data());
  }
  std::vector<std::byte> const& memory() const { return memory_; }

  ConstTensorView<Rank> view() const { return {memory_.data(), dtype_, shape_, stride_}; }
  TensorView<Rank> view() { return {memory_.data(), dtype_, shape_, stride_}; }

  // Calls body(index) for every element.
  template <typename Body>
  void for_each(Body const& body) const {
    Shape index{};
    for (std::int64_t const size : shape_) {
      if (size == 0) return;
    }
    for (;;) {
      body(static_cast<Shape const&>(index));
      std::size_t axis = Rank;
      while (axis > 0 && ++index[axis - 1] == shape_[axis - 1]) index[--axis] = 0;
      if (axis == 0) return;
    }
  }

  // The same values in another dtype (contiguous).
  Tensor as(DataType dtype) const {
    Tensor other(dtype, shape_);
    for_each([&](Shape const& i) { other.set(i, get(i)); });
    return other;
  }

 private:
  std::int64_t offset(Shape const& index) const {
    std::int64_t at = 0;
    for (std::size_t i = 0; i < Rank; ++i) at += index[i] * stride_[i];
    return at;
  }

  DataType dtype_ = DataType::kFloat32;
  Shape shape_{}, stride_{};
  std::vector<std::byte> memory_;
};

// A selection that owns its memory.
struct SelectionTensors {
  SelectionTensors() = default;
  SelectionTensors(Case const& c, DataType score_dtype);
  SelectionView view();

  Tensor<3> expiry, threshold, last_candidate;
};

// The inputs of one row of the table at one dtype. Elements at positions at or beyond a length stay
// NaN.
struct CaseData {
  CaseData(Case const& c, DataType dtype);

  std::optional<ConstTensorView<1>> lengths_view() const;
  std::int64_t length(std::int64_t b) const;

  Tensor<4> q, k, v;
  Tensor<3> scores;
  std::vector<std::int32_t> lengths;  // empty: none
};

// A poisoned output like q.
Tensor<4> make_output(Case const& c, DataType dtype);
Tensor<3> make_lse(Case const& c, DataType dtype);

// What the fp64 reference backend makes of the data: of the same numbers and the same selection,
// all in float64.
struct ReferenceResult {
  Tensor<4> out;
  Tensor<3> lse;
};
ReferenceResult attend_reference(Case const& c, CaseData const& data,
                                 SelectionTensors const& selection);

// |ours - reference| that is allowed at this dtype for an output of that size, with inputs from a
// standard normal: twice the rounding of weights and output, and a floor for sums in float32.
double output_tolerance(DataType dtype, double reference);

std::string join(std::array<std::int64_t, 4> const& index);

}  // namespace sparsek::testing
