// What the timing programs share: configurations from flags, device data, both protocols, JSON.
//
//   <program> [flags] [--config "flags"]... [--file PATH]
//
//   --batch N --heads N --kv-heads N --seq N --seq-q N --dim N      shapes; kv-heads: heads, seq-q: seq
//   --k N --w N --c N --m N                                         selection; m: 4 k
//   --gate softmax|value|none   --dtype float16|bfloat16   --backend auto|portable|sm90
//   --lengths none|N,N,...                                          repeated over the batch
//   --stages NAME,NAME,...                                          default: all
//   --launches N   launches of the sustained protocol (at least 80)
//   --rounds N     both protocols N times; the figures are medians over all rounds
//
// Every --config and every line of a file is a configuration of its own, on top of the flags
// outside. One JSON object per line and configuration goes to stdout. Times are microseconds:
//   first      median of 10 launches after a pause of 0.3 s
//   sustained  median of the second half of `launches` launches without a pause (a dense kernel
//              runs into the card's power limit)
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sparsek/sparsek.hpp"

namespace sparsek_bench {

using sparsek::Backend;
using sparsek::DataType;
using sparsek::Gate;

constexpr auto kPause = std::chrono::milliseconds(300);
constexpr int kFirstLaunches = 10;
constexpr int kMinSustainedLaunches = 80;
constexpr int kWarmUps = 3;

inline void check(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// --- configuration

struct Configuration {
  std::int64_t batch = 16, heads = 96, kv_heads = 0, seq = 4096, seq_q = 0, dim = 128;
  std::int64_t num_selected = 256, window = 128, chunk_size = 128, num_candidates = -1;
  std::string gate = "softmax", dtype = "float16", backend = "auto", lengths = "none";
  std::string stages = "all";
  int launches = kMinSustainedLaunches, rounds = 1;

  std::int64_t num_kv_heads() const { return kv_heads ? kv_heads : heads; }
  std::int64_t num_queries() const { return seq_q ? seq_q : seq; }
  DataType data_type() const { return lookup("--dtype", dtype, kDataTypes); }
  Gate gate_kind() const { return lookup("--gate", gate, kGates); }
  Backend backend_kind() const { return lookup("--backend", backend, kBackends); }
  bool has_stage(std::string const& name) const {
    return stages == "all" || ("," + stages + ",").find("," + name + ",") != std::string::npos;
  }

  sparsek::AttendOptions attend() const {
    sparsek::AttendOptions options;
    options.gate = gate_kind();
    options.selection = {.num_selected = num_selected, .window = window, .chunk_size = chunk_size};
    if (num_candidates >= 0) options.selection.num_candidates = num_candidates;
    return options;
  }

  // lengths[b] for every batch row; empty: none.
  std::vector<std::int32_t> row_lengths() const {
    if (lengths == "none") return {};
    std::vector<std::int32_t> given, all;
    std::istringstream stream(lengths);
    for (std::string item; std::getline(stream, item, ',');) given.push_back(std::stoi(item));
    for (std::int64_t b = 0; b < batch; ++b) {
      all.push_back(given.at(static_cast<std::size_t>(b) % given.size()));
      if (all.back() < 0 || all.back() > seq) throw std::invalid_argument("--lengths: 0 ... seq");
    }
    return all;
  }

 private:
  template <typename T>
  static T lookup(char const* flag, std::string const& name,
                  std::map<std::string, T> const& table) {
    auto const found = table.find(name);
    if (found != table.end()) return found->second;
    std::string known;
    for (auto const& [key, value] : table) known += (known.empty() ? "" : ", ") + key;
    throw std::invalid_argument(std::string(flag) + ": expected one of " + known + ", got " + name);
  }
  inline static std::map<std::string, DataType> const kDataTypes{{"float16", DataType::kFloat16},
                                                                 {"bfloat16", DataType::kBFloat16}};
  inline static std::map<std::string, Gate> const kGates{
      {"softmax", Gate::kSoftmax}, {"value", Gate::kValue}, {"none", Gate::kNone}};
  inline static std::map<std::string, Backend> const kBackends{
      {"auto", Backend::kAuto}, {"portable", Backend::kPortable}, {"sm90", Backend::kSm90}};
};

inline std::vector<std::string> words_of(std::string const& line) {
  std::istringstream stream(line);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

// Reads flags into `c`; configurations of their own are collected as text.
inline void parse(std::vector<std::string> const& words, Configuration& c,
                  std::vector<std::string>* configurations) {
  std::map<std::string, std::int64_t*> const integers{
      {"--batch", &c.batch},     {"--heads", &c.heads}, {"--kv-heads", &c.kv_heads},
      {"--seq", &c.seq},         {"--seq-q", &c.seq_q}, {"--dim", &c.dim},
      {"--k", &c.num_selected},  {"--w", &c.window},    {"--c", &c.chunk_size},
      {"--m", &c.num_candidates}};
  std::map<std::string, std::string*> const texts{{"--gate", &c.gate},
                                                  {"--dtype", &c.dtype},
                                                  {"--backend", &c.backend},
                                                  {"--lengths", &c.lengths},
                                                  {"--stages", &c.stages}};
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::string const& flag = words[i];
    if (++i == words.size()) throw std::invalid_argument(flag + " needs a value");
    std::string const& value = words[i];
    if (auto const found = integers.find(flag); found != integers.end()) {
      *found->second = std::stoll(value);
    } else if (auto const found = texts.find(flag); found != texts.end()) {
      *found->second = value;
    } else if (flag == "--launches") {
      c.launches = std::max(kMinSustainedLaunches, std::stoi(value));
    } else if (flag == "--rounds") {
      c.rounds = std::max(1, std::stoi(value));
    } else if (flag == "--config" && configurations) {
      configurations->push_back(value);
    } else if (flag == "--file" && configurations) {
      std::ifstream file(value);
      if (!file) throw std::invalid_argument("--file: cannot read " + value);
      for (std::string line; std::getline(file, line);) {
        if (!words_of(line).empty() && line[0] != '#') configurations->push_back(line);
      }
    } else {
      throw std::invalid_argument("unknown flag " + flag);
    }
  }
}

// --- data

inline std::uint16_t to_half(float x) {
  // Exact scaling by powers of 2 does the rounding: |x| < 8 here, so nothing overflows.
  int exponent = 0;
  float const magnitude = std::fabs(x);
  std::frexp(magnitude, &exponent);
  int const scale = std::max(exponent - 11, -24);
  auto const units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, -scale)));
  // `units` holds the implicit bit, which adds 1 to the exponent field (none in a subnormal number).
  std::uint32_t const bits = (static_cast<std::uint32_t>(scale + 24) << 10) + units;
  return static_cast<std::uint16_t>((std::signbit(x) ? 0x8000u : 0u) + bits);
}

