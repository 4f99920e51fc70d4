// attend_backward on CUDA against the fp64 reference: every row of the case table and of
// cuda_check_rows.cc, in float16 and bfloat16. Options: see cuda_check_driver.hpp.
//
// The kernels get the reference's output and lse, rounded; so the backward is judged alone. Once per
// row and backend they get those of the backend's own select and attend, with nothing in between.
#include <cmath>
#include <random>

#include "cuda_check_driver.hpp"

namespace sparsek::testing {
namespace {

// The two forms of the stage, for code that is written once.
template <std::size_t Rank>
struct BackwardOperands {
  ConstTensorView<Rank> out;
  ConstTensorView<Rank - 1> lse;
  ConstTensorView<Rank> dout;
  TensorView<Rank> dq, dk, dv;
  std::optional<TensorView<Rank - 1>> dscores;
};

void run_attend_backward(Context const& context, Operands<4> const& in,
                         ConstSelectionView const& selection, AttendOptions const& options,
                         BackwardOperands<4> const& b) {
  attend_backward(context, in.q, in.k, in.v, in.scores, selection, in.lengths, options, b.out,
                  b.lse, b.dout, b.dq, b.dk, b.dv, b.dscores);
}
void run_attend_backward(Context const& context, Operands<3> const& in,
                         ConstPackedSelectionView const& selection, AttendOptions const& options,
                         BackwardOperands<3> const& b) {
  attend_backward_varlen(context, in.q, in.k, in.v, in.scores, selection, *in.cu_seqlens_q,
                         *in.cu_seqlens_k, options, b.out, b.lse, b.dout, b.dq, b.dk, b.dv,
                         b.dscores);
}
std::size_t backward_bytes(Context const& context, Operands<4> const& in,
                           AttendOptions const& options) {
  return attend_backward_workspace_bytes(context, in.q.dtype, in.q.shape, in.k.shape, options);
}
std::size_t backward_bytes(Context const& context, Operands<3> const& in,
                           AttendOptions const& options) {
  return attend_backward_varlen_workspace_bytes(context, in.q.dtype, in.cu_seqlens_q->shape[0] - 1,
                                                in.q.shape, in.k.shape, options);
}

template <std::size_t Rank>
struct Gradients {
  Tensor<Rank> dq, dk, dv;
  Tensor<Rank - 1> dscores;
};

// A row: the forward's inputs and outputs, an upstream gradient, and the reference's gradients.
template <std::size_t Rank>
class BackwardProblem {
 public:
  BackwardProblem(Row const& row, DataType dtype)
      : forward(row, dtype),
        out(forward.make_out()),
        dout(forward.make_out()),
        lse(DataType::kFloat32, forward.lse.shape()) {
    std::mt19937 random(17);
    std::normal_distribution<double> normal;
    // What is not set stays NaN: no kernel may use it.
    out.for_each([&](auto const& i) {
      if (!exists(i)) return;
      out.set(i, forward.out.get(i));
      dout.set(i, normal(random));
    });
    lse.for_each([&](auto const& i) {
      std::array<std::int64_t, Rank> row{};
      std::copy(i.begin(), i.end(), row.begin());
      if (exists(row)) lse.set(i, forward.lse.get(i));
    });
    run_reference();
  }

  // Whether the query row of an element of q exists.
  bool exists(std::array<std::int64_t, Rank> const& i) const {
    if constexpr (Rank == 3) {
      return true;
    } else {
      auto const& lengths = forward.lengths;
      Case const& c = forward.row.c;
      return lengths.empty() || c.seq_len_k - c.seq_len_q + i[2] < lengths[i[0]];
    }
  }
  // Whether the planted NaN excuses the gradient of a key at its leading index (b, h) or (t, h).
  bool key_ignored(std::int64_t first, std::int64_t second) const {
    if (!forward.row.plant_nan) return false;
    if constexpr (Rank == 4) return first == 0 && second == 1;
    return first >= forward.cu_seqlens_k[1] && first < forward.cu_seqlens_k[2];
  }
  // Whether there are scores to differentiate.
  bool has_dscores() const { return forward.options.gate != Gate::kNone; }

  CheckProblem<Rank> forward;
  Tensor<Rank> out, dout;
  Tensor<Rank - 1> lse;
  Gradients<Rank> reference;  // float64

