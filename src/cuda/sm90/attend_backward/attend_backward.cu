// The host side of the backward on Hopper: what it serves, workspace, parameters, the order of the
// kernels.
#include "cuda/sm90/attend_backward/attend_backward.hpp"

#include <algorithm>
#include <string>

#include "cuda/runtime.hpp"
#include "cuda/sm90/attend/residency.hpp"
#include "cuda/sm90/attend_backward/launch.hpp"

namespace sparsek::cuda::sm90 {
namespace {

using backward::BackwardParams;

constexpr int kNumGradients = 4;
// The tensors of the backward that the copy engine or 16-byte accesses reach, besides the
// forward's.
void gradients_of(AttendBackwardProblem const& p, Operand (&operands)[kNumGradients]) {
  AttendProblem const& f = p.forward;
  std::int64_t const batch = f.cu_seqlens_k ? 1 : f.batch;
  auto const query = [&](char const* name, void const* data, std::int64_t stride_batch,
                         std::int64_t stride_head, std::int64_t stride_position) {
    return Operand{name,        data,         batch,       f.num_q_heads,
                   f.seq_len_q, stride_batch, stride_head, stride_position};
  };
  auto const key = [&](char const* name, void const* data, std::int64_t stride_batch,
                       std::int64_t stride_head, std::int64_t stride_position) {
    return Operand{name,        data,         batch,       f.num_kv_heads,
                   f.seq_len_k, stride_batch, stride_head, stride_position};
  };
  operands[0] =
      query("dout", p.dout, p.stride_dout_batch, p.stride_dout_head, p.stride_dout_position);
  operands[1] = query("dq", p.dq, p.stride_dq_batch, p.stride_dq_head, p.stride_dq_position);
  operands[2] = key("dk", p.dk, p.stride_dk_batch, p.stride_dk_head, p.stride_dk_position);
  operands[3] = key("dv", p.dv, p.stride_dv_batch, p.stride_dv_head, p.stride_dv_position);
}

bool has_gate_gradients(AttendBackwardProblem const& p) {
  return p.dscores && p.forward.gate != Gate::kNone;
}

std::int64_t num_slot_blocks(AttendProblem const& p) {
  return (slots_needed(p) + kTile - 1) / kTile;
}

// Key tiles of all sequences; packed: an upper bound, see first_key_tile.
std::int64_t num_key_tiles(AttendProblem const& p) {
  return p.cu_seqlens_k ? p.seq_len_k / kTile + p.batch
                        : p.batch * ((p.seq_len_k + kTile - 1) / kTile);
}

// Into how many parts the tiles of a head are cut, so that few heads keep every multiprocessor
// busy: a block runs alone on one, a few rounds of blocks even out, and a part pays for finding its
// keys and for the side buffer.
std::int64_t num_segments(AttendProblem const& p, int num_sms) {
  constexpr std::int64_t kRounds = 4, kMinTiles = 16;
  std::int64_t const blocks =
      p.batch * p.num_kv_heads * std::max<std::int64_t>(1, num_slot_blocks(p));
  std::int64_t const first = p.cu_seqlens_k ? 0 : (p.seq_len_k - p.seq_len_q) / kTile;
  std::int64_t const tiles = (p.seq_len_k + kTile - 1) / kTile - first;
  std::int64_t const wanted = (kRounds * num_sms + blocks - 1) / blocks;
  return std::clamp<std::int64_t>(std::min(wanted, tiles / kMinTiles), 1, 64);
}

// What the kernels leave for each other.
struct Buffers {
  std::int64_t* cost_prefix;
  float *row_data, *gate_partials, *inherited_rows, *inherited_scores;
  std::int32_t* inherited_keys;