inline std::uint16_t to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
  }
  DeviceMemory(DeviceMemory const&) = delete;
  DeviceMemory& operator=(DeviceMemory const&) = delete;
  ~DeviceMemory() { cudaFree(data_); }

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  void upload(void const* host, std::size_t bytes) const {
    check(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

// Standard normal numbers. The host makes one block; copies of it fill the rest. Its odd length puts
// every head at another place of the block.
inline void fill_normal(DeviceMemory const& memory, DataType dtype, unsigned seed) {
  std::size_t const size = sparsek::size_of(dtype);
  std::size_t const count = memory.bytes() / size;
  std::size_t const block = std::min<std::size_t>(count, (std::size_t{1} << 24) + 1049);
  std::vector<std::byte> host(block * size);
  std::size_t const num_threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(seed * 1000 + static_cast<unsigned>(t));
      std::normal_distribution<float> normal;
      for (std::size_t i = block * t / num_threads; i < block * (t + 1) / num_threads; ++i) {
        float const x = normal(random);
        std::uint16_t const bits = dtype == DataType::kFloat16 ? to_half(x) : to_bfloat16(x);
        if (dtype == DataType::kFloat32) {
          std::memcpy(&host[i * size], &x, size);
        } else {
          std::memcpy(&host[i * size], &bits, size);
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
  memory.upload(host.data(), host.size());
  auto* const base = static_cast<std::byte*>(memory.data());
  for (std::size_t filled = host.size(); filled < memory.bytes(); filled *= 2) {
    check(cudaMemcpy(base + filled, base, std::min(filled, memory.bytes() - filled),
                     cudaMemcpyDeviceToDevice),
          "cudaMemcpy");
  }
}

// Lends one buffer to one call after another, so that no allocation is timed.
class LentBuffer final : public sparsek::WorkspaceAllocator {
 public:
  explicit LentBuffer(std::size_t bytes) : memory_(bytes) {}
  void* allocate(std::size_t bytes) override {
    std::size_t const at = used_;
    used_ += (bytes + sparsek::kWorkspaceAlignment - 1) / sparsek::kWorkspaceAlignment *
             sparsek::kWorkspaceAlignment;
    if (at + bytes > memory_.bytes()) throw std::runtime_error("workspace query was too low");
    ++lent_;
    return static_cast<std::byte*>(memory_.data()) + at;
  }
  void deallocate(void*) noexcept override {
    if (--lent_ == 0) used_ = 0;
  }

 private:
  DeviceMemory memory_;
  std::size_t used_ = 0;
  int lent_ = 0;
};

// --- timing

inline double median(std::vector<double> values) {
  auto const middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

// Microseconds of each of `launches` calls in a row, from events between them.
inline std::vector<double> launch_times(std::function<void()> const& call, int launches,
                                        cudaStream_t stream) {
  std::vector<cudaEvent_t> events(static_cast<std::size_t>(launches) + 1);
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event), "cudaEventCreate");
  check(cudaEventRecord(events[0], stream), "cudaEventRecord");
  for (std::size_t i = 1; i < events.size(); ++i) {
    call();
    check(cudaEventRecord(events[i], stream), "cudaEventRecord");
  }
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  std::vector<double> times;
  for (std::size_t i = 1; i < events.size(); ++i) {
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, events[i - 1], events[i]), "cudaEventElapsedTime");
    times.push_back(1e3 * static_cast<double>(ms));
  }
  for (cudaEvent_t const event : events) cudaEventDestroy(event);
  return times;
}

struct Timing {
  double first_us, sustained_us;
};

inline Timing time_stage(std::function<void()> const& call, Configuration const& c,
                         cudaStream_t stream) {
  for (int i = 0; i < kWarmUps; ++i) call();
  check(cudaStreamSynchronize(stream), "warm-up");
  std::vector<double> first, sustained;
  for (int round = 0; round < c.rounds; ++round) {
    std::this_thread::sleep_for(kPause);
    for (double const t : launch_times(call, kFirstLaunches, stream)) first.push_back(t);
    auto const times = launch_times(call, c.launches, stream);
    sustained.insert(sustained.end(), times.begin() + c.launches / 2, times.end());
  }
  return {median(first), median(sustained)};
}

// --- one configuration

// Visible (query, key) pairs, all query heads: key j is seen by the queries from max(j, first query)
// to its expiry.
inline double count_visible(Configuration const& c, std::vector<std::int32_t> const& expiry,
                            std::vector<std::int32_t> const& lengths) {
  double pairs = 0.0;
  std::int64_t const first_query = c.seq - c.num_queries();
  for (std::int64_t row = 0; row < c.batch * c.num_kv_heads(); ++row) {
    std::int64_t const length = lengths.empty() ? c.seq : lengths[row / c.num_kv_heads()];
    for (std::int64_t j = 0; j < length; ++j) {
      std::int64_t const end = std::min<std::int64_t>(expiry[row * c.seq + j], length);
      pairs += static_cast<double>(std::max<std::int64_t>(0, end - std::max(j, first_query)));
    }
  }
  return pairs * static_cast<double>(c.heads) / static_cast<double>(c.num_kv_heads());
}

inline std::string json_text(std::string const& text) {
  std::string out = "\"";
  for (char const character : text) {
    if (character == '"' || character == '\\') out += '\\';
    out += character;
  }
  return out + "\"";
}

class JsonLine {
 public:
  void add(std::string const& name, std::string const& text) { add_raw(name, json_text(text)); }
  void add(std::string const& name, std::int64_t number) { add_raw(name, std::to_string(number)); }
  void add(std::string const& name, double number) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.6g", number);
    add_raw(name, text);
  }
  void print() const {
    std::printf("{%s}\n", text_.c_str());
    std::fflush(stdout);
  }

 private:
  void add_raw(std::string const& name, std::string const& value) {
    text_ += (text_.empty() ? "" : ", ") + json_text(name) + ": " + value;
  }
  std::string text_;
};

