// Times decode steps on CUDA without Python in between: launches one after another, and replays of
// a CUDA graph.
//
//   sparsek_cuda_decode_bench [flags] [--config "flags"]...
//
//   --batch N --heads N --kv-heads N --dim N       shapes; kv-heads: heads
//   --k N --w N --c N --m N                        selection; m: 4 k
//   --tokens N     seen before the first step      --new N      tokens of a step (1)
//   --gate softmax|value|none   --dtype float16|bfloat16
//   --scores normal|ascending    ascending: every key that leaves the window is selected
//   --chunks N     whole chunks that are timed
//   --prefill      also times appending all tokens at once to empty sequences
//
// Every --config is a configuration of its own, on top of the flags outside. One JSON object per
// line and configuration goes to stdout. Times are microseconds. A step reads the rows in use once;
// their number grows from k + w + 1 to k + w + C within a chunk, and a chunk begins with an
// eviction:
//   border_us, full_us     the step that enters a chunk and the one with all rows in use: medians
//                          over the chunks, from events around every step
//   mean_us                of whole chunks without events in between: all steps over their number
//   graph_mean_us          the same, every step the replay of one graph
// "bytes" are those of k and v in use on average over a chunk, "full_bytes" with all rows in use;
// the rates are bytes over mean_us and graph_mean_us, and full_bytes over full_us.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparsek/sparsek.hpp"

namespace {

using sparsek::DataType;

void check(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// --- configuration

struct Configuration {
  std::int64_t batch = 16, heads = 96, kv_heads = 0, dim = 128;
  std::int64_t num_selected = 256, window = 128, chunk_size = 128, num_candidates = -1;
  std::int64_t tokens = 16384, new_tokens = 1, chunks = 10;
  std::string gate = "softmax", dtype = "float16", scores = "normal";
  bool prefill = false;

  std::int64_t num_kv_heads() const { return kv_heads ? kv_heads : heads; }
  DataType data_type() const {
    return lookup<DataType>("--dtype", dtype,
                            {{"float16", DataType::kFloat16}, {"bfloat16", DataType::kBFloat16}});
  }
  sparsek::DecodeOptions options() const {
    sparsek::DecodeOptions options;
    options.gate = lookup<sparsek::Gate>("--gate", gate,
                                         {{"softmax", sparsek::Gate::kSoftmax},
                                          {"value", sparsek::Gate::kValue},
                                          {"none", sparsek::Gate::kNone}});
    options.selection = {.num_selected = num_selected, .window = window, .chunk_size = chunk_size};
    if (num_candidates >= 0) options.selection.num_candidates = num_candidates;
    return options;
  }
  std::int64_t steps_per_chunk() const {
    return std::max<std::int64_t>(1, chunk_size / new_tokens);
  }

 private:
  template <typename T>
  static T lookup(char const* flag, std::string const& name,
                  std::map<std::string, T> const& table) {
    auto const found = table.find(name);
    if (found != table.end()) return found->second;
    throw std::invalid_argument(std::string(flag) + ": unknown value " + name);
  }
};

std::vector<std::string> words_of(std::string const& line) {
  std::istringstream stream(line);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

// Reads flags into `c`; configurations of their own are collected as text.
void parse(std::vector<std::string> const& words, Configuration& c,
           std::vector<std::string>* configurations) {
  std::map<std::string, std::int64_t*> const integers{
      {"--batch", &c.batch},    {"--heads", &c.heads},      {"--kv-heads", &c.kv_heads},
      {"--dim", &c.dim},        {"--k", &c.num_selected},   {"--w", &c.window},
      {"--c", &c.chunk_size},   {"--m", &c.num_candidates}, {"--tokens", &c.tokens},
      {"--new", &c.new_tokens}, {"--chunks", &c.chunks}};
  std::map<std::string, std::string*> const texts{
      {"--gate", &c.gate}, {"--dtype", &c.dtype}, {"--scores", &c.scores}};
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::string const& flag = words[i];
    if (flag == "--prefill") {
      c.prefill = true;
      continue;
    }
    if (++i == words.size()) throw std::invalid_argument(flag + " needs a value");
    std::string const& value = words[i];
    if (auto const found = integers.find(flag); found != integers.end()) {
      *found->second = std::stoll(value);
    } else if (auto const found = texts.find(flag); found != texts.end()) {
      *found->second = value;
    } else if (flag == "--config" && configurations) {
      configurations->push_back(value);
    } else {
      throw std::invalid_argument("unknown flag " + flag);
    }
  }
}

// --- data

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
    check(cudaMemset(data_, 0, std::max<std::size_t>(bytes, 1)), "cudaMemset");
  }
  DeviceMemory(DeviceMemory const&) = delete;
  DeviceMemory& operator=(DeviceMemory const&) = delete;
  ~DeviceMemory() { cudaFree(data_); }

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

