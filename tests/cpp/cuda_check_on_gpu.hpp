// A row's problem on the GPU: runs it on one backend after another, and holds the results against
// the reference.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_check_compare.hpp"
#include "cuda_check_device.hpp"
#include "cuda_check_problem.hpp"

namespace sparsek::testing {

// What the program exits with.
inline constexpr int kExitFailed = 1, kExitUsage = 2, kExitGpuLost = 3, kExitSkipped = 77;

struct CheckOptions {
  std::string filter;
  std::vector<Backend> backends{Backend::kPortable, Backend::kSm90, Backend::kAuto};
  std::vector<DataType> dtypes{DataType::kFloat16, DataType::kBFloat16};
  bool quick = false, verbose = false;
  int repeat = 2;
  std::size_t guard_bytes = 4096;
  double timeout_s = 20.0;
  int num_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::function<void()> on_hang = [] {};  // last words, before the process is left
};

inline char const* name_of(Backend backend) {
  switch (backend) {
    case Backend::kPortable:
      return "portable";
    case Backend::kSm90:
      return "sm90";
    case Backend::kAuto:
      return "auto";
    default:
      return "?";
  }
}

// Waits for the stream. A kernel that never ends is reported, and the process left at once: nothing
// can be run behind it, not even the release of memory.
inline void wait(cudaStream_t stream, CheckOptions const& options, std::string const& what) {
  auto const start = std::chrono::steady_clock::now();
  for (;;) {
    cudaError_t const status = cudaStreamQuery(stream);
    if (status == cudaSuccess) return;
    if (status != cudaErrorNotReady) cuda_check(status, what.c_str());
    std::chrono::duration<double> const elapsed = std::chrono::steady_clock::now() - start;
    if (elapsed.count() > options.timeout_s) {
      std::printf("HANG %s: not finished after %.0f s\n", what.c_str(), options.timeout_s);
      options.on_hang();
      std::fflush(stdout);
      std::_Exit(kExitGpuLost);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

// A host tensor's twin on the device.
template <std::size_t Rank>
class DeviceTensor {
 public:
  DeviceTensor(Tensor<Rank> const& host, int poison, std::size_t guard_bytes)
      : view_(host.view()), buffer_(host.memory().size(), poison, guard_bytes) {}

  TensorView<Rank> view() const { return {buffer_.data(), view_.dtype, view_.shape, view_.stride}; }
  DeviceBuffer& buffer() { return buffer_; }

 private:
  ConstTensorView<Rank> view_;
  DeviceBuffer buffer_;
};

template <std::size_t Rank>
DeviceTensor<Rank> upload(Tensor<Rank> const& host, std::size_t guard_bytes) {
  DeviceTensor<Rank> device(host, kPoisonInput, guard_bytes);
  device.buffer().upload(host.memory().data());
  return device;
}

template <std::size_t Rank>
class DeviceSelection {
 public:
  DeviceSelection(HostSelection<Rank> const& host, int poison, std::size_t guard_bytes)
      : expiry_(host.expiry, poison, guard_bytes),
        threshold_(host.threshold, poison, guard_bytes),
        last_candidate_(host.last_candidate, poison, guard_bytes) {}

  void upload(HostSelection<Rank> const& host) {
    expiry_.buffer().upload(host.expiry.memory().data());
    threshold_.buffer().upload(host.threshold.memory().data());
    last_candidate_.buffer().upload(host.last_candidate.memory().data());
  }
  void download(HostSelection<Rank>& host) {
    expiry_.buffer().download(host.expiry.template data<std::byte>());
    threshold_.buffer().download(host.threshold.template data<std::byte>());
    last_candidate_.buffer().download(host.last_candidate.template data<std::byte>());
  }
  void fill(int byte) {
    for (DeviceBuffer* b : {&expiry_.buffer(), &threshold_.buffer(), &last_candidate_.buffer()}) {
      b->fill(byte);
    }
  }
  bool guards_intact() {
    return expiry_.buffer().guards_intact() && threshold_.buffer().guards_intact() &&
           last_candidate_.buffer().guards_intact();
  }
  BasicSelectionView<Rank> view() const {
    return {expiry_.view(), threshold_.view(), last_candidate_.view()};
  }
  // As attend takes it; a foreign selection is an expiry alone.
  BasicConstSelectionView<Rank> attended(bool foreign) const {
    if (foreign) return BasicConstSelectionView<Rank>(ConstTensorView<Rank>(expiry_.view()));
    return view();
  }

 private:
  DeviceTensor<Rank> expiry_, threshold_, last_candidate_;
};

enum class Verdict { kPassed, kFailed, kUnsupported };

struct Outcome {
  Verdict verdict = Verdict::kPassed;
  std::vector<std::string> failures;
  std::string kernel;
  double worst_fraction = 0.0;  // of the output's tolerance
  bool chained = false;         // select and attend also ran in one go, with the same bits

  void fail(std::string message) {
    verdict = Verdict::kFailed;
    failures.push_back(std::move(message));
  }
};

// Workspace of exactly the bytes that the library asked for, filled with `byte`.
class GuardedWorkspace {
 public:
  GuardedWorkspace(std::size_t bytes, int byte, std::size_t guard_bytes)
      : buffer_(bytes, byte, guard_bytes), allocator_(buffer_.data(), bytes) {}
  WorkspaceAllocator* allocator() { return &allocator_; }
  bool intact() const { return buffer_.guards_intact(); }

 private:
  DeviceBuffer buffer_;
  BufferAllocator allocator_;
};

template <std::size_t Rank>
class RowOnGpu {
 public:
  using Problem = CheckProblem<Rank>;

  RowOnGpu(CheckProblem<Rank> const& problem, CheckOptions const& options, cudaStream_t stream)
      : p_(problem),
        options_(options),
        stream_(stream),
        guard_(options.guard_bytes),
        q_(upload(p_.q, guard_)),
        k_(upload(p_.k, guard_)),
        v_(upload(p_.v, guard_)),
        scores_(upload(p_.scores, guard_)),
        lengths_(upload_vector(p_.lengths)),
        cu_seqlens_q_(upload_vector(p_.cu_seqlens_q)),
        cu_seqlens_k_(upload_vector(p_.cu_seqlens_k)),
        reference_selection_(p_.selection, kPoisonInput, guard_),
        selection_(p_.selection, kPoisonOutput, guard_),
        out_host_(p_.make_out()),
        lse_host_(DataType::kFloat32, p_.lse.shape()),
        out_(out_host_, kPoisonOutput, guard_),
        lse_(lse_host_, kPoisonOutput, guard_) {
    reference_selection_.upload(p_.selection);
    in_ = {q_.view(), k_.view(), v_.view(), scores_.view()};
    if (lengths_) in_.lengths = view_of(*lengths_);
    if (cu_seqlens_q_) in_.cu_seqlens_q = view_of(*cu_seqlens_q_);
    if (cu_seqlens_k_) in_.cu_seqlens_k = view_of(*cu_seqlens_k_);
  }

  // What ran on the GPU for one backend, still to be compared.
  struct Results {
    Outcome outcome;
    std::optional<HostSelection<Rank - 1>> selection;
    std::optional<Tensor<Rank>> out;
    std::optional<Tensor<Rank - 1>> lse;
  };

  Results run(Backend backend) {
    Results r;
    context_ = Context{};
    context_.device = {DeviceType::kCuda, 0};
    context_.backend = backend;
    context_.stream = stream_;
    try {
      if (!supported(r.outcome)) return r;
      if (!p_.foreign()) run_selection(r);
      run_attention(r);
      if (!p_.foreign()) run_chained(r);
    } catch (Unsupported const& e) {
      // The question about shapes alone assumed aligned, dense tensors and no lengths.
      bool const excusable = Rank == 3 || p_.row.c.layout == "sliced" || !p_.lengths.empty();
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
    if (r.selection) compare_selection(*r.selection, r.outcome);
    if (r.out) compare_output(*r.out, *r.lse, r.outcome);
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
    Case const& c = p_.row.c;
    Capability const capability =
        attend_capability(context_, p_.dtype, {c.batch, c.num_q_heads, c.seq_len_q, c.head_dim},
                          {c.batch, c.num_kv_heads, c.seq_len_k, c.head_dim}, p_.options);
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

  // Calls stage(context) with a workspace of exactly `bytes`, whatever layout and lengths are: the
  // library gave that number knowing shapes alone.
  template <typename Stage>
  void with_workspace(std::size_t bytes, int byte, char const* what, Outcome& outcome,
                      Stage const& stage) {
    GuardedWorkspace workspace(bytes, byte, guard_);
    Context context = context_;
    context.allocator = workspace.allocator();
    stage(context);
    settle(what);
    if (!workspace.intact()) {
      outcome.fail(std::string(what) + " wrote beyond its workspace of " + std::to_string(bytes) +
                   " bytes");
    }
  }

  // "row dtype backend ", for messages.
  std::string label() const {
    return p_.row.c.name + " " + sparsek::name_of(p_.dtype) + " " + name_of(context_.backend) + " ";
  }
  void settle(char const* what) { wait(stream_, options_, label() + what); }

  // The workspace holds NaN and -1 in even runs, 0 in odd ones.
  static int workspace_byte(int run) { return run % 2 ? 0x00 : 0xFF; }

  void run_selection(Results& r) {
    std::size_t const bytes = select_bytes(context_, in_, p_.options.selection);
    for (int run = 0; run < options_.repeat; ++run) {
      selection_.fill(kPoisonOutput);
      with_workspace(bytes, workspace_byte(run), "select", r.outcome, [&](Context const& context) {
        run_select(context, in_, p_.options.selection, selection_.view());
      });
      HostSelection<Rank - 1> host = p_.make_selection();
      selection_.download(host);
      if (!selection_.guards_intact()) r.outcome.fail("select wrote outside its outputs");
      if (run == 0) {
        r.selection = std::move(host);
      } else if (host.expiry.memory() != r.selection->expiry.memory() ||
                 host.threshold.memory() != r.selection->threshold.memory() ||
                 host.last_candidate.memory() != r.selection->last_candidate.memory()) {
        r.outcome.fail("select: run " + std::to_string(run) + " gave other bits than run 0");
      }
    }
  }

  // One attend over `selection`; downloads into out_host_ and lse_host_.
  void attend_once(DeviceSelection<Rank - 1> const& selection, int run, Outcome& outcome,
                   bool with_select = false) {
    std::size_t const bytes = attend_bytes(context_, in_, p_.options);
    std::size_t const select_at_most =
        with_select ? select_bytes(context_, in_, p_.options.selection) + kWorkspaceAlignment : 0;
    out_.buffer().fill(kPoisonOutput);
    lse_.buffer().fill(kPoisonOutput);
    // Odd runs leave out what may be left out: it must not change the output.
    auto const optionals = run % 2 ? Optionals::kLeftOut : Optionals::kGiven;
    std::optional<TensorView<Rank - 1>> lse = lse_.view();
    if (optionals == Optionals::kLeftOut) lse.reset();
    with_workspace(bytes + select_at_most, workspace_byte(run), "attend", outcome,
                   [&](Context const& context) {
                     if (with_select) {
                       run_select(context, in_, p_.options.selection, selection.view());
                     }
                     run_attend(context, in_, selection.attended(p_.foreign()), p_.options,
                                out_.view(), lse, optionals);
                   });
    if (!out_.buffer().guards_intact()) outcome.fail("attend wrote outside out");
    if (!lse_.buffer().guards_intact()) outcome.fail("attend wrote outside lse");
    out_.buffer().download(out_host_.template data<std::byte>());
    lse_.buffer().download(lse_host_.template data<std::byte>());
  }

  void run_attention(Results& r) {
    for (int run = 0; run < options_.repeat; ++run) {
      attend_once(reference_selection_, run, r.outcome);
      if (run == 0) {
        r.out = out_host_;
        r.lse = lse_host_;
      } else if (out_host_.memory() != r.out->memory()) {
        r.outcome.fail("attend: run " + std::to_string(run) + " gave other bits in out than run 0");
      } else if (run % 2 == 0 && lse_host_.memory() != r.lse->memory()) {
        r.outcome.fail("attend: run " + std::to_string(run) + " gave other bits in lse than run 0");
      }
    }
  }

  // select and attend with nothing between them, as a program calls them. Where select's bits are
  // the reference's, out must be that of the attend above.
  void run_chained(Results& r) {
    if (!r.selection || !r.out || r.outcome.verdict == Verdict::kFailed) return;
    HostSelection<Rank - 1> const& ours = *r.selection;
    bool same = ours.expiry.memory() == p_.selection.expiry.memory();
    ours.threshold.for_each([&](auto const& i) {
      if (p_.chunk_counts(i)) same = same && ours.threshold.get(i) == p_.selection.threshold.get(i);
    });
    if (!same) return;
    selection_.fill(kPoisonOutput);
    attend_once(selection_, 0, r.outcome, true);
    r.outcome.chained = true;
    if (out_host_.memory() != r.out->memory()) {
      r.outcome.fail("select and attend in one go: other bits in out than attend alone");
    }
  }

  void compare_selection(HostSelection<Rank - 1> const& ours, Outcome& outcome) const {
    Differences expiry("expiry"), last_candidate("last_candidate"), threshold("threshold");
    ours.expiry.for_each([&](auto const& i) {
      expiry.expect(i, ours.expiry.get(i), p_.selection.expiry.get(i), 0.0);
    });
    ours.threshold.for_each([&](auto const& i) {
      if (!p_.chunk_counts(i)) return;
      last_candidate.expect(i, ours.last_candidate.get(i), p_.selection.last_candidate.get(i), 0.0);
      // A threshold lies at most 1 below the scores that it is computed from.
      double const expected = p_.selection.threshold.get(i);
      double const unit = std::isinf(expected) ? 0.0 : std::max(ulp(expected), ulp(expected + 1.0));
      threshold.expect(i, ours.threshold.get(i), expected, 2.0 * unit);
    });
    for (Differences const* d : {&expiry, &last_candidate, &threshold}) {
      if (auto message = d->message()) outcome.fail("select: " + *message);
    }
  }

  void compare_output(Tensor<Rank> const& out, Tensor<Rank - 1> const& lse,
                      Outcome& outcome) const {
    Differences out_differences("out"), lse_differences("lse");
    double const tolerance = output_tolerance_of(p_.dtype);
    out.for_each([&](auto const& i) {
      if (p_.ignored(i[0], i[1])) return;
      double const expected = p_.out.get(i);
      out_differences.expect(i, out.get(i), expected, tolerance * (1.0 + std::fabs(expected)));
    });
    lse.for_each([&](auto const& i) {
      if (p_.ignored(i[0], i[1])) return;
      double const expected = p_.lse.get(i);
      // -inf is exact.
      double const allowed =
          std::isinf(expected) ? 0.0 : kLseTolerance * (1.0 + std::fabs(expected));
      lse_differences.expect(i, lse.get(i), expected, allowed);
    });
    for (Differences const* d : {&out_differences, &lse_differences}) {
      if (auto message = d->message()) outcome.fail("attend: " + *message);
    }
    if (!gaps_intact(out, kPoisonOutput)) outcome.fail("attend wrote between the rows of out");
    outcome.worst_fraction = out_differences.worst_fraction();
  }

  CheckProblem<Rank> const& p_;
  CheckOptions const& options_;
  cudaStream_t stream_;
  std::size_t guard_;
  DeviceTensor<Rank> q_, k_, v_;
  DeviceTensor<Rank - 1> scores_;
  std::optional<DeviceBuffer> lengths_, cu_seqlens_q_, cu_seqlens_k_;
  DeviceSelection<Rank - 1> reference_selection_, selection_;
  Tensor<Rank> out_host_;
  Tensor<Rank - 1> lse_host_;
  DeviceTensor<Rank> out_;
  DeviceTensor<Rank - 1> lse_;
  Operands<Rank> in_;
  Context context_;
};

}  // namespace sparsek::testing