 private:
  void run_reference() {
    constexpr DataType kDouble = DataType::kFloat64;
    Context context;
    context.backend = Backend::kReference;
    auto const q = forward.q.as(kDouble), k = forward.k.as(kDouble), v = forward.v.as(kDouble);
    auto const dout64 = dout.as(kDouble);
    auto const scores = forward.scores.as(kDouble);
    auto const threshold = forward.selection.threshold.as(kDouble);
    reference = {{kDouble, q.shape()},
                 {kDouble, k.shape()},
                 {kDouble, v.shape()},
                 {kDouble, scores.shape()}};
    auto const vector_view = [](std::vector<std::int32_t> const& values) {
      return ConstTensorView<1>(values.data(), DataType::kInt32,
                                {static_cast<std::int64_t>(values.size())});
    };
    Operands<Rank> in{q.view(), k.view(), v.view(), scores.view()};
    if (!forward.lengths.empty()) in.lengths = vector_view(forward.lengths);
    if constexpr (Rank == 3) {
      in.cu_seqlens_q = vector_view(forward.cu_seqlens_q);
      in.cu_seqlens_k = vector_view(forward.cu_seqlens_k);
    }
    Tensor<Rank - 1> const &expiry = forward.selection.expiry,
                           &last = forward.selection.last_candidate;
    BasicConstSelectionView<Rank - 1> selection(expiry.view());
    if (!forward.foreign()) {
      selection.threshold = threshold.view();
      selection.last_candidate = last.view();
    }
    BackwardOperands<Rank> const b{
        forward_out().view(), forward_lse().view(), dout64.view(),           reference.dq.view(),
        reference.dk.view(),  reference.dv.view(),  reference.dscores.view()};
    run_attend_backward(context, in, selection, forward.options, b);
  }
  Tensor<Rank> const& forward_out() const { return forward.out; }
  Tensor<Rank - 1> const& forward_lse() const { return forward.lse; }
};

// An error is judged twice: element by element against the tensor's largest element, since each is a
// sum of terms that were rounded to the dtype (weights, their gradients, the output); and over the
// whole tensor, where no large element hides the small ones.
inline double unit_of(DataType dtype) { return dtype == DataType::kBFloat16 ? 0x1p-6 : 0x1p-9; }

template <std::size_t Rank>
class RowBackwardOnGpu {
 public:
  using Problem = BackwardProblem<Rank>;
  struct Results {
    Outcome outcome;
    std::optional<Gradients<Rank>> separate, chained;
  };

  RowBackwardOnGpu(Problem const& problem, CheckOptions const& options, cudaStream_t stream)
      : p_(problem),
        f_(problem.forward),
        options_(options),
        stream_(stream),
        guard_(options.guard_bytes),
        q_(upload(f_.q, guard_)),
        k_(upload(f_.k, guard_)),
        v_(upload(f_.v, guard_)),
        out_(upload(p_.out, guard_)),
        dout_(upload(p_.dout, guard_)),
        scores_(upload(f_.scores, guard_)),
        lse_(upload(p_.lse, guard_)),
        lengths_(upload_vector(f_.lengths)),
        cu_seqlens_q_(upload_vector(f_.cu_seqlens_q)),
        cu_seqlens_k_(upload_vector(f_.cu_seqlens_k)),
        selection_(f_.selection, kPoisonInput, guard_),
        host_{{f_.dtype, f_.q.shape(), f_.q.view().stride},
              {f_.dtype, f_.k.shape(), f_.k.view().stride},
              {f_.dtype, f_.v.shape(), f_.v.view().stride},
              {DataType::kFloat32, f_.scores.shape()}},
        dq_(host_.dq, kPoisonOutput, guard_),
        dk_(host_.dk, kPoisonOutput, guard_),
        dv_(host_.dv, kPoisonOutput, guard_),
        dscores_(host_.dscores, kPoisonOutput, guard_) {
    selection_.upload(f_.selection);
    in_ = {q_.view(), k_.view(), v_.view(), scores_.view()};
    if (lengths_) in_.lengths = view_of(*lengths_);
    if (cu_seqlens_q_) in_.cu_seqlens_q = view_of(*cu_seqlens_q_);
    if (cu_seqlens_k_) in_.cu_seqlens_k = view_of(*cu_seqlens_k_);
  }

