// decode on CUDA against the CPU backend: the same calls, in pieces of every kind, on two pools of
// state blocks.
//
//   sparsek_cuda_decode_check [--filter TEXT] [--quick] [--verbose]
//
// Compared are outputs and lse after every call, and at chunk borders and at the end of a case the
// state: counters, selected positions, rows and scores exactly, thresholds to the last bit. A
// second run of each case has to give the same bits. --quick keeps the short cases (for
// compute-sanitizer).
//
// Exit status: 0 all passed, 1 something failed, 2 wrong usage, 3 the GPU was lost, 77 no GPU
// (ctest: skipped).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_decode_data.hpp"

namespace sparsek::testing {
namespace {

// --- a case --------------------------------------------------------------------------------------

class Run {
 public:
  Run(DecodeCase const& c, cudaStream_t stream)
      : c_(c),
        stream_(stream),
        sequences_(c),
        layout_(decode_state_layout(c.dtype, c.kv_heads, c.dim, c.select)),
        stride_block_(layout_.block_bytes + kDecodeStateAlignment),
        num_blocks_(c.batch + kSpareBlocks),
        expected_(pool_bytes()),
        pool_(pool_bytes(), kPoisonInput, kGuardBytes),
        q_(c.dtype, elements(c.kv_heads * c.group, c.dim)),
        k_(c.dtype, elements(c.kv_heads, c.dim)),
        v_(c.dtype, elements(c.kv_heads, c.dim)),
        out_(c.dtype, elements(c.kv_heads * c.group, c.dim)),
        scores_(DataType::kFloat32, elements(c.kv_heads, 1)),
        lse_(DataType::kFloat32, elements(c.kv_heads * c.group, 1)),
        block_index_(c.batch),
        continues_(c.batch),
        lengths_(c.batch),
        cu_seqlens_(c.batch + 1),
        workspace_(decode_workspace_bytes(gpu(), c.dtype, c.batch, c.kv_heads, c.dim, c.select),
                   kPoisonOutput, kGuardBytes) {
    for (std::int64_t b = 0; b < c.batch; ++b) {
      blocks_.push_back(static_cast<std::int32_t>(num_blocks_ - 1 - b));
    }
    block_index_.set(blocks_);
  }

  // Twice, the second time without comparisons: the same bits.
  void run() {
    feed(true);
    if (!pool_.guards_intact() || !workspace_.guards_intact()) differ("wrote outside the state");
    std::vector<std::byte> first(pool_bytes()), second(pool_bytes());
    pool_.download(first.data());
    auto const outputs = digest_;
    pool_.fill(kPoisonInput);
    feed(false);
    pool_.download(second.data());
    if (first != second) differ("a second run left another state");
    if (outputs != digest_) differ("a second run gave other outputs");
  }
  int last_bits() const { return last_bits_; }
  double worst() const { return worst_; }
  std::int64_t calls() const { return calls_; }

 private:
  std::size_t elements(std::int64_t heads, std::int64_t dim) const {
    return static_cast<std::size_t>(c_.batch * heads * c_.seq_len * (dim + 3) + 8);
  }
  std::size_t pool_bytes() const { return static_cast<std::size_t>(num_blocks_ * stride_block_); }
  Context gpu() const {
    Context context;
    context.device = {DeviceType::kCuda, 0};
    context.stream = stream_;
    return context;
  }

  void feed(bool compare) {
    compare_ = compare;
    digest_ = 0;
    std::mt19937 random(static_cast<unsigned>(c_.seq_len * 13 + c_.dim));
    std::vector<std::int64_t> done(c_.batch, 0);
    graph_.reset();
    for (calls_ = 0;; ++calls_) {
      std::int64_t least = c_.seq_len;
      for (std::int64_t const n : done) least = std::min(least, n);
      if (least == c_.seq_len) break;
      // How many tokens each sequence takes.
      std::vector<std::int64_t> count(c_.batch);
      bool const prompt = calls_ == 0;
      for (std::int64_t b = 0; b < c_.batch; ++b) {
        std::int64_t n = 1;
        if (prompt) {
          n = c_.pieces == "steps" ? 0 : c_.seq_len / 3 + static_cast<std::int64_t>(random() % 40);
          if (b % 3 == 1) n = n / 2;
        } else if (c_.pieces == "mixed") {
          auto const kind = random() % 8;
          n = kind == 0   ? 0
              : kind == 1 ? 2 + random() % 9
              : kind == 2 ? c_.select.chunk_size + 3
                          : 1;
        }
        count[b] = std::min(n, c_.seq_len - done[b]);
      }
      bool const appends =
          prompt ? c_.pieces != "mixed" : c_.pieces == "mixed" && random() % 5 == 0;
      bool const packed = c_.pieces == "mixed" && random() % 3 == 0;
      auto const layout = static_cast<Layout>(c_.graph ? 0 : calls_ % 3);
      call(done, count, !appends, packed && !c_.graph, layout);
    }
    if (compare_) compare_states(done);
  }