inline void describe(Configuration const& c, std::string const& gpu, JsonLine& line) {
  line.add("gpu", gpu);
  line.add("batch", c.batch);
  line.add("heads", c.heads);
  line.add("kv_heads", c.num_kv_heads());
  line.add("seq_len", c.seq);
  line.add("seq_len_q", c.num_queries());
  line.add("head_dim", c.dim);
  line.add("num_selected", c.num_selected);
  line.add("window", c.window);
  line.add("chunk_size", c.chunk_size);
  line.add("num_candidates", c.num_candidates >= 0 ? c.num_candidates : 4 * c.num_selected);
  line.add("gate", c.gate);
  line.add("dtype", c.dtype);
  line.add("backend", c.backend);
  line.add("lengths", c.lengths);
}

// What a configuration works on.
struct Tensors {
  explicit Tensors(Configuration const& c)
      : q(element_bytes(c, c.heads * c.num_queries())),
        k(element_bytes(c, c.num_kv_heads() * c.seq)),
        v(k.bytes()),
        out(q.bytes()),
        lse(4 * static_cast<std::size_t>(c.batch * c.heads * c.num_queries())),
        scores(4 * static_cast<std::size_t>(c.batch * c.num_kv_heads() * c.seq)),
        expiry(scores.bytes()),
        threshold(4 * static_cast<std::size_t>(c.batch * c.num_kv_heads() * num_chunks(c))),
        last_candidate(threshold.bytes()),
        lengths(4 * static_cast<std::size_t>(c.batch)) {
    fill_normal(q, c.data_type(), 1);
    fill_normal(k, c.data_type(), 2);
    fill_normal(v, c.data_type(), 3);
    fill_normal(scores, DataType::kFloat32, 4);
  }
  static std::int64_t num_chunks(Configuration const& c) {
    return (c.seq + c.chunk_size - 1) / c.chunk_size;
  }

