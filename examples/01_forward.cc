// SparseK attention in C++, without Python: score -> select -> attend on the CPU.
//
//   cmake --install build/release --prefix <prefix>
//   cmake -S examples -B build/examples -DCMAKE_PREFIX_PATH=<prefix>
//   cmake --build build/examples && build/examples/01_forward
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <exception>
#include <iostream>
#include <optional>
#include <random>
#include <vector>

#include "sparsek/sparsek.hpp"

namespace {

constexpr std::int64_t kBatch = 1;
constexpr std::int64_t kNumQHeads = 4;
constexpr std::int64_t kNumKvHeads = 2;  // two query heads share each KV head
constexpr std::int64_t kSeqLen = 1024;
constexpr std::int64_t kHeadDim = 64;

std::vector<float> random_normal(std::int64_t count, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  std::ranges::generate(values, [&] { return normal(generator); });
  return values;
}

// The largest difference between the fast backend's output and the fp64 reference's.
float run() {
  using sparsek::DataType;
  std::array const q_shape{kBatch, kNumQHeads, kSeqLen, kHeadDim};
  std::array const kv_shape{kBatch, kNumKvHeads, kSeqLen, kHeadDim};
  std::array const score_shape{kBatch, kNumKvHeads, kSeqLen};

  std::vector<float> q = random_normal(kBatch * kNumQHeads * kSeqLen * kHeadDim, 1);
  std::vector<float> k = random_normal(kBatch * kNumKvHeads * kSeqLen * kHeadDim, 2);
  std::vector<float> v = random_normal(kBatch * kNumKvHeads * kSeqLen * kHeadDim, 3);
  // What a trained scorer would give: one importance per token and KV head.
  std::vector<float> scores = random_normal(kBatch * kNumKvHeads * kSeqLen, 4);

  sparsek::ConstTensorView<4> const q_view(q.data(), DataType::kFloat32, q_shape);
  sparsek::ConstTensorView<4> const k_view(k.data(), DataType::kFloat32, kv_shape);
  sparsek::ConstTensorView<4> const v_view(v.data(), DataType::kFloat32, kv_shape);
  sparsek::ConstTensorView<3> const scores_view(scores.data(), DataType::kFloat32, score_shape);

  // Each query sees the 64 largest-scored keys of its past and a window of 32 to 95 recent ones.
  sparsek::SelectOptions const select_options{
      .num_selected = 64, .window = 32, .chunk_size = 64, .num_candidates = std::nullopt};
  sparsek::AttendOptions const attend_options{.gate = sparsek::Gate::kSoftmax,
                                              .selection = select_options};

  std::int64_t const num_chunks =
      (kSeqLen + select_options.chunk_size - 1) / select_options.chunk_size;
  std::array const chunk_shape{kBatch, kNumKvHeads, num_chunks};
  std::vector<std::int32_t> expiry(scores.size());
  std::vector<float> threshold(kBatch * kNumKvHeads * num_chunks);
  std::vector<std::int32_t> last_candidate(threshold.size());
  sparsek::SelectionView const selection{
      .expiry = {expiry.data(), DataType::kInt32, score_shape},
      .threshold = {threshold.data(), DataType::kFloat32, chunk_shape},
      .last_candidate =
          sparsek::TensorView<3>(last_candidate.data(), DataType::kInt32, chunk_shape)};

  sparsek::Context const context;  // the CPU, as many threads as the process may use
  sparsek::select(context, scores_view, std::nullopt, select_options, selection);

  std::vector<float> out(q.size());
  sparsek::TensorView<4> const out_view(out.data(), DataType::kFloat32, q_shape);
  sparsek::attend(context, q_view, k_view, v_view, scores_view, selection, std::nullopt,
                  attend_options, out_view, std::nullopt);

  std::vector<float> expected(q.size());
  sparsek::TensorView<4> const expected_view(expected.data(), DataType::kFloat32, q_shape);
  sparsek::attend(sparsek::Context{.backend = sparsek::Backend::kReference}, q_view, k_view, v_view,
                  scores_view, selection, std::nullopt, attend_options, expected_view,
                  std::nullopt);

  float max_difference = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    max_difference = std::max(max_difference, std::abs(out[i] - expected[i]));
  }

  auto const kernel =
      sparsek::attend_capability(context, DataType::kFloat32, q_shape, kv_shape, attend_options)
          .kernel;
  std::int64_t const last_query = kSeqLen - 1;
  std::int64_t const visible =
      std::count_if(expiry.begin(), expiry.begin() + kSeqLen,
                    [=](std::int32_t first_blind) { return last_query < first_blind; });
  std::cout << "sparsek " << sparsek::version() << ", kernel " << kernel << "\n"
            << "the last query of head 0 sees " << visible << " of " << kSeqLen << " keys\n"
            << "largest difference to the fp64 reference: " << max_difference << "\n";
  return max_difference;
}

}  // namespace

int main() {
  try {
    return run() < 1e-4F ? 0 : 1;
  } catch (std::exception const& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
