// Selection on CUDA against the fp64 reference, over random configurations and score distributions
// that the case table does not reach: ties, clusters, outliers of 1e30, ramps, few long rows that
// are split, many short ones.
//
//   sparsek_cuda_select_check [--count N] [--seed N] [--nonfinite]
//
// Expiry and last_candidate must agree bit for bit; thresholds are at most 2 ulp of max(|u_(k)|,
// |tau|) below the reference and never above it. --nonfinite also runs scores with NaN and
// infinities, whose results are unspecified: for compute-sanitizer, which sees whether an access
// strays.
//
// Exit status: 0 all passed, 1 something failed, 2 wrong usage, 77 no GPU (ctest: skipped).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda_check_device.hpp"
#include "sparsek/sparsek.hpp"

namespace sparsek::testing {
namespace {

using Generator = std::mt19937;

constexpr char const* kDistributions[] = {"normal", "ascending", "descending", "equal",
                                          "ties",   "narrow",    "outliers",   "zeros",
                                          "gaps",   "rounded",   "clusters",   "noisy ramp"};
constexpr int kNumDistributions = 12;

struct Configuration {
  std::int64_t batch, heads, seq_len;
  SelectOptions options;
  int distribution;
  bool with_lengths, strided, packed;
  unsigned seed;

  std::string describe() const {
    char text[256];
    std::snprintf(text, sizeof text, "B=%d H=%d S=%d k=%d w=%d C=%d M=%d %s%s%s%s seed %u",
                  int(batch), int(heads), int(seq_len), int(options.num_selected),
                  int(options.window), int(options.chunk_size), int(*options.num_candidates),
                  kDistributions[distribution], with_lengths ? " lengths" : "",
                  strided ? " strided" : "", packed ? " packed" : "", seed);
    return text;
  }
};

float draw(int distribution, int position, Generator& g, std::normal_distribution<float>& normal) {
  float const x = normal(g);
  switch (distribution) {
    case 1:
      return 0.01f * static_cast<float>(position);
    case 2:
      return -0.01f * static_cast<float>(position);
    case 3:
      return 0.25f;
    case 4:
      return std::round(2.f * x) / 2.f;
    case 5:
      return 1e-3f * x;
    case 6:
      return g() % 50 == 0 ? 1e30f * x : x;
    case 7:
      return g() % 3 == 0 ? -0.f : g() % 2 ? 0.f : g() % 5 == 0 ? 0.5f : -0.5f;
    case 8:
      return 3.f * static_cast<float>(g() % 1000);
    case 9:
      return std::round(x * 128.f) / 128.f;
    case 10:
      return static_cast<float>(g() % 4) + 1e-6f * x;
    case 11:
      return 1e-3f * static_cast<float>(position) + x;
    default:
      return x;
  }
}

// One selection in host memory.
struct HostSelection {
  std::vector<std::int32_t> expiry, last_candidate;
  std::vector<float> threshold;
};

class Check {
 public:
  explicit Check(bool nonfinite) : nonfinite_(nonfinite) {
    device_.device = {DeviceType::kCuda, 0};
    reference_.backend = Backend::kReference;
    cpu_.backend = Backend::kCpu;
  }

  bool run(Configuration const& c) {
    Generator g(c.seed);
    std::normal_distribution<float> normal;
    std::int64_t const seq = c.seq_len, rows = c.batch * c.heads;
    // Scores [rows][seq]; packed: one sequence of random length for each batch row.
    std::vector<std::int32_t> lengths, starts{0};
    for (std::int64_t b = 0; b < c.batch; ++b) {
      lengths.push_back(static_cast<std::int32_t>(g() % (seq + 1)));
      starts.push_back(starts.back() + lengths.back());
    }
    std::int64_t const total = c.packed ? starts.back() : seq;
    if (total == 0) return true;
    std::int64_t const chunks = c.packed ? total / c.options.chunk_size + c.batch
                                         : (seq + c.options.chunk_size - 1) / c.options.chunk_size;
    std::int64_t const sequences = c.packed ? 1 : c.batch;
    // Strided and packed scores lie as [position][head], the others as [head][position].
    bool const heads_inside = c.strided || c.packed;
    std::vector<float> scores(static_cast<std::size_t>(sequences * c.heads * total));
    auto const at = [&](std::int64_t b, std::int64_t h, std::int64_t j) {
      return static_cast<std::size_t>(heads_inside ? (b * total + j) * c.heads + h
                                                   : (b * c.heads + h) * total + j);
    };
    for (std::int64_t b = 0; b < sequences; ++b) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        for (std::int64_t j = 0; j < total; ++j) {
          scores[at(b, h, j)] = draw(c.distribution, static_cast<int>(j), g, normal);
        }
      }
    }
    if (nonfinite_) {
      for (float& u : scores) {
        if (g() % 7) continue;
        u = g() % 3 ? NAN : g() % 2 ? INFINITY : -INFINITY;
      }
    }