  Buffers(AttendBackwardProblem const& p, int num_sms, Carver& carver) {
    AttendProblem const& f = p.forward;
    // Always: whether there are lengths is not known where only shapes are.
    cost_prefix = carver.take<std::int64_t>(f.batch + 1);
    std::int64_t const rows =
        (f.cu_seqlens_k ? 1 : f.batch) * f.num_q_heads * backward::row_array_stride(f.seq_len_q);
    row_data = carver.take<float>(rows * backward::all_row_arrays(mode_of(f)));
    std::int64_t const blocks = num_slot_blocks(f);
    gate_partials = carver.take<float>(f.num_kv_heads * num_key_tiles(f) * blocks * 8);
    std::int64_t const segments = num_segments(f, num_sms);
    std::int64_t const slots =
        segments > 1 ? f.batch * f.num_kv_heads * segments * blocks * kTile : 0;
    inherited_rows = carver.take<float>(slots * 2 * padded_dim(f));
    inherited_scores = carver.take<float>(slots);
    inherited_keys = carver.take<std::int32_t>(slots);
  }
};

BackwardParams make_params(AttendBackwardProblem const& p, Buffers const& buffers, int num_sms,
                           float* gate_gradient_sums) {
  AttendProblem const& f = p.forward;
  BackwardParams r{};
  static_cast<Params&>(r) = resident_params(f, sequences_differ(f) ? buffers.cost_prefix : nullptr);
  Operand gradients[kNumGradients];
  gradients_of(p, gradients);
  r.dout = tensor_map(f, gradients[0], 64);
  r.dk = tensor_map(f, gradients[2], 64);
  r.dv = tensor_map(f, gradients[3], 64);
  auto const set_rows = [](auto& rows, auto* data, std::int64_t& batch, std::int64_t& head,
                           std::int64_t& position, std::int64_t stride_batch,
                           std::int64_t stride_head, std::int64_t stride_position) {
    rows = static_cast<std::remove_reference_t<decltype(rows)>>(data);
    batch = 2 * stride_batch, head = 2 * stride_head, position = 2 * stride_position;
  };
  set_rows(r.q_rows, f.q, r.stride_q_batch, r.stride_q_head, r.stride_q_position, f.stride_q_batch,
           f.stride_q_head, f.stride_q_position);
  set_rows(r.dout_rows, p.dout, r.stride_dout_batch, r.stride_dout_head, r.stride_dout_position,
           p.stride_dout_batch, p.stride_dout_head, p.stride_dout_position);
  set_rows(r.dq_rows, p.dq, r.stride_dq_batch, r.stride_dq_head, r.stride_dq_position,
           p.stride_dq_batch, p.stride_dq_head, p.stride_dq_position);
  set_rows(r.dk_rows, p.dk, r.stride_dk_batch, r.stride_dk_head, r.stride_dk_position,
           p.stride_dk_batch, p.stride_dk_head, p.stride_dk_position);
  set_rows(r.dv_rows, p.dv, r.stride_dv_batch, r.stride_dv_head, r.stride_dv_position,
           p.stride_dv_batch, p.stride_dv_head, p.stride_dv_position);
  r.dscores = static_cast<float*>(p.dscores);
  r.stride_dscores_batch = p.stride_dscores_batch, r.stride_dscores_head = p.stride_dscores_head;
  r.stride_dscores_position = p.stride_dscores_position;
  r.gate_gradients = has_gate_gradients(p);
  r.gate_gradient_sums = gate_gradient_sums;

  Mode const mode = mode_of(f);
  int const arrays = backward::all_row_arrays(mode);
  r.row_data = buffers.row_data;
  r.stride_row_array = backward::row_array_stride(f.seq_len_q);
  r.stride_row_head = arrays * r.stride_row_array;
  r.stride_row_batch = f.num_q_heads * r.stride_row_head;
  r.gate_partials = buffers.gate_partials;
  r.num_key_tiles = static_cast<int>(num_key_tiles(f));
  r.num_chunks = static_cast<int>(f.num_chunks);
  r.num_segments = static_cast<int>(num_segments(f, num_sms));
  r.inherited_rows = buffers.inherited_rows, r.inherited_scores = buffers.inherited_scores;
  r.inherited_keys = buffers.inherited_keys;
  r.sm_scale = static_cast<float>(f.sm_scale);
  return r;
}

template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch(BackwardParams const& p, int num_sms, cudaStream_t stream) {
  backward::launch_queries<T, kDim, kMode, kValueGate>(p, num_sms, stream);
  backward::launch_keys<T, kDim, kMode, kValueGate>(p, num_sms, stream);
  if (p.num_segments > 1 && p.num_blocks > 0) backward::add_inherited<T>(p, kDim, stream);
}

template <typename T, int kDim>
void launch_mode(AttendProblem const& problem, BackwardParams const& p, int num_sms,
                 cudaStream_t stream) {
  if (mode_of(problem) == Mode::kAligned) {
    launch<T, kDim, Mode::kAligned, false>(p, num_sms, stream);
  } else if (problem.gate == Gate::kValue) {
    launch<T, kDim, Mode::kGeneral, true>(p, num_sms, stream);
  } else {
    launch<T, kDim, Mode::kGeneral, false>(p, num_sms, stream);
  }
}

template <typename T>
void launch_dim(AttendProblem const& problem, BackwardParams const& p, int num_sms,
                cudaStream_t stream) {
  if (padded_dim(problem) == 64) {
    launch_mode<T, 64>(problem, p, num_sms, stream);
  } else {
    launch_mode<T, 128>(problem, p, num_sms, stream);
  }
}

}  // namespace

bool attend_backward_supported(AttendBackwardProblem const& p, std::string* reason) {
  if (!fits_resident(p.forward, reason)) return false;
  Operand forward[4], gradients[kNumGradients];
  operands_of(p.forward, forward);
  gradients_of(p, gradients);
  std::string why;
  auto const addressable = [&](Operand const& operand) {
    if (!is_addressable(operand, &why)) return false;
    // The slot kernel multiplies positions with strides in 32 bits.
    if (operand.stride_position < (std::int64_t{1} << 30)) return true;
    why = std::string(operand.name) + ": needs less than 2^30 elements between positions";
    return false;
  };
  if (std::all_of(std::begin(forward), std::end(forward), addressable) &&
      std::all_of(std::begin(gradients), std::end(gradients), addressable)) {
    return true;
  }
  if (reason) *reason = why;
  return false;
}

std::size_t attend_backward_workspace(Context const& context, AttendBackwardProblem const& p) {
  Carver carver(nullptr);
  Buffers const buffers(p, properties_of(context.device).num_sms, carver);
  return carver.bytes();
}

void attend_backward(Context const& context, AttendBackwardProblem const& problem,
                     float* gate_gradient_sums) {
  cudaStream_t const stream = stream_of(context);
  int const num_sms = properties_of(context.device).num_sms;
  Workspace const workspace(context, attend_backward_workspace(context, problem));
  Carver carver(workspace.data());
  Buffers const buffers(problem, num_sms, carver);
  BackwardParams const p = make_params(problem, buffers, num_sms, gate_gradient_sums);
  if (p.cost_prefix) schedule_sequences(p, buffers.cost_prefix, stream);
  if (p.lengths) backward::clear_missing_rows(p, stream);
  if (problem.forward.dtype == DataType::kFloat16) {
    launch_dim<__half>(problem.forward, p, num_sms, stream);
  } else {
    launch_dim<__nv_bfloat16>(problem.forward, p, num_sms, stream);
  }
  if (p.gate_gradients) backward::sum_gate_gradients(p, mode_of(problem.forward), stream);
}

}  // namespace sparsek::cuda::sm90