  void call(std::vector<std::int64_t>& done, std::vector<std::int64_t> const& count, bool attends,
            bool packed, Layout layout) {
    std::int64_t longest = 0, total = 0;
    for (std::int64_t const n : count) longest = std::max(longest, n), total += n;
    bool const ragged = !packed && total != longest * c_.batch;
    bool const first = calls_ == 0;
    // In a ragged call there is room beyond every length.
    std::int64_t const tokens = packed ? total : longest + (ragged ? 1 : 0);
    bool const replay = c_.graph && !first && !ragged && tokens == 1 && attends;
    std::int64_t const rows = packed ? 1 : c_.batch;
    q_.lay_out(layout, {rows, c_.kv_heads * c_.group, tokens, c_.dim});
    out_.lay_out(layout, {rows, c_.kv_heads * c_.group, tokens, c_.dim});
    k_.lay_out(layout, {rows, c_.kv_heads, tokens, c_.dim});
    v_.lay_out(layout, {rows, c_.kv_heads, tokens, c_.dim});
    scores_.lay_out(packed ? Layout::kTokensFirst : layout, {rows, c_.kv_heads, tokens, 1});
    lse_.lay_out(packed ? Layout::kTokensFirst : Layout::kHeadsFirst,
                 {rows, c_.kv_heads * c_.group, tokens, 1});
    std::vector<std::int32_t> lengths, starts{0}, continues;
    for (std::int64_t b = 0; b < c_.batch; ++b) {
      fill(b, packed ? 0 : b, packed ? starts.back() : 0, done[b], count[b]);
      lengths.push_back(static_cast<std::int32_t>(count[b]));
      starts.push_back(starts.back() + static_cast<std::int32_t>(count[b]));
      continues.push_back(first ? 0 : 1);
    }
    if (!replay) lengths_.set(lengths), cu_seqlens_.set(starts), continues_.set(continues);
    for (CallTensor* t : {&q_, &k_, &v_, &scores_}) t->upload();
    out_.poison_device(), lse_.poison_device();

    if (replay) {
      if (!graph_) capture();
      cuda_check(cudaGraphLaunch(graph_->executable, stream_), "cudaGraphLaunch");
    } else {
      BufferAllocator allocator(workspace_.data(), workspace_.bytes());
      Context context = gpu();
      context.allocator = &allocator;
      decode_on(context, true, attends, packed, ragged, first);
    }
    cuda_check(cudaStreamSynchronize(stream_), "decode");
    for (std::int64_t b = 0; b < c_.batch; ++b) done[b] += count[b];
    if (attends) {
      std::vector<std::byte> out, lse;
      out_.download(out), lse_.download(lse);
      digest(out), digest(lse);
    }
    if (!compare_) return;
    for (CallTensor* t : {&q_, &k_, &v_, &scores_, &out_, &lse_}) {
      if (!t->guards_intact())
        differ("wrote outside a tensor in call %d", static_cast<int>(calls_));
    }
    std::vector<std::byte> out, lse;
    out_.download(out), lse_.download(lse);
    decode_on(Context{.num_threads = 1}, false, attends, packed, ragged, first);
    if (attends) compare_outputs(out, lse, count, packed);
    bool enters = false;
    for (std::int64_t b = 0; b < c_.batch; ++b) {
      std::int64_t const size = c_.select.chunk_size;
      enters |= count[b] > 0 && (done[b] - 1) / size != (done[b] - 1 - count[b]) / size;
    }
    if (c_.compare_every ? calls_ % c_.compare_every == 0 : enters) compare_states(done);
  }