    auto const select_with = [&](Context const& context, void const* u, void const* lens,
                                 void const* cu, void* expiry, void* threshold, void* last) {
      if (c.packed) {
        select_varlen(context, ConstTensorView<2>(u, DataType::kFloat32, {total, c.heads}),
                      ConstTensorView<1>(cu, DataType::kInt32, {c.batch + 1}), c.options,
                      {TensorView<2>(expiry, DataType::kInt32, {c.heads, total}),
                       TensorView<2>(threshold, DataType::kFloat32, {c.heads, chunks}),
                       TensorView<2>(last, DataType::kInt32, {c.heads, chunks})});
        return;
      }
      std::array<std::int64_t, 3> const strides =
          heads_inside ? std::array<std::int64_t, 3>{total * c.heads, 1, c.heads}
                       : std::array<std::int64_t, 3>{total * c.heads, total, 1};
      std::optional<ConstTensorView<1>> lengths_view;
      if (c.with_lengths) lengths_view = ConstTensorView<1>(lens, DataType::kInt32, {c.batch});
      select(context, ConstTensorView<3>(u, DataType::kFloat32, {c.batch, c.heads, total}, strides),
             lengths_view, c.options,
             {TensorView<3>(expiry, DataType::kInt32, {c.batch, c.heads, total}),
              TensorView<3>(threshold, DataType::kFloat32, {c.batch, c.heads, chunks}),
              TensorView<3>(last, DataType::kInt32, {c.batch, c.heads, chunks})});
    };

    std::size_t const num_keys = static_cast<std::size_t>(c.packed ? c.heads * total : rows * seq);
    std::size_t const num_chunks = static_cast<std::size_t>((c.packed ? c.heads : rows) * chunks);
    HostSelection got{std::vector<std::int32_t>(num_keys), std::vector<std::int32_t>(num_chunks),
                      std::vector<float>(num_chunks)};
    DeviceBuffer u(scores.size() * 4, kPoisonInput, 0), lens(lengths.size() * 4, kPoisonInput, 0);
    DeviceBuffer cu(starts.size() * 4, kPoisonInput, 0), expiry(num_keys * 4, kPoisonOutput, 0);
    DeviceBuffer threshold(num_chunks * 4, kPoisonOutput, 0),
        last(num_chunks * 4, kPoisonOutput, 0);
    u.upload(scores.data()), lens.upload(lengths.data()), cu.upload(starts.data());
    select_with(device_, u.data(), lens.data(), cu.data(), expiry.data(), threshold.data(),
                last.data());
    cuda_check(cudaDeviceSynchronize(), "select");
    if (nonfinite_) return true;
    expiry.download(got.expiry.data()), threshold.download(got.threshold.data());
    last.download(got.last_candidate.data());

    HostSelection want = got;  // columns of no chunk are not written
    // The reference sorts anew for every chunk; long rows are left to the CPU backend.
    select_with(total * chunks <= 300'000 ? reference_ : cpu_, scores.data(), lengths.data(),
                starts.data(), want.expiry.data(), want.threshold.data(),
                want.last_candidate.data());
    return compare(c, want, got, lengths, starts, chunks);
  }

  double worst_ulp() const { return worst_ulp_; }