  DeviceMemory q, k, v, out, lse, scores, expiry, threshold, last_candidate, lengths;

 private:
  static std::size_t element_bytes(Configuration const& c, std::int64_t rows_per_batch) {
    return sparsek::size_of(c.data_type()) *
           static_cast<std::size_t>(c.batch * rows_per_batch * c.dim);
  }
};

// The forward of a configuration: views of device memory, and the calls.
struct Forward {
  Forward(Configuration const& c, cudaStream_t stream)
      : q_shape{c.batch, c.heads, c.num_queries(), c.dim},
        k_shape{c.batch, c.num_kv_heads(), c.seq, c.dim},
        score_shape{c.batch, c.num_kv_heads(), c.seq},
        options(c.attend()),
        data(c) {
    context.device = {sparsek::DeviceType::kCuda, 0};
    context.backend = c.backend_kind();
    context.stream = stream;
    host_lengths = c.row_lengths();
    if (!host_lengths.empty()) {
      data.lengths.upload(host_lengths.data(), data.lengths.bytes());
      lengths = {data.lengths.data(), DataType::kInt32, {c.batch}};
    }
    std::array<std::int64_t, 3> const chunk_shape{c.batch, c.num_kv_heads(),
                                                  Tensors::num_chunks(c)};
    q = {data.q.data(), c.data_type(), q_shape};
    k = {data.k.data(), c.data_type(), k_shape};
    v = {data.v.data(), c.data_type(), k_shape};
    scores = {data.scores.data(), DataType::kFloat32, score_shape};
    out = {data.out.data(), c.data_type(), q_shape};
    lse = {data.lse.data(), DataType::kFloat32, {c.batch, c.heads, c.num_queries()}};
    selection.expiry = {data.expiry.data(), DataType::kInt32, score_shape};
    selection.threshold = {data.threshold.data(), DataType::kFloat32, chunk_shape};
    selection.last_candidate =
        sparsek::TensorView<3>(data.last_candidate.data(), DataType::kInt32, chunk_shape);
  }