  Results run(Backend backend) {
    Results r;
    context_ = Context{};
    context_.device = {DeviceType::kCuda, 0};
    context_.backend = backend;
    context_.stream = stream_;
    try {
      if (!supported(r.outcome)) return r;
      run_separate(r);
      run_chained(r);
    } catch (Unsupported const& e) {
      // The question about shapes alone assumed aligned, dense tensors and no lengths.
      bool const excusable = Rank == 3 || f_.row.c.layout == "sliced" || !f_.lengths.empty();
      if (excusable && backend == Backend::kSm90) {
        r.outcome.verdict = Verdict::kUnsupported;
      } else {
        r.outcome.fail(std::string("Unsupported thrown: ") + e.what());
      }
    } catch (DeviceError const& e) {
      // A refused launch spoils nothing else; after most other errors nothing runs any more.
      cuda_check(cudaStreamQuery(stream_), (label() + e.what()).c_str());
      r.outcome.fail(std::string("DeviceError thrown: ") + e.what());
    } catch (Error const& e) {
      r.outcome.fail(std::string("error thrown: ") + e.what());
    }
    return r;
  }

  // Off the GPU.
  void compare(Results& r) const {
    if (r.separate) compare(*r.separate, "", r.outcome);
    if (r.chained) compare(*r.chained, "behind select and attend: ", r.outcome);
  }

 private:
  std::optional<DeviceBuffer> upload_vector(std::vector<std::int32_t> const& values) const {
    if (values.empty()) return std::nullopt;
    DeviceBuffer buffer(values.size() * sizeof(std::int32_t), kPoisonInput, guard_);
    buffer.upload(values.data());
    return buffer;
  }
  static ConstTensorView<1> view_of(DeviceBuffer const& buffer) {
    return {buffer.data(),
            DataType::kInt32,
            {static_cast<std::int64_t>(buffer.bytes() / sizeof(std::int32_t))}};
  }

  bool supported(Outcome& outcome) const {
    Case const& c = f_.row.c;
    Capability const capability = attend_backward_capability(
        context_, f_.dtype, {c.batch, c.num_q_heads, c.seq_len_q, c.head_dim},
        {c.batch, c.num_kv_heads, c.seq_len_k, c.head_dim}, f_.options);
    outcome.kernel = capability.kernel;
    if (capability.supported) return true;
    bool const promised = c.head_dim == 64 || c.head_dim == 96 || c.head_dim == 128;
    if (promised && context_.backend != Backend::kSm90) {
      outcome.fail("unsupported, though every backend but sm90 must serve it: " +
                   capability.reason);
    } else {
      outcome.verdict = Verdict::kUnsupported;
    }
    return false;
  }

  std::string label() const {
    return f_.row.c.name + " " + sparsek::name_of(f_.dtype) + " " + name_of(context_.backend) + " ";
  }

  struct Output {
    char const* name;
    DeviceBuffer* buffer;
    std::byte* host;
  };
  std::array<Output, 4> outputs() {
    return {{{"dq", &dq_.buffer(), host_.dq.template data<std::byte>()},
             {"dk", &dk_.buffer(), host_.dk.template data<std::byte>()},
             {"dv", &dv_.buffer(), host_.dv.template data<std::byte>()},
             {"dscores", &dscores_.buffer(), host_.dscores.template data<std::byte>()}}};
  }

  // Calls stage(context) with a workspace of exactly `bytes`, then downloads the gradients. The
  // workspace holds NaN and -1 in even runs, 0 in odd ones.
  template <typename Stage>
  Gradients<Rank> run_once(std::size_t bytes, int run, Outcome& outcome, Stage const& stage) {
    for (Output const& o : outputs()) o.buffer->fill(kPoisonOutput);
    GuardedWorkspace workspace(bytes, run % 2 ? 0x00 : 0xFF, guard_);
    Context context = context_;
    context.allocator = workspace.allocator();
    stage(context);
    wait(stream_, options_, label() + "attend_backward");
    if (!workspace.intact()) {
      outcome.fail("wrote beyond its workspace of " + std::to_string(bytes) + " bytes");
    }
    for (Output const& o : outputs()) {
      if (!o.buffer->guards_intact()) outcome.fail(std::string("wrote outside ") + o.name);
      o.buffer->download(o.host);
    }
    return host_;
  }

