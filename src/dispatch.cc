// The public functions: validate, choose a backend, run. The only file that knows every backend.
#include <string>

#include "sparsek/sparsek.hpp"
#include "validate.hpp"

#ifndef SPARSEK_WITH_CUDA
#define SPARSEK_WITH_CUDA 0
#endif
#ifndef SPARSEK_CUDA_ARCHITECTURES
#define SPARSEK_CUDA_ARCHITECTURES ""
#endif

namespace sparsek {
namespace {

constexpr char const* kNoReferenceDecode =
    "decode: not served by the reference backend, whose attend says what it must give; supported: "
    "the CPU and the CUDA backend";

enum class Target { kReference, kCpu, kCuda };

Target target_of(Context const& context) {
  if (context.device.type == DeviceType::kCpu) {
    return context.backend == Backend::kReference ? Target::kReference : Target::kCpu;
  }
  if constexpr (!SPARSEK_WITH_CUDA) {
    throw Unsupported(
        "device: CUDA kernels are not part of this build (it was made without nvcc); supported "
        "here: CPU");
  }
  return Target::kCuda;
}

// Calls the backend's function. A build without CUDA never refers to the CUDA one.
template <typename Reference, typename Cpu, typename Cuda>
auto dispatch(Context const& context, Reference&& reference, Cpu&& cpu, Cuda&& cuda) {
  switch (target_of(context)) {
    case Target::kReference:
      return reference();
    case Target::kCpu:
      return cpu();
    case Target::kCuda:
      break;
  }
  return cuda();
}

#if SPARSEK_WITH_CUDA
#define SPARSEK_CUDA_CALL(call) [&] { return cuda::call; }
#else
#define SPARSEK_CUDA_CALL(call) [&]() -> decltype(cuda::call) { throw Unsupported("CUDA"); }
#endif

void run_select(Context const& context, SelectProblem const& p) {
  if (p.batch == 0 || p.num_kv_heads == 0 || p.seq_len == 0) return;
  dispatch(
      context, [&] { reference::select(p); }, [&] { cpu::select(context, p); },
      SPARSEK_CUDA_CALL(select(context, p)));
}

void run_attend(Context const& context, AttendProblem const& p) {
  if (p.batch == 0 || p.num_q_heads == 0 || p.seq_len_q == 0) return;
  dispatch(
      context, [&] { reference::attend(p); }, [&] { cpu::attend(context, p); },
      SPARSEK_CUDA_CALL(attend(context, p)));
}

void run_attend_backward(Context const& context, AttendBackwardProblem const& p) {
  // Without queries there are still gradients of keys to clear.
  if (p.forward.batch == 0 || p.forward.num_kv_heads == 0) return;
  dispatch(
      context, [&] { reference::attend_backward(p); }, [&] { cpu::attend_backward(context, p); },
      SPARSEK_CUDA_CALL(attend_backward(context, p)));
}

void run_score(Context const& context, ScoreProblem const& p) {
  if (p.batch == 0 || p.num_kv_heads == 0 || p.seq_len == 0) return;
  dispatch(
      context, [&] { reference::key_norm_scores(p); }, [&] { cpu::key_norm_scores(context, p); },
      SPARSEK_CUDA_CALL(key_norm_scores(context, p)));
}

// A problem of these shapes without memory behind it, for questions about capability and workspace.
// The alignment that decides between kernels is taken to be that of a fresh contiguous tensor.
AttendProblem shape_only_problem(Context const& context, DataType dtype,
                                 std::array<std::int64_t, 4> const& q_shape,
                                 std::array<std::int64_t, 4> const& k_shape,
                                 AttendOptions const& options) {
  alignas(kWorkspaceAlignment) static std::byte const somewhere[kWorkspaceAlignment]{};
  auto const view = [&](DataType t, auto const& shape) {
    return ConstTensorView<std::tuple_size_v<std::decay_t<decltype(shape)>>>(&somewhere, t, shape);
  };
  DataType const score_dtype =
      dtype == DataType::kFloat64 ? DataType::kFloat64 : DataType::kFloat32;
  std::array<std::int64_t, 3> const row{k_shape[0], k_shape[1], k_shape[2]};
  ConstSelectionView selection(view(DataType::kInt32, row));
  std::optional<ConstTensorView<3>> scores;
  if (options.origin == SelectionOrigin::kSelect) {
    check_select_options(options.selection);
    std::int64_t const chunk_size = std::min(options.selection.chunk_size, k_shape[2] + 1);
    std::array<std::int64_t, 3> const chunks{k_shape[0], k_shape[1],
                                             (k_shape[2] + chunk_size - 1) / chunk_size};
    selection.threshold = view(score_dtype, chunks);
  }
  if (options.gate != Gate::kNone) scores = view(score_dtype, row);
  return make_attend_problem(context, view(dtype, q_shape), view(dtype, k_shape),
                             view(dtype, k_shape), scores, selection, std::nullopt, options,
                             view(dtype, q_shape), std::nullopt);
}

// The backward of such a problem. dscores are taken to be wanted where there are gates: that takes
// the most workspace.
AttendBackwardProblem shape_only_backward(AttendProblem const& forward) {
  alignas(kWorkspaceAlignment) static std::byte somewhere[kWorkspaceAlignment]{};
  AttendBackwardProblem p{};
  p.forward = forward;
  p.forward.lse = somewhere;
  p.dout = p.dq = p.dk = p.dv = somewhere;
  p.stride_dout_batch = p.stride_dq_batch = forward.stride_q_batch;
  p.stride_dout_head = p.stride_dq_head = forward.stride_q_head;
  p.stride_dout_position = p.stride_dq_position = forward.stride_q_position;
  p.stride_dk_batch = p.stride_dv_batch = forward.stride_k_batch;
  p.stride_dk_head = p.stride_dv_head = forward.stride_k_head;
  p.stride_dk_position = p.stride_dv_position = forward.stride_k_position;
  if (forward.gate != Gate::kNone) p.dscores = somewhere;
  return p;
}

}  // namespace

void key_norm_scores(Context const& context, ConstTensorView<4> const& k,
                     std::optional<ConstTensorView<1>> const& lengths,
                     TensorView<3> const& scores) {
  run_score(context, make_score_problem(context, k, lengths, scores));
}

void key_norm_scores_varlen(Context const& context, ConstTensorView<3> const& k,
                            TensorView<2> const& scores) {
  run_score(context, make_score_problem(context, k, scores));
}

void select(Context const& context, ConstTensorView<3> const& scores,
            std::optional<ConstTensorView<1>> const& lengths, SelectOptions const& options,
            SelectionView const& selection) {
  run_select(context, make_select_problem(context, scores, lengths, options, selection));
}

void select_varlen(Context const& context, ConstTensorView<2> const& scores,
                   ConstTensorView<1> const& cu_seqlens_k, SelectOptions const& options,
                   PackedSelectionView const& selection) {
  run_select(context, make_select_problem(context, scores, cu_seqlens_k, options, selection));
}

void attend(Context const& context, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
            ConstTensorView<4> const& v, std::optional<ConstTensorView<3>> const& scores,
            ConstSelectionView const& selection, std::optional<ConstTensorView<1>> const& lengths,
            AttendOptions const& options, TensorView<4> const& out,
            std::optional<TensorView<3>> const& lse) {
  run_attend(context,
             make_attend_problem(context, q, k, v, scores, selection, lengths, options, out, lse));
}

void attend_varlen(Context const& context, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
                   ConstTensorView<3> const& v, std::optional<ConstTensorView<2>> const& scores,
                   ConstPackedSelectionView const& selection,
                   ConstTensorView<1> const& cu_seqlens_q, ConstTensorView<1> const& cu_seqlens_k,
                   AttendOptions const& options, TensorView<3> const& out,
                   std::optional<TensorView<2>> const& lse) {
  run_attend(context, make_attend_problem(context, q, k, v, scores, selection, cu_seqlens_q,
                                          cu_seqlens_k, options, out, lse));
}

void attend_backward(Context const& context, ConstTensorView<4> const& q,
                     ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                     std::optional<ConstTensorView<3>> const& scores,
                     ConstSelectionView const& selection,
                     std::optional<ConstTensorView<1>> const& lengths, AttendOptions const& options,
                     ConstTensorView<4> const& out, ConstTensorView<3> const& lse,
                     ConstTensorView<4> const& dout, TensorView<4> const& dq,
                     TensorView<4> const& dk, TensorView<4> const& dv,
                     std::optional<TensorView<3>> const& dscores) {
  run_attend_backward(
      context, make_attend_backward_problem(context, q, k, v, scores, selection, lengths, options,
                                            out, lse, dout, dq, dk, dv, dscores));
}

void attend_backward_varlen(Context const& context, ConstTensorView<3> const& q,
                            ConstTensorView<3> const& k, ConstTensorView<3> const& v,
                            std::optional<ConstTensorView<2>> const& scores,
                            ConstPackedSelectionView const& selection,
                            ConstTensorView<1> const& cu_seqlens_q,
                            ConstTensorView<1> const& cu_seqlens_k, AttendOptions const& options,
                            ConstTensorView<3> const& out, ConstTensorView<2> const& lse,
                            ConstTensorView<3> const& dout, TensorView<3> const& dq,
                            TensorView<3> const& dk, TensorView<3> const& dv,
                            std::optional<TensorView<2>> const& dscores) {
  run_attend_backward(context, make_attend_backward_problem(context, q, k, v, scores, selection,
                                                            cu_seqlens_q, cu_seqlens_k, options,
                                                            out, lse, dout, dq, dk, dv, dscores));
}

// --- decode
// ----------------------------------------------------------------------------------------------------------

namespace {

void run_decode(Context const& context, DecodeProblem const& p) {
  if (p.batch == 0 || p.num_kv_heads == 0) return;
  dispatch(
      context, [] { throw Unsupported(kNoReferenceDecode); }, [&] { cpu::decode(context, p); },
      SPARSEK_CUDA_CALL(decode(context, p)));
}

}  // namespace

void decode(Context const& context, ConstTensorView<4> const& q, ConstTensorView<4> const& k,
            ConstTensorView<4> const& v, ConstTensorView<3> const& scores,
            std::optional<ConstTensorView<1>> const& lengths, DecodeOptions const& options,
            DecodeStateView const& state, TensorView<4> const& out,
            std::optional<TensorView<3>> const& lse) {
  run_decode(context,
             make_decode_problem(context, q, k, v, scores, lengths, options, state, out, lse));
}

void decode_append(Context const& context, ConstTensorView<4> const& k, ConstTensorView<4> const& v,
                   ConstTensorView<3> const& scores,
                   std::optional<ConstTensorView<1>> const& lengths, SelectOptions const& options,
                   DecodeStateView const& state) {
  run_decode(context, make_append_problem(context, k, v, scores, lengths, options, state));
}

void decode_varlen(Context const& context, ConstTensorView<3> const& q, ConstTensorView<3> const& k,
                   ConstTensorView<3> const& v, ConstTensorView<2> const& scores,
                   ConstTensorView<1> const& cu_seqlens, DecodeOptions const& options,
                   DecodeStateView const& state, TensorView<3> const& out,
                   std::optional<TensorView<2>> const& lse) {
  run_decode(context,
             make_decode_problem(context, q, k, v, scores, cu_seqlens, options, state, out, lse));
}

void decode_append_varlen(Context const& context, ConstTensorView<3> const& k,
                          ConstTensorView<3> const& v, ConstTensorView<2> const& scores,
                          ConstTensorView<1> const& cu_seqlens, SelectOptions const& options,
                          DecodeStateView const& state) {
  run_decode(context, make_append_problem(context, k, v, scores, cu_seqlens, options, state));
}

// --- workspace
// -------------------------------------------------------------------------------------------------------

namespace {

std::size_t select_workspace_of([[maybe_unused]] Context const& context,
                                [[maybe_unused]] SelectProblem const& p) {
  if (context.device.type == DeviceType::kCpu) return 0;  // the CPU backend uses the heap
  return dispatch(
      context, [] { return std::size_t{0}; }, [] { return std::size_t{0}; },
      SPARSEK_CUDA_CALL(select_workspace(context, p)));
}

// What the kernels and their workspace depend on.
DecodeProblem shape_only_decode(DataType dtype, std::int64_t batch, std::int64_t heads,
                                std::int64_t head_dim, SelectOptions const& options) {
  DecodeProblem p{};
  p.layout = decode_state_layout(dtype, heads, head_dim, options);
  p.batch = batch, p.num_kv_heads = heads, p.head_dim = head_dim, p.dtype = dtype;
  return p;
}

SelectProblem shape_only_select(std::int64_t batch, std::int64_t heads, std::int64_t seq_len,
                                SelectOptions const& options) {
  check_select_options(options);
  SelectProblem p{};
  p.batch = batch, p.num_kv_heads = heads, p.seq_len = seq_len;
  p.num_selected = std::min(options.num_selected, seq_len);
  p.window = std::min(options.window, seq_len);
  p.chunk_size = std::min(options.chunk_size, seq_len + 1);
  p.num_candidates = std::min(resolved_num_candidates(options), seq_len);
  p.num_chunks = (seq_len + p.chunk_size - 1) / p.chunk_size;
  p.score_dtype = DataType::kFloat32;
  return p;
}

}  // namespace

std::size_t select_workspace_bytes(Context const& context, std::int64_t batch_size,
                                   std::int64_t num_kv_heads, std::int64_t seq_len,
                                   SelectOptions const& options) {
  return select_workspace_of(context,
                             shape_only_select(batch_size, num_kv_heads, seq_len, options));
}

std::size_t select_varlen_workspace_bytes(Context const& context, std::int64_t num_sequences,
                                          std::int64_t num_kv_heads, std::int64_t total_k,
                                          SelectOptions const& options) {
  static std::int32_t const packed = 0;
  SelectProblem p = shape_only_select(num_sequences, num_kv_heads, total_k, options);
  p.num_chunks = total_k / p.chunk_size + num_sequences;
  p.cu_seqlens_k = &packed;  // only whether it is there counts
  return select_workspace_of(context, p);
}

namespace {

// Of packed sequences of these total shapes.
AttendProblem shape_only_packed(Context const& context, DataType dtype, std::int64_t num_sequences,
                                std::array<std::int64_t, 3> const& q_shape,
                                std::array<std::int64_t, 3> const& k_shape,
                                AttendOptions const& options) {
  static std::int32_t const packed = 0;
  AttendProblem p = shape_only_problem(context, dtype, {1, q_shape[1], q_shape[0], q_shape[2]},
                                       {1, k_shape[1], k_shape[0], k_shape[2]}, options);
  p.batch = num_sequences;
  p.num_chunks = p.seq_len_k / p.chunk_size + num_sequences;
  p.cu_seqlens_q = p.cu_seqlens_k = &packed;  // only whether they are there counts
  return p;
}

std::size_t attend_workspace_of([[maybe_unused]] Context const& context,
                                [[maybe_unused]] AttendProblem const& p) {
  if (context.device.type == DeviceType::kCpu) return 0;
  return dispatch(
      context, [] { return std::size_t{0}; }, [] { return std::size_t{0}; },
      SPARSEK_CUDA_CALL(attend_workspace(context, p)));
}

std::size_t attend_backward_workspace_of([[maybe_unused]] Context const& context,
                                         [[maybe_unused]] AttendBackwardProblem const& p) {
  if (context.device.type == DeviceType::kCpu) return 0;
  if (p.forward.batch == 0 || p.forward.num_kv_heads == 0) return 0;
  return dispatch(
      context, [] { return std::size_t{0}; }, [] { return std::size_t{0}; },
      SPARSEK_CUDA_CALL(attend_backward_workspace(context, p)));
}

}  // namespace

std::size_t attend_workspace_bytes(Context const& context, DataType dtype,
                                   std::array<std::int64_t, 4> const& q_shape,
                                   std::array<std::int64_t, 4> const& k_shape,
                                   AttendOptions const& options) {
  return attend_workspace_of(context,
                             shape_only_problem(context, dtype, q_shape, k_shape, options));
}

std::size_t attend_varlen_workspace_bytes(Context const& context, DataType dtype,
                                          std::int64_t num_sequences,
                                          std::array<std::int64_t, 3> const& q_shape,
                                          std::array<std::int64_t, 3> const& k_shape,
                                          AttendOptions const& options) {
  return attend_workspace_of(
      context, shape_only_packed(context, dtype, num_sequences, q_shape, k_shape, options));
}

std::size_t attend_backward_workspace_bytes(Context const& context, DataType dtype,
                                            std::array<std::int64_t, 4> const& q_shape,
                                            std::array<std::int64_t, 4> const& k_shape,
                                            AttendOptions const& options) {
  return attend_backward_workspace_of(
      context, shape_only_backward(shape_only_problem(context, dtype, q_shape, k_shape, options)));
}

std::size_t attend_backward_varlen_workspace_bytes(Context const& context, DataType dtype,
                                                   std::int64_t num_sequences,
                                                   std::array<std::int64_t, 3> const& q_shape,
                                                   std::array<std::int64_t, 3> const& k_shape,
                                                   AttendOptions const& options) {
  return attend_backward_workspace_of(
      context, shape_only_backward(
                   shape_only_packed(context, dtype, num_sequences, q_shape, k_shape, options)));
}

std::size_t decode_workspace_bytes(Context const& context, DataType dtype,
                                   std::int64_t num_sequences, std::int64_t num_kv_heads,
                                   std::int64_t head_dim, SelectOptions const& options) {
  [[maybe_unused]] DecodeProblem const p =
      shape_only_decode(dtype, num_sequences, num_kv_heads, head_dim, options);
  if (context.device.type == DeviceType::kCpu) return 0;
  return dispatch(
      context, [] { return std::size_t{0}; }, [] { return std::size_t{0}; },
      SPARSEK_CUDA_CALL(decode_workspace(context, p)));
}

// --- capability
// ------------------------------------------------------------------------------------------------------

namespace {

// `cuda_kernel(problem, reason)` names the CUDA kernel or, if none, gives the reason.
template <typename CudaKernel>
Capability capability_of(Context const& context, DataType dtype,
                         std::array<std::int64_t, 4> const& q_shape,
                         std::array<std::int64_t, 4> const& k_shape, AttendOptions const& options,
                         [[maybe_unused]] CudaKernel const& cuda_kernel) {
  try {
    AttendProblem const p = shape_only_problem(context, dtype, q_shape, k_shape, options);
    return dispatch(
        context, [] { return Capability{true, "reference", ""}; },
        [] { return Capability{true, "cpu/" + cpu_isa(), ""}; },
        [&] {
          Capability c;
          c.kernel = cuda_kernel(p, &c.reason);
          c.supported = !c.kernel.empty();
          return c;
        });
  } catch (Error const& e) {
    return {false, "", e.what()};
  }
}

}  // namespace

Capability attend_capability(Context const& context, DataType dtype,
                             std::array<std::int64_t, 4> const& q_shape,
                             std::array<std::int64_t, 4> const& k_shape,
                             AttendOptions const& options) {
  return capability_of(
      context, dtype, q_shape, k_shape, options,
      [&]([[maybe_unused]] AttendProblem const& p, [[maybe_unused]] std::string* reason) {
        return SPARSEK_CUDA_CALL(attend_kernel_name(context, p, reason))();
      });
}

Capability attend_backward_capability(Context const& context, DataType dtype,
                                      std::array<std::int64_t, 4> const& q_shape,
                                      std::array<std::int64_t, 4> const& k_shape,
                                      AttendOptions const& options) {
  return capability_of(
      context, dtype, q_shape, k_shape, options,
      [&]([[maybe_unused]] AttendProblem const& p, [[maybe_unused]] std::string* reason) {
        return SPARSEK_CUDA_CALL(
            attend_backward_kernel_name(context, shape_only_backward(p), reason))();
      });
}

Capability decode_capability(Context const& context, DataType dtype,
                             std::array<std::int64_t, 4> const& q_shape,
                             std::array<std::int64_t, 4> const& k_shape,
                             AttendOptions const& options) {
  try {
    DecodeProblem const p =
        shape_only_decode(dtype, k_shape[0], k_shape[1], k_shape[3], options.selection);
    if (target_of(context) == Target::kReference) return {false, "", kNoReferenceDecode};
    return capability_of(
        context, dtype, q_shape, k_shape, options,
        [&]([[maybe_unused]] AttendProblem const&, [[maybe_unused]] std::string* reason) {
          return SPARSEK_CUDA_CALL(decode_kernel_name(context, p, reason))();
        });
  } catch (Error const& e) {
    return {false, "", e.what()};
  }
}

bool built_with_cuda() { return SPARSEK_WITH_CUDA; }
std::string cuda_architectures() { return SPARSEK_CUDA_ARCHITECTURES; }
std::string version() { return SPARSEK_VERSION; }

}  // namespace sparsek