 private:
  bool compare(Configuration const& c, HostSelection const& want, HostSelection const& got,
               std::vector<std::int32_t> const& lengths, std::vector<std::int32_t> const& starts,
               std::int64_t chunks) {
    auto const fail = [&](char const* what, std::size_t index, double w, double x) {
      std::printf("FAIL %s: %s[%zu] is %.9g, expected %.9g\n", c.describe().c_str(), what, index, x,
                  w);
      return false;
    };
    for (std::size_t i = 0; i < want.expiry.size(); ++i) {
      if (want.expiry[i] != got.expiry[i]) {
        return fail("expiry", i, want.expiry[i], got.expiry[i]);
      }
    }
    for (std::size_t i = 0; i < want.threshold.size(); ++i) {
      // Chunks that start behind a sequence's last key hold anything.
      auto const column = static_cast<std::int64_t>(i) % chunks;
      if (c.packed) {
        std::size_t b = 0;
        while (b + 1 < lengths.size() &&
               starts[b + 1] / c.options.chunk_size + static_cast<std::int64_t>(b) + 1 <= column) {
          ++b;
        }
        std::int64_t const chunk =
            column - starts[b] / c.options.chunk_size - static_cast<std::int64_t>(b);
        if (chunk * c.options.chunk_size >= lengths[b]) continue;
      } else if (c.with_lengths) {
        std::size_t const b = i / static_cast<std::size_t>(c.heads * chunks);
        if (column * c.options.chunk_size >= lengths[b]) continue;
      }
      if (want.last_candidate[i] != got.last_candidate[i]) {
        return fail("last_candidate", i, want.last_candidate[i], got.last_candidate[i]);
      }
      float const w = want.threshold[i], x = got.threshold[i];
      if (w == x) continue;
      // |u_(k)| is at most |tau| + 1.
      float const scale = std::abs(w) + 1.f;
      double const ulp = double{std::nextafterf(scale, INFINITY)} - scale;
      double const error = (double{x} - w) / ulp;
      worst_ulp_ = std::max(worst_ulp_, std::abs(error));
      if (!(error <= 0.0 && error >= -2.0)) return fail("threshold", i, w, x);
    }
    return true;
  }

  bool const nonfinite_;
  Context device_, reference_, cpu_;
  double worst_ulp_ = 0.0;
};

Configuration random_configuration(Generator& g, int index) {
  auto const pick = [&](std::initializer_list<std::int64_t> values) {
    return *(values.begin() + g() % values.size());
  };
  Configuration c{};
  c.batch = 1 + g() % 3, c.heads = pick({1, 2, 5});
  c.seq_len = pick({1, 2, 127, 128, 129, 300, 513, 1000, 1500, 2200});
  c.options.num_selected = pick({0, 1, 3, 17, 64, 256, 5000});
  c.options.window = pick({0, 1, 64, 128, 300});
  c.options.chunk_size = pick({1, 2, 16, 100, 128, 256, 300, 700});
  c.strided = g() % 3 == 0, c.with_lengths = g() % 3 == 0, c.packed = g() % 4 == 0;
  if (index % 16 == 7) {  // many rows
    c.batch = 3, c.heads = 100, c.seq_len = pick({600, 1100});
  } else if (index % 16 == 15) {  // split rows
    c.batch = 1, c.heads = pick({1, 2}), c.seq_len = pick({8192, 12345});
    c.options.chunk_size = pick({100, 128, 256, 700, 9000}), c.packed = false;
  }
  std::int64_t const k = c.options.num_selected;
  c.options.num_candidates = std::max(k, pick({k, 4 * k, k + 1, 2 * k + 10, 100'000}));
  c.distribution = index % kNumDistributions;
  c.seed = g();
  return c;
}

int main(int argc, char** argv) {
  int count = 200;
  unsigned seed = 1;
  bool nonfinite = false;
  for (int i = 1; i < argc; ++i) {
    std::string const flag = argv[i];
    if (flag == "--nonfinite") {
      nonfinite = true;
    } else if (flag == "--count" && i + 1 < argc) {
      count = std::stoi(argv[++i]);
    } else if (flag == "--seed" && i + 1 < argc) {
      seed = static_cast<unsigned>(std::stoul(argv[++i]));
    } else {
      std::fprintf(stderr, "usage: %s [--count N] [--seed N] [--nonfinite]\n", argv[0]);
      return 2;
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no GPU: skipped");
    return 77;
  }
  Check check(nonfinite);
  Generator g(seed);
  int failed = 0;
  for (int i = 0; i < count; ++i) {
    Configuration const c = random_configuration(g, i);
    try {
      failed += !check.run(c);
    } catch (std::exception const& error) {
      std::printf("FAIL %s: %s\n", c.describe().c_str(), error.what());
      return 1;
    }
  }
  std::printf("%d configurations, %d failed; thresholds differ by at most %.2f ulp\n", count,
              failed, check.worst_ulp());
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace sparsek::testing

int main(int argc, char** argv) { return sparsek::testing::main(argc, argv); }