  BackwardOperands<Rank> operands(DeviceTensor<Rank> const& out,
                                  DeviceTensor<Rank - 1> const& lse) const {
    return {out.view(), lse.view(), dout_.view(),   dq_.view(),
            dk_.view(), dv_.view(), dscores_.view()};
  }

  void run_separate(Results& r) {
    auto const selection = selection_.attended(f_.foreign());
    std::size_t const bytes = backward_bytes(context_, in_, f_.options);
    for (int run = 0; run < options_.repeat + 1; ++run) {
      bool const last = run == options_.repeat;  // without dscores: the others are the same
      Gradients<Rank> const g = run_once(bytes, run, r.outcome, [&](Context const& context) {
        BackwardOperands<Rank> b = operands(out_, lse_);
        if (last) b.dscores.reset();
        run_attend_backward(context, in_, selection, f_.options, b);
      });
      if (run == 0) {
        r.separate = g;
        continue;
      }
      auto const same = [&](char const* name, auto const& mine, auto const& first) {
        if (mine.memory() == first.memory()) return;
        r.outcome.fail("run " + std::to_string(run) + (last ? " (without dscores)" : "") +
                       " gave other bits in " + name + " than run 0");
      };
      same("dq", g.dq, r.separate->dq);
      same("dk", g.dk, r.separate->dk);
      same("dv", g.dv, r.separate->dv);
      if (!last) same("dscores", g.dscores, r.separate->dscores);
    }
  }

  // select, attend and attend_backward with nothing between them, as a training step calls them.
  // Where select's bits are not the reference's, its gradients need not be either.
  void run_chained(Results& r) {
    if (f_.foreign() || r.outcome.verdict == Verdict::kFailed) return;
    SelectOptions const& select_options = f_.options.selection;
    DeviceSelection<Rank - 1> selection(f_.selection, kPoisonOutput, guard_);
    DeviceTensor<Rank> out(p_.out, kPoisonOutput, guard_);
    DeviceTensor<Rank - 1> lse(p_.lse, kPoisonOutput, guard_);
    std::size_t const bytes = select_bytes(context_, in_, select_options) +
                              attend_bytes(context_, in_, f_.options) +
                              backward_bytes(context_, in_, f_.options) + 2 * kWorkspaceAlignment;
    Gradients<Rank> const g = run_once(bytes, 0, r.outcome, [&](Context const& context) {
      run_select(context, in_, select_options, selection.view());
      run_attend(context, in_, selection.attended(false), f_.options, out.view(), lse.view(),
                 Optionals::kGiven);
      run_attend_backward(context, in_, selection.attended(false), f_.options, operands(out, lse));
    });
    HostSelection<Rank - 1> ours = f_.make_selection();
    selection.download(ours);
    bool same = ours.expiry.memory() == f_.selection.expiry.memory();
    ours.threshold.for_each([&](auto const& i) {
      if (f_.chunk_counts(i)) same = same && ours.threshold.get(i) == f_.selection.threshold.get(i);
    });
    if (!same) return;
    r.outcome.chained = true;
    r.chained = g;
  }

  template <std::size_t R, typename Ignored>
  void compare(std::string const& name, Tensor<R> const& ours, Tensor<R> const& reference,
               Ignored const& ignored, Outcome& outcome) const {
    double largest = 1.0, squares = 0.0, errors = 0.0;
    reference.for_each([&](auto const& i) {
      if (ignored(i[0], i[1])) return;
      double const expected = reference.get(i), error = ours.get(i) - expected;
      largest = std::max(largest, std::fabs(expected));
      squares += expected * expected;
      errors += error * error;
    });
    double const unit = unit_of(f_.dtype);
    Differences differences(name);
    reference.for_each([&](auto const& i) {
      if (ignored(i[0], i[1])) return;
      differences.expect(i, ours.get(i), reference.get(i), unit * largest);
    });
    if (auto message = differences.message()) outcome.fail(*message);
    // Each row has an error of its own that does not shrink with it: that of delta, dout . out.
    double rows = 1.0;
    for (std::size_t i = 0; i + 1 < R; ++i) rows *= static_cast<double>(reference.shape()[i]);
    double const norm = std::sqrt(squares + rows);
    if (!(std::sqrt(errors) <= unit * norm)) {
      outcome.fail(name + ": norm of the error " + number_text(std::sqrt(errors)) +
                   ", of the reference " + number_text(std::sqrt(squares)));
    }
    outcome.worst_fraction = std::max(
        {outcome.worst_fraction, differences.worst_fraction(), std::sqrt(errors) / (unit * norm)});
  }

