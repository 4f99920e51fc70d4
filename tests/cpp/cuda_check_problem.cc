#include "cuda_check_problem.hpp"

#include <algorithm>
#include <cstring>

namespace sparsek::testing {
namespace {

std::vector<std::int32_t> prefix_sums(std::vector<std::int64_t> const& sizes) {
  std::vector<std::int32_t> sums{0};
  for (std::int64_t const n : sizes) sums.push_back(sums.back() + static_cast<std::int32_t>(n));
  return sums;
}

ConstTensorView<1> vector_view(std::vector<std::int32_t> const& values) {
  return {values.data(), DataType::kInt32, {static_cast<std::int64_t>(values.size())}};
}

// The sequence that position t of the packed ones belongs to.
std::size_t sequence_of(std::vector<std::int32_t> const& cu_seqlens, std::int64_t t) {
  return std::upper_bound(cu_seqlens.begin(), cu_seqlens.end(), t) - cu_seqlens.begin() - 1;
}

}  // namespace

template <std::size_t Rank>
CheckProblem<Rank>::CheckProblem(Row const& row, DataType dtype)
    : row(row), dtype(dtype), options(row.c.attend()) {
  options.sm_scale = row.sm_scale;
  make_data();
  q.for_each([&](auto const& i) { q.set(i, q.get(i) * row.q_scale); });
  if (row.plant_nan) plant_nan();
  selection = make_selection();
  Context reference;
  reference.backend = Backend::kReference;
  run_select(reference, operands(q, k, v), options.selection, selection.view());
  if (row.selection != SelectionKind::kSelected) make_foreign_expiry();
  run_reference();
}

template <std::size_t Rank>
void CheckProblem<Rank>::make_data() {
  Case const& c = row.c;
  if constexpr (!kPacked) {
    CaseData data(c, dtype);
    q = std::move(data.q), k = std::move(data.k), v = std::move(data.v);
    scores = std::move(data.scores);
    lengths = std::move(data.lengths);
  } else {
    cu_seqlens_q = prefix_sums(row.packed_q);
    cu_seqlens_k = prefix_sums(row.packed_k);
    q = {dtype, {c.seq_len_q, c.num_q_heads, c.head_dim}};
    k = {dtype, {c.seq_len_k, c.num_kv_heads, c.head_dim}};
    v = {dtype, {c.seq_len_k, c.num_kv_heads, c.head_dim}};
    scores = {DataType::kFloat32, {c.seq_len_k, c.num_kv_heads}};
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    auto const fill = [&](auto& t) {
      t.for_each([&](auto const& i) { t.set(i, normal(random)); });
    };
    fill(q), fill(k), fill(v), fill(scores);
  }
}

template <std::size_t Rank>
bool CheckProblem<Rank>::ignored(std::int64_t first, std::int64_t second) const {
  if (!row.plant_nan) return false;
  if constexpr (kPacked) return sequence_of(cu_seqlens_q, first) == 1;
  return first == 0 && second / (row.c.num_q_heads / row.c.num_kv_heads) == 1;
}

template <std::size_t Rank>
void CheckProblem<Rank>::plant_nan() {
  double const nan = std::numeric_limits<double>::quiet_NaN();
  q.for_each([&](auto const& i) {
    if (ignored(i[0], i[1])) q.set(i, nan);
  });
  for (Tensor<Rank>* t : {&k, &v}) {
    t->for_each([&](auto const& i) {
      if (kPacked ? sequence_of(cu_seqlens_k, i[0]) == 1 : i[0] == 0 && i[1] == 1) t->set(i, nan);
    });
  }
}

template <std::size_t Rank>
HostSelection<Rank - 1> CheckProblem<Rank>::make_selection() const {
  Case const& c = row.c;
  if constexpr (!kPacked) {
    SelectionTensors s(c, DataType::kFloat32);
    return {std::move(s.expiry), std::move(s.threshold), std::move(s.last_candidate)};
  } else {
    std::int64_t const chunks =
        c.seq_len_k / c.select.chunk_size + static_cast<std::int64_t>(row.packed_k.size());
    return {{DataType::kInt32, {c.num_kv_heads, c.seq_len_k}},
            {DataType::kFloat32, {c.num_kv_heads, chunks}},
            {DataType::kInt32, {c.num_kv_heads, chunks}}};
  }
}

template <std::size_t Rank>
bool CheckProblem<Rank>::chunk_counts(std::array<std::int64_t, Rank - 1> const& index) const {
  std::int64_t const chunk_size = row.c.select.chunk_size;
  if constexpr (!kPacked) {
    return lengths.empty() || index[2] * chunk_size < lengths[index[0]];
  } else {
    for (std::size_t b = 0; b + 1 < cu_seqlens_k.size(); ++b) {
      std::int64_t const first = cu_seqlens_k[b] / chunk_size + static_cast<std::int64_t>(b);
      std::int64_t const seq_len = cu_seqlens_k[b + 1] - cu_seqlens_k[b];
      std::int64_t const chunks = (seq_len + chunk_size - 1) / chunk_size;
      if (index[1] >= first && index[1] < first + chunks) return true;
    }
    return false;
  }
}

// Foreign selections are dense here.
template <std::size_t Rank>
void CheckProblem<Rank>::make_foreign_expiry() {
  options.origin = SelectionOrigin::kForeign;
  std::mt19937 random(13);
  if constexpr (!kPacked) {
    selection.expiry.for_each([&](auto const& i) {
      std::int64_t const end = row.c.seq_len_k, j = i[2];
      if (row.selection == SelectionKind::kForeignWindow) {
        selection.expiry.set(i, static_cast<double>(std::min(end, j + row.c.select.window)));
      } else if (row.selection == SelectionKind::kForeignRandom) {
        selection.expiry.set(i, static_cast<double>(j + random() % (end - j + 1)));
      }
    });
  }
  if (row.bounded) options.max_keys_per_tile = max_keys_per_tile();
}

// The least bound that is true: over every first query f, the keys before f - 128 that some query
// of f ... f + 127 sees, which are those that f sees.
template <std::size_t Rank>
std::int64_t CheckProblem<Rank>::max_keys_per_tile() const {
  std::int64_t most = 0;
  if constexpr (!kPacked) {
    std::int64_t const seq_len = row.c.seq_len_k;
    for (std::int64_t b = 0; b < row.c.batch; ++b) {
      for (std::int64_t h = 0; h < row.c.num_kv_heads; ++h) {
        std::vector<std::int64_t> change(seq_len + 1);
        for (std::int64_t j = 0; j < seq_len; ++j) {
          auto const expiry = static_cast<std::int64_t>(selection.expiry.get({b, h, j}));
          if (expiry <= j + 129) continue;  // sees no f > j + 128
          ++change[j + 129];
          --change[expiry];
        }
        std::int64_t count = 0;
        for (std::int64_t const step : change) most = std::max(most, count += step);
      }
    }
  }
  return most;
}

template <std::size_t Rank>
Operands<Rank> CheckProblem<Rank>::operands(Tensor<Rank> const& q, Tensor<Rank> const& k,
                                            Tensor<Rank> const& v) const {
  Operands<Rank> in{q.view(), k.view(), v.view(), scores.view()};
  if (!lengths.empty()) in.lengths = vector_view(lengths);
  if (kPacked) {
    in.cu_seqlens_q = vector_view(cu_seqlens_q);
    in.cu_seqlens_k = vector_view(cu_seqlens_k);
  }
  return in;
}

template <std::size_t Rank>
void CheckProblem<Rank>::run_reference() {
  Context context;
  context.backend = Backend::kReference;
  // The same numbers in float64, so that the reference rounds nothing.
  auto const q64 = q.as(DataType::kFloat64);
  auto const k64 = k.as(DataType::kFloat64);
  auto const v64 = v.as(DataType::kFloat64);
  auto const scores64 = scores.as(DataType::kFloat64);
  auto const threshold64 = selection.threshold.as(DataType::kFloat64);
  auto lse_shape = scores.shape();
  for (std::size_t i = 0; i + 1 < Rank; ++i) lse_shape[i] = q.shape()[i];
  out = {DataType::kFloat64, q.shape()};
  lse = {DataType::kFloat64, lse_shape};
  Operands<Rank> in = operands(q64, k64, v64);
  in.scores = scores64.view();
  BasicConstSelectionView<Rank - 1> view(
      static_cast<Tensor<Rank - 1> const&>(selection.expiry).view());
  if (!foreign()) view.threshold = threshold64.view();
  run_attend(context, in, view, options, out.view(), lse.view(), Optionals::kGiven);
}

template class CheckProblem<3>;
template class CheckProblem<4>;

}  // namespace sparsek::testing