  void fill(std::int64_t b, std::int64_t row, std::int64_t at, std::int64_t begin,
            std::int64_t count) {
    std::size_t const bytes = static_cast<std::size_t>(c_.dim) * 2;
    for (std::int64_t h = 0; h < c_.kv_heads * c_.group; ++h) {
      for (std::int64_t t = 0; t < count; ++t) {
        std::int64_t const from = (b * c_.kv_heads * c_.group + h) * c_.seq_len + begin + t;
        std::memcpy(q_.row(row, h, at + t), &sequences_.q[from * c_.dim], bytes);
      }
    }
    for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
      for (std::int64_t t = 0; t < count; ++t) {
        std::int64_t const from = (b * c_.kv_heads + h) * c_.seq_len + begin + t;
        std::memcpy(k_.row(row, h, at + t), &sequences_.k[from * c_.dim], bytes);
        std::memcpy(v_.row(row, h, at + t), &sequences_.v[from * c_.dim], bytes);
        std::memcpy(scores_.row(row, h, at + t), &sequences_.scores[from], sizeof(float));
      }
    }
  }

  // The call as it was laid out, on the device or on the host.
  void decode_on(Context const& context, bool device, bool attends, bool packed, bool ragged,
                 bool first) {
    DecodeOptions const options{c_.select, c_.gate, std::nullopt};
    DecodeStateView state{device ? pool_.data() : expected_.data, num_blocks_, stride_block_,
                          block_index_.view(device)};
    if (first) state.continues = continues_.view(device);
    std::optional<ConstTensorView<1>> lengths;
    if (ragged) lengths = lengths_.view(device);
    using In4 = ConstTensorView<4>;
    using In3 = ConstTensorView<3>;
    if (packed) {
      auto const k = k_.view<In3>(device), v = v_.view<In3>(device);
      auto const scores = scores_.scalar_view<ConstTensorView<2>>(device);
      auto const cu = cu_seqlens_.view(device);
      if (attends) {
        decode_varlen(context, q_.view<In3>(device), k, v, scores, cu, options, state,
                      out_.view<TensorView<3>>(device), lse_.scalar_view<TensorView<2>>(device));
      } else {
        decode_append_varlen(context, k, v, scores, cu, c_.select, state);
      }
    } else {
      auto const k = k_.view<In4>(device), v = v_.view<In4>(device);
      auto const scores = scores_.scalar_view<In3>(device);
      if (attends) {
        decode(context, q_.view<In4>(device), k, v, scores, lengths, options, state,
               out_.view<TensorView<4>>(device), lse_.scalar_view<TensorView<3>>(device));
      } else {
        decode_append(context, k, v, scores, lengths, c_.select, state);
      }
    }
  }

  // One step of the whole batch, its tokens at addresses that stay.
  void capture() {
    graph_ = std::make_unique<Graph>();
    BufferAllocator allocator(workspace_.data(), workspace_.bytes());
    Context context = gpu();
    context.allocator = &allocator;
    cuda_check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    decode_on(context, true, true, false, false, false);
    cuda_check(cudaStreamEndCapture(stream_, &graph_->graph), "capture");
    cuda_check(cudaGraphInstantiate(&graph_->executable, graph_->graph, 0), "instantiate");
  }

  void compare_outputs(std::vector<std::byte> const& out, std::vector<std::byte> const& lse,
                       std::vector<std::int64_t> const& count, bool packed) {
    std::int64_t at = 0;
    for (std::int64_t b = 0; b < c_.batch; ++b) {
      std::int64_t const row = packed ? 0 : b, begin = packed ? at : 0;
      at += count[b];
      for (std::int64_t h = 0; h < c_.kv_heads * c_.group; ++h) {
        for (std::int64_t t = 0; t < count[b]; ++t) {
          std::int64_t const i = out_.index(row, h, begin + t);
          for (std::int64_t d = 0; d < c_.dim; ++d) {
            double const expected = load_element(out_.host(), c_.dtype, i + d);
            double const got = load_element(out.data(), c_.dtype, i + d);
            // Both sides round.
            double const allowed = 2.0 * output_tolerance(c_.dtype, expected);
            double const error = std::fabs(got - expected);
            worst_ = std::max(worst_, error / allowed);
            if (!(error <= allowed)) {
              differ("call %d: out[sequence %d, head %d, token %d, %d]: expected %.6g, got %.6g",
                     static_cast<int>(calls_), static_cast<int>(b), static_cast<int>(h),
                     static_cast<int>(t), static_cast<int>(d), expected, got);
            }
          }
          std::int64_t const j = lse_.index(row, h, begin + t);
          double const expected = load_element(lse_.host(), DataType::kFloat32, j);
          double const got = load_element(lse.data(), DataType::kFloat32, j);
          if (!(std::fabs(got - expected) <= 3e-5 * (1.0 + std::fabs(expected)))) {
            differ("call %d: lse[sequence %d, head %d, token %d]: expected %.8g, got %.8g",
                   static_cast<int>(calls_), static_cast<int>(b), static_cast<int>(h),
                   static_cast<int>(t), expected, got);
          }
        }
      }
    }
    // Rows of tokens that do not exist: out 0, lse -inf, on both sides alike.
    for (std::int64_t b = 0; !packed && b < c_.batch; ++b) {
      auto const view = lse_.scalar_view<TensorView<3>>(false);
      for (std::int64_t h = 0; h < view.shape[1]; ++h) {
        for (std::int64_t t = count[b]; t < view.shape[2]; ++t) {
          double const got = load_element(lse.data(), DataType::kFloat32, lse_.index(b, h, t));
          double const first = load_element(out.data(), c_.dtype, out_.index(b, h, t));
          double const last = load_element(out.data(), c_.dtype, out_.index(b, h, t) + c_.dim - 1);
          if (!(std::isinf(got) && got < 0.0 && first == 0.0 && last == 0.0)) {
            differ("call %d: a token that does not exist has output", static_cast<int>(calls_));
          }
        }
      }
    }
  }