  void compare(Gradients<Rank> const& g, std::string const& prefix, Outcome& outcome) const {
    auto const query_ignored = [&](std::int64_t a, std::int64_t b) { return f_.ignored(a, b); };
    auto const key_ignored = [&](std::int64_t a, std::int64_t b) { return p_.key_ignored(a, b); };
    compare(prefix + "dq", g.dq, p_.reference.dq, query_ignored, outcome);
    compare(prefix + "dk", g.dk, p_.reference.dk, key_ignored, outcome);
    compare(prefix + "dv", g.dv, p_.reference.dv, key_ignored, outcome);
    compare(prefix + "dscores", g.dscores, p_.reference.dscores, key_ignored, outcome);
    auto const check_gaps = [&](char const* name, auto const& t) {
      if (!gaps_intact(t, kPoisonOutput)) {
        outcome.fail(prefix + "wrote between the rows of " + name);
      }
    };
    check_gaps("dq", g.dq);
    check_gaps("dk", g.dk);
    check_gaps("dv", g.dv);
  }

  Problem const& p_;
  CheckProblem<Rank> const& f_;
  CheckOptions const& options_;
  cudaStream_t stream_;
  std::size_t guard_;
  DeviceTensor<Rank> q_, k_, v_, out_, dout_;
  DeviceTensor<Rank - 1> scores_, lse_;
  std::optional<DeviceBuffer> lengths_, cu_seqlens_q_, cu_seqlens_k_;
  DeviceSelection<Rank - 1> selection_;
  Gradients<Rank> host_;
  DeviceTensor<Rank> dq_, dk_, dv_;
  DeviceTensor<Rank - 1> dscores_;
  Operands<Rank> in_;
  Context context_;
};

// Rows of the forward's check, but for those whose reference takes longest, and what only a backward
// meets.
std::vector<Row> backward_rows() {
  constexpr std::int64_t kMaxPairs = 100'000'000;
  std::vector<Row> rows;
  for (Row const& row : all_rows()) {
    Case const& c = row.c;
    if (c.batch * c.num_q_heads * c.seq_len_q * c.seq_len_k <= kMaxPairs) rows.push_back(row);
  }
  auto const add = [&](std::string name, std::array<std::int64_t, 6> const& shape,
                       std::array<std::int64_t, 4> const& selection, Gate gate) {
    Case c{std::move(name), shape[0], shape[1], shape[2], shape[3], shape[4],
           shape[5],        {},       gate,     "normal", "none",   "bhsd"};
    c.select.num_selected = selection[0];
    c.select.window = selection[1];
    c.select.chunk_size = selection[2];
    if (selection[3]) c.select.num_candidates = selection[3];
    rows.push_back({c});
  };
  // Keys that live long in few heads: their gradients are put together from several pieces.
  add("pieces", {1, 2, 1, 5000, 5000, 64}, {64, 64, 128, 0}, Gate::kSoftmax);
  add("pieces_c1", {1, 1, 1, 3000, 3000, 64}, {100, 30, 1, 0}, Gate::kValue);
  add("pieces_odd_chunk", {1, 1, 1, 4000, 4000, 128}, {300, 0, 200, 0}, Gate::kSoftmax);
  add("pieces_few_queries", {2, 2, 2, 2500, 3500, 64}, {80, 128, 16, 0}, Gate::kSoftmax);
  // A pool of which most keys are candidates with a gate between 0 and 1, though not selected.
  for (std::int64_t const chunk_size : {1, 128}) {
    std::string const suffix = "_c" + std::to_string(chunk_size);
    add("threshold_unselected" + suffix, {1, 2, 1, 600, 600, 64}, {8, 16, chunk_size, 600},
        Gate::kSoftmax);
    rows.back().c.scores = "tiny";
    add("threshold_value" + suffix, {1, 2, 1, 600, 600, 64}, {2, 0, chunk_size, 300}, Gate::kValue);
  }
  return rows;
}

}  // namespace
}  // namespace sparsek::testing

int main(int argc, char** argv) {
  using namespace sparsek::testing;
  return check_main<RowBackwardOnGpu>("sparsek_cuda_backward_check", backward_rows(), argc, argv);
}
