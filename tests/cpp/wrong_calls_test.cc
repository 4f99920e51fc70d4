// Wrong calls and the message that each gets.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "case_data.hpp"

namespace sparsek::testing {
namespace {

// A right call of every stage, to be made wrong in one place.
struct Call {
  Call() { select(context, data.scores.view(), std::nullopt, c.select, selection.view()); }

  void run_select() {
    auto view = selection.view();
    if (expiry) view.expiry = *expiry;
    select(context, scores, lengths, c.select, view);
  }
  void run_attend() {
    ConstSelectionView view(selection.view());
    if (!threshold) view.threshold.reset();
    attend(context, q, k, v, gate_scores, view, lengths, options, out_view, lse_view);
  }

  Case c{"call",         2,        4,      2,     8, 8, 16, {2, 2, 4, std::nullopt},
         Gate::kSoftmax, "normal", "none", "bhsd"};
  CaseData data{c, DataType::kFloat32};
  SelectionTensors selection{c, DataType::kFloat32};
  Tensor<4> out = make_output(c, DataType::kFloat32);
  Tensor<3> lse = make_lse(c, DataType::kFloat32);
  std::vector<std::int32_t> length_values{8, 8};

  Context context;
  AttendOptions options = c.attend();
  ConstTensorView<4> q = data.q.view(), k = data.k.view(), v = data.v.view();
  ConstTensorView<3> scores = std::as_const(data.scores).view();
  std::optional<ConstTensorView<3>> gate_scores = scores;
  std::optional<ConstTensorView<1>> lengths;
  std::optional<TensorView<3>> expiry;
  bool threshold = true;
  TensorView<4> out_view = out.view();
  std::optional<TensorView<3>> lse_view = lse.view();
};

struct WrongCall {
  char const* what;
  std::function<void(Call&)> run;
  char const* message;
};

WrongCall const kWrongCalls[] = {
    {"k < 0",
     [](Call& call) {
       call.c.select.num_selected = -1;
       call.run_select();
     },
     "num_selected: expected a number >= 0, got -1"},
    {"window < 0",
     [](Call& call) {
       call.c.select.window = -1;
       call.run_select();
     },
     "window: expected a number >= 0, got -1"},
    {"chunk_size 0",
     [](Call& call) {
       call.c.select.chunk_size = 0;
       call.run_select();
     },
     "chunk_size: expected a number >= 1, got 0"},
    {"fewer candidates than selected keys",
     [](Call& call) {
       call.c.select.num_candidates = 1;
       call.run_select();
     },
     "num_candidates: expected at least num_selected = 2, got 1"},
    {"expiry of another length",
     [](Call& call) {
       call.expiry = call.selection.expiry.view();
       call.expiry->shape[2] = 7;
       call.run_select();
     },
     "expiry: expected shape [B, Hkv, Sk] = [2, 2, 8], got [2, 2, 7]"},
    {"scores of another dtype",
     [](Call& call) {
       call.scores.dtype = DataType::kFloat16;
       call.run_select();
     },
     "scores: expected dtype float32, got float16"},
    {"a score that is not finite",
     [](Call& call) {
       call.data.scores.set({1, 0, 3}, std::numeric_limits<double>::infinity());
       call.run_select();
     },
     "scores: expected finite values, got inf at batch 1, head 0, position 3"},
    {"a length beyond the sequence",
     [](Call& call) {
       call.length_values[1] = 9;
       call.lengths = {call.length_values.data(), DataType::kInt32, {2}};
       call.run_select();
     },
     "lengths: expected values from 0 to Sk = 8, got lengths[1] = 9"},
    {"lengths of another batch",
     [](Call& call) {
       call.lengths = {call.length_values.data(), DataType::kInt32, {1}};
       call.run_attend();
     },
     "lengths: expected shape [B] = [2], got [1]"},
    {"heads that do not divide",
     [](Call& call) {
       call.q.shape[1] = 3;
       call.run_attend();
     },
     "q: expected a number of heads divisible by Hkv = 2, got 3"},
    {"k and v of different length",
     [](Call& call) {
       call.v.shape[2] = 7;
       call.run_attend();
     },
     "v: expected shape [B, Hkv, Sk, D] = [2, 2, 8, 16], got [2, 2, 7, 16]"},
    {"more queries than keys",
     [](Call& call) {
       call.k.shape[2] = call.v.shape[2] = 7;
       call.run_attend();
     },
     "q: expected at most Sk = 7 query positions, got 8"},
    {"different dtypes of q and k",
     [](Call& call) {
       call.k.dtype = DataType::kBFloat16;
       call.run_attend();
     },
     "k: expected dtype float32, got bfloat16"},
    {"a last dimension that is not contiguous",
     [](Call& call) {
       call.q.stride[3] = 2;
       call.run_attend();
     },
     "q: expected a contiguous last dimension (stride 1), got stride 2"},
    {"an expanded output",
     [](Call& call) {
       call.out_view.stride[0] = 0;
       call.run_attend();
     },
     "out: expected an output whose elements do not overlap, got strides [0, 128, 16, 1]"},
    {"no scores for a gate",
     [](Call& call) {
       call.gate_scores.reset();
       call.run_attend();
     },
     "scores: expected a tensor with gate softmax, got none"},
    {"a gate for a foreign selection",
     [](Call& call) {
       call.threshold = false;
       call.run_attend();
     },
     "gate: expected none for a selection without thresholds, got softmax"},
    {"no memory",
     [](Call& call) {
       call.q.data = nullptr;
       call.run_attend();
     },
     "q: expected memory of [2, 4, 8, 16], got null"},
    {"a scale that is not finite",
     [](Call& call) {
       call.options.sm_scale = NAN;
       call.run_attend();
     },
     "sm_scale: expected a finite number, got nan"},
    {"lse of another shape",
     [](Call& call) {
       call.lse_view->shape[2] = 9;
       call.run_attend();
     },
     "lse: expected shape [B, Hq, Sq] = [2, 4, 8], got [2, 4, 9]"},
    {"a negative number of threads",
     [](Call& call) {
       call.context.num_threads = -2;
       call.run_attend();
     },
     "num_threads: expected a number >= 0, got -2"},
    {"a CUDA backend on the CPU",
     [](Call& call) {
       call.context.backend = Backend::kSm90;
       call.run_attend();
     },
     "backend: expected one that runs on the CPU, got a CUDA backend"},
    {"float64 on the CPU backend",
     [](Call& call) {
       call.q.dtype = call.k.dtype = call.v.dtype = call.out_view.dtype = DataType::kFloat64;
       call.run_attend();
     },
     "q: dtype float64 is served by the reference backend only; supported here: float16, bfloat16, "
     "float32"},
};

TEST(WrongCalls, TheRightCallPasses) {
  Call call;
  call.run_select();
  call.run_attend();
}

TEST(WrongCalls, EachGetsItsMessage) {
  for (WrongCall const& wrong : kWrongCalls) {
    Call call;
    try {
      wrong.run(call);
      ADD_FAILURE() << wrong.what << ": expected an error";
    } catch (Error const& e) {
      EXPECT_STREQ(e.what(), wrong.message) << wrong.what;
    }
  }
}

}  // namespace
}  // namespace sparsek::testing