  void compare_states(std::vector<std::int64_t> const& done) {
    std::vector<std::byte> ours(pool_bytes());
    pool_.download(ours.data());
    for (std::int64_t b = 0; b < c_.batch; ++b) {
      for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
        std::int64_t const at = blocks_[b] * stride_block_ + h * layout_.head_bytes;
        try {
          compare_head(layout_, HeadView(layout_, ours.data() + at),
                       HeadView(layout_, expected_.data + at), last_bits_);
        } catch (Difference const& e) {
          differ("after call %d, sequence %d (%d tokens), head %d: %s", static_cast<int>(calls_),
                 static_cast<int>(b), static_cast<int>(done[b]), static_cast<int>(h), e.what());
        }
      }
    }
    for (std::int64_t block = 0; block < kSpareBlocks; ++block) {
      std::byte const* const at = ours.data() + block * stride_block_;
      if (std::any_of(at, at + stride_block_, [](std::byte x) { return x != std::byte{0xFF}; })) {
        differ("wrote to block %d, which is nobody's", static_cast<int>(block));
      }
    }
  }

  void digest(std::vector<std::byte> const& bytes) {
    for (std::byte const x : bytes) {
      digest_ = (digest_ ^ static_cast<std::uint64_t>(x)) * 0x100000001B3ULL;
    }
  }

  struct Graph {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ~Graph() {
      if (executable) cudaGraphExecDestroy(executable);
      if (graph) cudaGraphDestroy(graph);
    }
  };

  DecodeCase const& c_;
  cudaStream_t stream_;
  Sequences sequences_;
  DecodeStateLayout layout_;
  std::int64_t stride_block_, num_blocks_;
  HostPool expected_;
  DeviceBuffer pool_;
  CallTensor q_, k_, v_, out_, scores_, lse_;
  CallIndices block_index_, continues_, lengths_, cu_seqlens_;
  DeviceBuffer workspace_;
  std::vector<std::int32_t> blocks_;
  std::unique_ptr<Graph> graph_;
  bool compare_ = true;
  std::uint64_t digest_ = 0;
  std::int64_t calls_ = 0;
  int last_bits_ = 0;
  double worst_ = 0.0;
};

// --- cases ---------------------------------------------------------------------------------------