  // Copies of a block fill the memory. The block's odd length puts every row at another place of
  // it.
  void tile(void const* block, std::size_t block_bytes) const {
    std::size_t const first = std::min(block_bytes, bytes_);
    check(cudaMemcpy(data_, block, first, cudaMemcpyHostToDevice), "cudaMemcpy");
    auto* const base = static_cast<std::byte*>(data_);
    for (std::size_t filled = first; filled < bytes_; filled *= 2) {
      check(cudaMemcpy(base + filled, base, std::min(filled, bytes_ - filled),
                       cudaMemcpyDeviceToDevice),
            "cudaMemcpy");
    }
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

constexpr std::size_t kBlockElements = (std::size_t{1} << 20) + 1049;

// Numbers from a standard normal distribution, cut to 16 bits.
std::vector<std::uint16_t> normal_block(DataType dtype) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> block(kBlockElements);
  for (std::uint16_t& x : block) {
    float const value = normal(random);
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (dtype == DataType::kBFloat16) {
      x = static_cast<std::uint16_t>(bits >> 16);
    } else {  // |value| is within float16's range; numbers below 2^-14 become zero
      std::uint32_t const exponent = bits >> 23 & 0xFF;
      std::uint32_t const magnitude =
          exponent < 113 ? 0 : (exponent - 112) << 10 | (bits >> 13 & 0x3FF);
      x = static_cast<std::uint16_t>(bits >> 16 & 0x8000) | static_cast<std::uint16_t>(magnitude);
    }
  }
  return block;
}

// --- one configuration

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  auto const middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

// Sequences that have seen c.tokens tokens, and inputs of steps. Prompts are appended in pieces, so
// that they need not lie in memory as a whole.
class Generation {
 public:
  static constexpr std::int64_t kPiece = 512;  // tokens

