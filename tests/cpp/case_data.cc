#include "case_data.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>

namespace sparsek::testing {
namespace {

// Independent of the library's own conversions: through the value, not the bits.
double half_to_double(std::uint16_t h) {
  int const exponent = h >> 10 & 31;
  int const mantissa = h & 1023;
  double const sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

std::uint16_t double_to_half(double x) {
  if (std::isnan(x)) return 0x7E00;
  std::uint16_t const sign = std::signbit(x) ? 0x8000 : 0;
  double const magnitude = std::fabs(x);
  if (magnitude >= 65520.0) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
  int const scale = std::max(exponent - 11, -24);
  auto const units = static_cast<std::uint16_t>(std::nearbyint(std::ldexp(magnitude, -scale)));
  // `units` of 2048 carries into the exponent, which is what rounding up to a power of 2 means.
  int const biased = scale == -24 && units < 1024 ? 0 : scale + 25;
  return biased == 0 ? sign | units : sign | ((biased << 10) + (units - 1024));
}

std::uint16_t double_to_bf16(double x) {
  if (std::isnan(x)) return 0x7FC0;
  auto const bits = std::bit_cast<std::uint32_t>(static_cast<float>(x));
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

std::vector<std::string> split(std::string const& line) {
  std::vector<std::string> fields;
  std::istringstream stream(line);
  for (std::string field; std::getline(stream, field, ',');) fields.push_back(field);
  return fields;
}

Gate gate_from(std::string const& name) {
  if (name == "none") return Gate::kNone;
  if (name == "value") return Gate::kValue;
  if (name == "softmax") return Gate::kSoftmax;
  throw std::runtime_error("case table: unknown gate " + name);
}

std::vector<Case> read_table() {
  std::ifstream file(SPARSEK_CASE_TABLE);
  std::string line;
  if (!std::getline(file, line)) throw std::runtime_error("cannot read " SPARSEK_CASE_TABLE);
  std::vector<Case> cases;
  while (std::getline(file, line)) {
    auto const f = split(line);
    if (f.size() != 15) throw std::runtime_error("case table: expected 15 fields: " + line);
    auto const number = [&](std::size_t i) { return std::stoll(f[i]); };
    Case c{f[0],      number(1), number(2), number(3), number(4), number(5),
           number(6), {},        Gate{},    f[12],     f[13],     f[14]};
    c.select.num_selected = number(7);
    c.select.window = number(8);
    c.select.chunk_size = number(9);
    if (number(10) == -1) c.select.num_candidates = std::max(c.select.num_selected, c.seq_len_k);
    if (number(10) > 0) c.select.num_candidates = number(10);
    c.gate = gate_from(f[11]);
    cases.push_back(c);
  }
  return cases;
}

Tensor<4> make_tensor(std::string const& layout, DataType dtype,
                      std::array<std::int64_t, 4> const& shape) {
  auto const [b, h, s, d] = shape;
  if (layout == "bhsd") return {dtype, shape};
  if (layout == "bshd") return {dtype, shape, {s * h * d, d, h * d, 1}};
  if (layout == "sliced") {
    std::int64_t const row = d + 3, head = (s + 2) * row;
    return {dtype, shape, {(h + 1) * head, head, row, 1}};
  }
  throw std::runtime_error("case table: unknown layout " + layout);
}

Tensor<3> make_scores(std::string const& layout, std::array<std::int64_t, 3> const& shape) {
  auto const [b, h, s] = shape;
  if (layout == "bshd") return {DataType::kFloat32, shape, {s * h, 1, h}};
  if (layout == "sliced") return {DataType::kFloat32, shape, {h * s * 2, s * 2, 2}};
  return {DataType::kFloat32, shape};
}

std::vector<double> score_row(std::string const& kind, std::int64_t n, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<double> u(n);
  for (std::int64_t j = 0; j < n; ++j) {
    if (kind == "normal") u[j] = normal(random);
    if (kind == "ties") u[j] = std::copysign(std::round(2 * normal(random)) / 2, normal(random));
    if (kind == "ties" && u[j] != 0.0) u[j] = std::round(2 * normal(random)) / 2;
    if (kind == "equal") u[j] = 0.25;
    if (kind == "huge") u[j] = 300 * normal(random);
    if (kind == "tiny") u[j] = 1e-3 * normal(random);
    if (kind == "ascending") u[j] = 0.01 * static_cast<double>(j);
    if (kind == "descending") u[j] = -0.01 * static_cast<double>(j);
    if (kind == "half_gap") u[j] = 0.5 * static_cast<double>(j) - 0.25 * static_cast<double>(n);
  }
  if (kind == "half_gap") std::shuffle(u.begin(), u.end(), random);
  return u;
}

}  // namespace

AttendOptions Case::attend() const {
  AttendOptions options;
  options.gate = gate;
  options.selection = select;
  return options;
}

std::vector<Case> const& case_table() {
  static std::vector<Case> const table = read_table();
  return table;
}

Case const& case_named(std::string const& name) {
  for (Case const& c : case_table()) {
    if (c.name == name) return c;
  }
  throw std::runtime_error("case table: no row " + name);
}

double load_element(void const* data, DataType dtype, std::int64_t index) {
  switch (dtype) {
    case DataType::kFloat16:
      return half_to_double(static_cast<std::uint16_t const*>(data)[index]);
    case DataType::kBFloat16:
      return std::bit_cast<float>(
          static_cast<std::uint32_t>(static_cast<std::uint16_t const*>(data)[index]) << 16);
    case DataType::kFloat32:
      return static_cast<float const*>(data)[index];
    case DataType::kFloat64:
      return static_cast<double const*>(data)[index];
    case DataType::kInt32:
      return static_cast<std::int32_t const*>(data)[index];
  }
  return 0.0;
}

void store_element(void* data, DataType dtype, std::int64_t index, double value) {
  switch (dtype) {
    case DataType::kFloat16:
      static_cast<std::uint16_t*>(data)[index] = double_to_half(value);
      return;
    case DataType::kBFloat16:
      static_cast<std::uint16_t*>(data)[index] = double_to_bf16(value);
      return;
    case DataType::kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    case DataType::kFloat64:
      static_cast<double*>(data)[index] = value;
      return;
    case DataType::kInt32:
      static_cast<std::int32_t*>(data)[index] = static_cast<std::int32_t>(value);
      return;
  }
}

SelectionTensors::SelectionTensors(Case const& c, DataType score_dtype) {
  std::int64_t const chunks = (c.seq_len_k + c.select.chunk_size - 1) / c.select.chunk_size;
  expiry = {DataType::kInt32, {c.batch, c.num_kv_heads, c.seq_len_k}};
  threshold = {score_dtype, {c.batch, c.num_kv_heads, chunks}};
  last_candidate = {DataType::kInt32, {c.batch, c.num_kv_heads, chunks}};
}

SelectionView SelectionTensors::view() {
  return {expiry.view(), threshold.view(), last_candidate.view()};
}

CaseData::CaseData(Case const& c, DataType dtype)
    : q(make_tensor(c.layout, dtype, {c.batch, c.num_q_heads, c.seq_len_q, c.head_dim})),
      k(make_tensor(c.layout, dtype, {c.batch, c.num_kv_heads, c.seq_len_k, c.head_dim})),
      v(make_tensor(c.layout, dtype, {c.batch, c.num_kv_heads, c.seq_len_k, c.head_dim})),
      scores(make_scores(c.layout, {c.batch, c.num_kv_heads, c.seq_len_k})) {
  std::mt19937 random(7);
  if (c.lengths == "ragged") {
    for (std::int64_t b = 0; b < c.batch; ++b) {
      std::int64_t const n = b == 0  ? c.seq_len_k
                             : b < 3 ? b - 1
                                     : std::max<std::int64_t>(1, c.seq_len_k - 1 - 37 * b);
      lengths.push_back(static_cast<std::int32_t>(n));
    }
  }
  std::normal_distribution<double> normal;
  auto const fill = [&](Tensor<4>& t, std::int64_t first_position) {
    t.for_each([&](auto const& i) {
      if (first_position + i[2] < length(i[0])) t.set(i, normal(random));
    });
  };
  fill(q, c.seq_len_k - c.seq_len_q);
  fill(k, 0);
  fill(v, 0);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t h = 0; h < c.num_kv_heads; ++h) {
      auto const row = score_row(c.scores, c.seq_len_k, random);
      for (std::int64_t j = 0; j < length(b); ++j) scores.set({b, h, j}, row[j]);
    }
  }
}

std::optional<ConstTensorView<1>> CaseData::lengths_view() const {
  if (lengths.empty()) return std::nullopt;
  return ConstTensorView<1>{
      lengths.data(), DataType::kInt32, {static_cast<std::int64_t>(lengths.size())}};
}

std::int64_t CaseData::length(std::int64_t b) const {
  return lengths.empty() ? k.shape()[2] : lengths[b];
}

Tensor<4> make_output(Case const& c, DataType dtype) {
  return make_tensor(c.layout, dtype, {c.batch, c.num_q_heads, c.seq_len_q, c.head_dim});
}

Tensor<3> make_lse(Case const& c, DataType dtype) {
  return {dtype, {c.batch, c.num_q_heads, c.seq_len_q}};
}

ReferenceResult attend_reference(Case const& c, CaseData const& data,
                                 SelectionTensors const& selection) {
  Context context;
  context.backend = Backend::kReference;
  auto const q = data.q.as(DataType::kFloat64);
  auto const k = data.k.as(DataType::kFloat64);
  auto const v = data.v.as(DataType::kFloat64);
  auto const scores = data.scores.as(DataType::kFloat64);
  auto const threshold = selection.threshold.as(DataType::kFloat64);
  ConstSelectionView view(selection.expiry.view());
  view.threshold = threshold.view();
  ReferenceResult result{{DataType::kFloat64, q.shape()}, make_lse(c, DataType::kFloat64)};
  attend(context, q.view(), k.view(), v.view(), scores.view(), view, data.lengths_view(),
         c.attend(), result.out.view(), result.lse.view());
  return result;
}

double output_tolerance(DataType dtype, double reference) {
  double const floor = 4e-6;
  double const unit = dtype == DataType::kBFloat16  ? 0x1p-9
                      : dtype == DataType::kFloat16 ? 0x1p-12
                                                    : 0x1p-22;
  return 2.0 * unit * (1.0 + std::fabs(reference)) + floor;
}

std::string join(std::array<std::int64_t, 4> const& index) {
  std::string text;
  for (std::int64_t const i : index) text += (text.empty() ? "" : ", ") + std::to_string(i);
  return text;
}

}  // namespace sparsek::testing