std::vector<DecodeCase> all_cases() {
  std::vector<DecodeCase> cases;
  Gate const gates[] = {Gate::kSoftmax, Gate::kValue, Gate::kNone};
  std::int64_t const groups[] = {1, 3, 8}, dims[] = {64, 128, 96, 72, 256, 40};
  char const* const kinds[] = {"normal", "ties", "ascending", "equal", "descending", "zeros"};
  int i = 0;
  for (std::int64_t const chunk_size : {1, 16, 128}) {
    for (std::int64_t const k : {0, 1, 64}) {
      for (std::int64_t const w : {0, 1, 100}) {
        for (DataType const dtype : {DataType::kFloat16, DataType::kBFloat16}) {
          DecodeCase c{"mixed_c" + std::to_string(chunk_size) + "_k" + std::to_string(k) + "_w" +
                           std::to_string(w) + "_" + name_of(dtype),
                       3,
                       2,
                       groups[i % 3],
                       300,
                       dims[i % 6],
                       {.num_selected = k, .window = w, .chunk_size = chunk_size},
                       gates[i / 2 % 3],
                       dtype,
                       kinds[i % 6],
                       "mixed"};
          if (i % 4 == 1) c.select.num_candidates = k;
          if (i % 4 == 3) c.select.num_candidates = k + 5;
          cases.push_back(c);
          ++i;
        }
      }
    }
  }
  auto const add = [&](std::string name, std::array<std::int64_t, 5> const& shape,
                       SelectOptions const& select, std::string pieces, std::string scores,
                       bool graph = false, std::int64_t compare_every = 0) {
    cases.push_back({std::move(name), shape[0], shape[1], shape[2], shape[3], shape[4], select,
                     Gate::kSoftmax, DataType::kFloat16, std::move(scores), std::move(pieces),
                     graph, compare_every});
  };
  // Eviction order with ties, every state compared.
  for (char const* const kind : {"ties", "equal", "zeros", "ascending"}) {
    for (std::int64_t const m : {8, 9, 32, 1000}) {
      add("order_" + std::string(kind) + "_m" + std::to_string(m), {1, 2, 1, 120, 64},
          {.num_selected = 8, .window = 5, .chunk_size = m % 2 ? 16 : 1, .num_candidates = m},
          "steps", kind, false, 1);
    }
  }
  add("huge_scores", {2, 2, 1, 600, 64}, {.num_selected = 40, .window = 9, .chunk_size = 16},
      "mixed", "huge");
  // Lists that do not fit in shared memory, for steps and for prompts.
  add("long_lists", {1, 2, 2, 2500, 64}, {.num_selected = 700, .window = 3, .chunk_size = 64},
      "mixed", "normal");
  add("longer_lists", {1, 1, 2, 9000, 64},
      {.num_selected = 2500, .window = 3, .chunk_size = 4096, .num_candidates = 30000}, "mixed",
      "normal");
  add("long_chunk", {2, 1, 2, 1500, 128}, {.num_selected = 64, .window = 300, .chunk_size = 500},
      "mixed", "normal");
  // Many heads: one block to each; few: clusters of all sizes.
  for (std::int64_t const heads : {300, 100, 50, 20}) {
    add("heads_" + std::to_string(heads), {1, heads, 1, 700, 128},
        {.num_selected = 256, .window = 128, .chunk_size = 128}, "prompt+steps", "normal", false,
        50);
  }
  // Long generations.
  add("long_c128", {1, 1, 4, 16384 + 1500, 128},
      {.num_selected = 256, .window = 128, .chunk_size = 128}, "prompt+steps", "normal");
  add("long_c1", {1, 2, 1, 3000, 64}, {.num_selected = 64, .window = 32, .chunk_size = 1},
      "prompt+steps", "normal", false, 97);
  add("long_c16", {2, 1, 2, 4500, 64}, {.num_selected = 96, .window = 50, .chunk_size = 16},
      "prompt+steps", "ties");
  for (std::int64_t const chunk_size : {1, 16, 128}) {
    add("graph_c" + std::to_string(chunk_size), {2, 2, 4, 1300, 128},
        {.num_selected = 100, .window = 40, .chunk_size = chunk_size}, "prompt+steps", "normal",
        true, 40);
  }
  return cases;
}