  std::size_t workspace_bytes() const {
    return sparsek::select_workspace_bytes(context, score_shape[0], score_shape[1], score_shape[2],
                                           options.selection) +
           sparsek::attend_workspace_bytes(context, q.dtype, q_shape, k_shape, options) +
           2 * sparsek::kWorkspaceAlignment;
  }
  void select() const { sparsek::select(context, scores, lengths, options.selection, selection); }
  void attend() const {
    sparsek::attend(context, q, k, v, scores, selection, lengths, options, out, lse);
  }
  // Visible (query, key) pairs of the selection that select wrote.
  double visible(Configuration const& c) const {
    std::vector<std::int32_t> expiry(data.expiry.bytes() / 4);
    check(cudaStreamSynchronize(static_cast<cudaStream_t>(context.stream)), "select");
    check(
        cudaMemcpy(expiry.data(), data.expiry.data(), data.expiry.bytes(), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
    return count_visible(c, expiry, host_lengths);
  }

  sparsek::Context context;
  std::array<std::int64_t, 4> q_shape, k_shape;
  std::array<std::int64_t, 3> score_shape;
  sparsek::AttendOptions options;
  Tensors data;
  std::vector<std::int32_t> host_lengths;
  sparsek::ConstTensorView<4> q, k, v;
  sparsek::ConstTensorView<3> scores;
  std::optional<sparsek::ConstTensorView<1>> lengths;
  sparsek::TensorView<4> out;
  sparsek::TensorView<3> lse;
  sparsek::SelectionView selection;
};

// Whether a kernel serves the configuration; its name and the reason are added to the line.
template <typename Query>
bool describe_kernel(Configuration const& c, Query const& capability_of, JsonLine& line) {
  sparsek::Context context;
  context.device = {sparsek::DeviceType::kCuda, 0};
  context.backend = c.backend_kind();
  std::array<std::int64_t, 4> const q_shape{c.batch, c.heads, c.num_queries(), c.dim};
  std::array<std::int64_t, 4> const k_shape{c.batch, c.num_kv_heads(), c.seq, c.dim};
  auto const capability = capability_of(context, c.data_type(), q_shape, k_shape, c.attend());
  line.add("kernel", capability.kernel);
  line.add("reason", capability.reason);
  return capability.supported;
}

struct Stage {
  std::string name;
  double flop;  // 0: not worth a figure
  std::function<void()> call;
};

// Both protocols for every stage that the configuration asks for.
inline void time_stages(std::vector<Stage> const& stages, Configuration const& c,
                        cudaStream_t stream, JsonLine& line) {
  auto const batch_heads = static_cast<double>(c.batch * c.heads);
  for (Stage const& stage : stages) {
    if (!c.has_stage(stage.name)) continue;
    Timing const timing = time_stage(stage.call, c, stream);
    for (auto const& [protocol, us] :
         {std::pair{"first", timing.first_us}, std::pair{"sustained", timing.sustained_us}}) {
      std::string const prefix = stage.name + "_" + protocol;
      line.add(prefix + "_us", us);
      line.add(prefix + "_us_per_bh", us / batch_heads);
      if (stage.flop > 0) line.add(prefix + "_tflops", stage.flop / us * 1e-6);
    }
  }
}

// The whole program: run(configuration, name of the GPU, stream) for each configuration.
template <typename Run>
int bench_main(char const* program, int argc, char** argv, Run const& run) {
  try {
    Configuration base;
    std::vector<std::string> texts;
    parse(std::vector<std::string>(argv + 1, argv + argc), base, &texts);
    if (texts.empty()) texts.emplace_back();
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    int failed = 0;
    for (std::string const& text : texts) {
      Configuration c = base;
      try {
        parse(words_of(text), c, nullptr);
        run(c, std::string(properties.name), stream);
      } catch (std::exception const& e) {
        std::fprintf(stderr, "%s: \"%s\": %s\n", program, text.c_str(), e.what());
        ++failed;
      }
    }
    return failed ? 1 : 0;
  } catch (std::exception const& e) {
    std::fprintf(stderr, "%s: %s\n", program, e.what());
    return 2;
  }
}

}  // namespace sparsek_bench