  Generation(Configuration const& c, cudaStream_t stream)
      : c_(c),
        options_(c.options()),
        layout_(sparsek::decode_state_layout(c.data_type(), c.num_kv_heads(), c.dim,
                                             options_.selection)),
        piece_(c.prefill ? std::max(kPiece, c.tokens) : kPiece),
        pool_(static_cast<std::size_t>(c.batch * layout_.block_bytes)),
        blocks_(static_cast<std::size_t>(4 * c.batch)),
        q_(static_cast<std::size_t>(2 * c.batch * c.heads * c.new_tokens * c.dim)),
        out_(q_.bytes()),
        k_(static_cast<std::size_t>(2 * c.batch * c.num_kv_heads() * piece_ * c.dim)),
        v_(k_.bytes()),
        scores_(static_cast<std::size_t>(4 * c.batch * c.num_kv_heads() * piece_)) {
    context_.device = {sparsek::DeviceType::kCuda, 0};
    context_.stream = stream;
    workspace_ = std::make_unique<DeviceMemory>(sparsek::decode_workspace_bytes(
        context_, c.data_type(), c.batch, c.num_kv_heads(), c.dim, options_.selection));
    auto const block = normal_block(c.data_type());
    for (DeviceMemory const* t : {&q_, &k_, &v_}) t->tile(block.data(), 2 * block.size());
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    std::vector<float> scores(kBlockElements);
    for (float& u : scores) u = normal(random);
    scores_.tile(scores.data(), 4 * scores.size());
    std::vector<std::int32_t> index;
    for (std::int64_t b = 0; b < c.batch; ++b) index.push_back(static_cast<std::int32_t>(b));
    check(cudaMemcpy(blocks_.data(), index.data(), blocks_.bytes(), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }

  void prefill() {
    check(cudaMemset(pool_.data(), 0, pool_.bytes()), "cudaMemset");
    for (std::int64_t done = 0; done < c_.tokens; done += piece_) {
      std::int64_t const count = std::min(piece_, c_.tokens - done);
      if (c_.scores == "ascending") rise(static_cast<float>(done));
      append(count);
    }
    check(cudaStreamSynchronize(stream()), "prefill");
  }
  void empty() { check(cudaMemset(pool_.data(), 0, pool_.bytes()), "cudaMemset"); }
  void append(std::int64_t count) {
    sparsek::BufferAllocator allocator(workspace_->data(), workspace_->bytes());
    sparsek::Context context = context_;
    context.allocator = &allocator;
    sparsek::decode_append(context, tokens(k_, count), tokens(v_, count), scores(count),
                           std::nullopt, options_.selection, state());
  }
  void step() {
    sparsek::BufferAllocator allocator(workspace_->data(), workspace_->bytes());
    sparsek::Context context = context_;
    context.allocator = &allocator;
    std::array<std::int64_t, 4> const shape{c_.batch, c_.heads, c_.new_tokens, c_.dim};
    sparsek::decode(context, {q_.data(), c_.data_type(), shape}, tokens(k_, c_.new_tokens),
                    tokens(v_, c_.new_tokens), scores(c_.new_tokens), std::nullopt, options_,
                    state(), {out_.data(), c_.data_type(), shape}, std::nullopt);
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(context_.stream); }
  std::int64_t state_bytes() const { return c_.batch * layout_.block_bytes; }

 private:
  sparsek::ConstTensorView<4> tokens(DeviceMemory const& t, std::int64_t count) const {
    return {t.data(),
            c_.data_type(),
            {c_.batch, c_.num_kv_heads(), count, c_.dim},
            {c_.num_kv_heads() * piece_ * c_.dim, piece_ * c_.dim, c_.dim, 1}};
  }
  sparsek::ConstTensorView<3> scores(std::int64_t count) const {
    return {scores_.data(),
            DataType::kFloat32,
            {c_.batch, c_.num_kv_heads(), count},
            {c_.num_kv_heads() * piece_, piece_, 1}};
  }
  sparsek::DecodeStateView state() const {
    return {pool_.data(),
            c_.batch,
            layout_.block_bytes,
            {blocks_.data(), DataType::kInt32, {c_.batch}}};
  }
  void rise(float first) {
    std::vector<float> row(static_cast<std::size_t>(c_.batch * c_.num_kv_heads() * piece_));
    for (std::size_t i = 0; i < row.size(); ++i) {
      row[i] = 1e-3F * (first + static_cast<float>(i % static_cast<std::size_t>(piece_)));
    }
    scores_.tile(row.data(), 4 * row.size());
  }

  Configuration const& c_;
  sparsek::DecodeOptions options_;
  sparsek::DecodeStateLayout layout_;
  std::int64_t piece_;
  DeviceMemory pool_, blocks_, q_, out_, k_, v_, scores_;
  std::unique_ptr<DeviceMemory> workspace_;
  sparsek::Context context_;
};

struct Event {
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  Event(Event const&) = delete;
  ~Event() { cudaEventDestroy(event); }
  void record(cudaStream_t stream) const { check(cudaEventRecord(event, stream), "record"); }
  double us_since(Event const& start) const {
    float ms = 0.0F;
    check(cudaEventElapsedTime(&ms, start.event, event), "cudaEventElapsedTime");
    return 1e3 * static_cast<double>(ms);
  }
  cudaEvent_t event = nullptr;
};

// Microseconds of every step of whole chunks, [chunk][step].
std::vector<std::vector<double>> step_times(Configuration const& c, cudaStream_t stream,
                                            std::function<void()> const& step) {
  std::vector<std::vector<double>> times(c.chunks);
  std::vector<Event> events(c.steps_per_chunk() + 1);
  for (auto& chunk : times) {
    events[0].record(stream);
    for (std::size_t i = 1; i < events.size(); ++i) {
      step();
      events[i].record(stream);
    }
    check(cudaStreamSynchronize(stream), "step");
    for (std::size_t i = 1; i < events.size(); ++i)
      chunk.push_back(events[i].us_since(events[i - 1]));
  }
  return times;
}

// Microseconds per step: the median over chunks of their mean.
double mean_time(Configuration const& c, cudaStream_t stream, std::function<void()> const& step) {
  std::vector<double> means;
  Event begin, end;
  for (std::int64_t chunk = 0; chunk < c.chunks; ++chunk) {
    begin.record(stream);
    for (std::int64_t i = 0; i < c.steps_per_chunk(); ++i) step();
    end.record(stream);
    check(cudaStreamSynchronize(stream), "steps");
    means.push_back(end.us_since(begin) / static_cast<double>(c.steps_per_chunk()));
  }
  return median(means);
}

class JsonLine {
 public:
  void add(std::string const& name, std::string const& text) { add_raw(name, "\"" + text + "\""); }
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
    text_ += (text_.empty() ? "" : ", ") + ("\"" + name + "\": ") + value;
  }
  std::string text_;
};

void run(Configuration const& c, std::string const& gpu, cudaStream_t stream) {
  // The first timed step has to enter a chunk.
  if (c.tokens % c.chunk_size || c.chunk_size % c.new_tokens) {
    throw std::invalid_argument("--tokens has to be a multiple of --c, and --c one of --new");
  }
  JsonLine line;
  line.add("gpu", gpu);
  line.add("batch", c.batch);
  line.add("heads", c.heads);
  line.add("kv_heads", c.num_kv_heads());
  line.add("head_dim", c.dim);
  line.add("num_selected", c.num_selected);
  line.add("window", c.window);
  line.add("chunk_size", c.chunk_size);
  line.add("num_candidates", c.num_candidates >= 0 ? c.num_candidates : 4 * c.num_selected);
  line.add("tokens", c.tokens);
  line.add("new_tokens", c.new_tokens);
  line.add("gate", c.gate);
  line.add("dtype", c.dtype);
  line.add("scores", c.scores);

  Generation generation(c, stream);
  line.add("state_bytes", generation.state_bytes());
  if (c.prefill) {
    std::vector<double> times;
    Event begin, end;
    for (int i = 0; i < 5; ++i) {
      generation.empty();
      begin.record(stream);
      generation.append(c.tokens);
      end.record(stream);
      check(cudaStreamSynchronize(stream), "prefill");
      times.push_back(end.us_since(begin));
    }
    line.add("prefill_us", median(times));
  }
  generation.prefill();
  auto const step = [&] { generation.step(); };
  for (std::int64_t i = 0; i < c.steps_per_chunk(); ++i) step();
  check(cudaStreamSynchronize(stream), "warm-up");

  auto const times = step_times(c, stream, step);
  std::vector<double> border, full;
  for (auto const& chunk : times) border.push_back(chunk.front()), full.push_back(chunk.back());
  double const mean_us = mean_time(c, stream, step);

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  step();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  double const graph_us =
      mean_time(c, stream, [&] { check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch"); });
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);

  double const row_bytes = static_cast<double>(c.batch * c.num_kv_heads() * c.dim * 2 * 2);
  double const full_rows = static_cast<double>(c.num_selected + c.window + c.chunk_size);
  double const mean_rows = static_cast<double>(c.num_selected + c.window) +
                           0.5 * static_cast<double>(c.chunk_size + c.new_tokens);
  line.add("border_us", median(border));
  line.add("full_us", median(full));
  line.add("mean_us", mean_us);
  line.add("graph_mean_us", graph_us);
  line.add("bytes", row_bytes * mean_rows);
  line.add("full_bytes", row_bytes * full_rows);
  line.add("full_tb_per_s", 1e-6 * row_bytes * full_rows / median(full));
  line.add("mean_tb_per_s", 1e-6 * row_bytes * mean_rows / mean_us);
  line.add("graph_mean_tb_per_s", 1e-6 * row_bytes * mean_rows / graph_us);
  line.print();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Configuration base;
    std::vector<std::string> configurations;
    parse({argv + 1, argv + argc}, base, &configurations);
    if (configurations.empty()) configurations.emplace_back();
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      std::fprintf(stderr, "no CUDA device\n");
      return 77;
    }
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    int failed = 0;
    for (std::string const& text : configurations) {
      Configuration c = base;
      try {
        parse(words_of(text), c, nullptr);
        run(c, properties.name, stream);
      } catch (std::exception const& e) {
        std::printf("{\"configuration\": \"%s\", \"error\": \"%s\"}\n", text.c_str(), e.what());
        std::fflush(stdout);
        ++failed;
      }
    }
    return failed ? 1 : 0;
  } catch (std::exception const& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
}