// Indices, lengths and headers that make no sense must not lead outside the tensors.
void check_wrong_values(cudaStream_t stream) {
  constexpr std::int64_t kBatch = 4, kHeads = 2, kTokens = 3, kDim = 64, kBlocks = 4;
  SelectOptions const select{.num_selected = 20, .window = 6, .chunk_size = 4};
  DecodeStateLayout const layout = decode_state_layout(DataType::kFloat16, kHeads, kDim, select);
  DeviceBuffer pool(kBlocks * layout.block_bytes, 0x5A, kGuardBytes);
  std::size_t const bytes = kBatch * kHeads * kTokens * kDim * 2;
  DeviceBuffer q(bytes, 0x3C, kGuardBytes), k(bytes, 0x3C, kGuardBytes),
      v(bytes, 0x3C, kGuardBytes), out(bytes, kPoisonOutput, kGuardBytes),
      scores(kBatch * kHeads * kTokens * 4, kPoisonInput, kGuardBytes);  // NaN
  std::mt19937 random(3);
  std::vector<std::byte> garbage(pool.bytes());
  CallIndices index(kBatch), lengths(kBatch), cu_seqlens(kBatch + 1);
  Context context;
  context.device = {DeviceType::kCuda, 0};
  context.stream = stream;
  for (int round = 0; round < 40; ++round) {
    for (std::byte& x : garbage) x = static_cast<std::byte>(round % 2 ? random() : 0xFF);
    pool.upload(garbage.data());
    auto const wild = [&] {
      return static_cast<std::int32_t>(random() % 4 ? random() : random() % 4);
    };
    index.set(round % 4 < 2 ? std::vector<std::int32_t>{0, 1, 2, 3}
                            : std::vector<std::int32_t>{wild(), wild(), -1, 2});
    lengths.set({wild(), wild(), wild(), 2});
    cu_seqlens.set({wild(), wild(), wild(), wild(), wild()});
    DecodeStateView const state{pool.data(), kBlocks, layout.block_bytes, index.view(true)};
    std::array<std::int64_t, 4> const shape{kBatch, kHeads, kTokens, kDim};
    std::array<std::int64_t, 3> const packed{kBatch * kTokens, kHeads, kDim};
    auto const dtype = DataType::kFloat16;
    if (round % 8 < 4) {
      decode(context, {q.data(), dtype, shape}, {k.data(), dtype, shape}, {v.data(), dtype, shape},
             {scores.data(), DataType::kFloat32, {kBatch, kHeads, kTokens}}, lengths.view(true),
             {select}, state, {out.data(), dtype, shape}, std::nullopt);
    } else {
      decode_varlen(
          context, {q.data(), dtype, packed}, {k.data(), dtype, packed}, {v.data(), dtype, packed},
          {scores.data(), DataType::kFloat32, {kBatch * kTokens, kHeads}}, cu_seqlens.view(true),
          {select}, state, {out.data(), dtype, packed}, std::nullopt);
    }
    cuda_check(cudaStreamSynchronize(stream), "decode of wrong values");
  }
  for (DeviceBuffer const* b : {&pool, &q, &k, &v, &out, &scores}) {
    if (!b->guards_intact()) differ("wrong values made decode write outside a tensor");
  }
}

int check_main(int argc, char** argv) {
  std::string filter;
  bool quick = false, verbose = false;
  for (int i = 1; i < argc; ++i) {
    std::string const flag = argv[i];
    if (flag == "--filter" && i + 1 < argc) {
      filter = argv[++i];
    } else if (flag == "--quick") {
      quick = true;
    } else if (flag == "--verbose") {
      verbose = true;
    } else {
      std::fprintf(stderr, "unknown flag %s\n", flag.c_str());
      return 2;
    }
  }
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  cudaStream_t stream;
  cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  int passed = 0, failed = 0, last_bits = 0;
  std::int64_t calls = 0;
  double worst = 0.0;
  auto const report = [&](std::string const& name, auto const& body) {
    auto const start = std::chrono::steady_clock::now();
    try {
      body();
      ++passed;
    } catch (CudaFailure const&) {
      std::printf("LOST %s\n", name.c_str());
      throw;
    } catch (std::exception const& e) {
      ++failed;
      std::printf("FAIL %s: %s\n", name.c_str(), e.what());
    }
    std::chrono::duration<double> const seconds = std::chrono::steady_clock::now() - start;
    if (verbose) std::printf("     %-40s %.2f s\n", name.c_str(), seconds.count());
    std::fflush(stdout);
  };
  for (DecodeCase const& c : all_cases()) {
    if (c.name.find(filter) == std::string::npos) continue;
    if (quick && (c.seq_len > 300 || c.kv_heads > 2)) continue;
    report(c.name, [&] {
      Run run(c, stream);
      run.run();
      last_bits += run.last_bits();
      calls += run.calls();
      worst = std::max(worst, run.worst());
    });
  }
  if (filter.empty()) report("wrong_values", [&] { check_wrong_values(stream); });
  std::printf(
      "%d passed, %d failed; %lld calls; worst error %.2f of the tolerance; %d thresholds differ "
      "in "
      "the last bit\n",
      passed, failed, static_cast<long long>(calls), worst, last_bits);
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace sparsek::testing

int main(int argc, char** argv) {
  try {
    return sparsek::testing::check_main(argc, argv);
  } catch (std::exception const& e) {
    std::printf("GPU lost: %s\n", e.what());
    return 3;
  }
}
