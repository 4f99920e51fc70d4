// Portable attend_backward, host side: what is served, the workspace, the launches.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "cuda/portable/attend/attend.hpp"
#include "cuda/portable/attend/params.cuh"
#include "cuda/portable/attend/tile_lists.cuh"
#include "cuda/portable/attend_backward/attend_backward.hpp"
#include "cuda/portable/attend_backward/launch.cuh"
#include "cuda/portable/attend_backward/slots.cuh"
#include "cuda/runtime.hpp"
#include "sparsek/error.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr std::int64_t kSlotsPerBlock = 64;
// Tiles are cut into pieces so that this many blocks of slots have work, if there are as many
// tiles: four for each of two places on 132 processors.
constexpr std::int64_t kTargetSlotBlocks = 1024;
// But not shorter than this: a piece loads all its keys anew and carries their sums.
constexpr std::int64_t kMinPiece = 8;

bool has_queries(AttendProblem const& a) {
  return a.batch > 0 && a.seq_len_q > 0 && a.num_q_heads > 0;
}

std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Sizes of slots and pieces.
void plan_slots(AttendProblem const& a, BackwardParams& p) {
  if (p.a.source != KeySource::kLists || p.a.list_capacity == 0) return;
  p.num_slots = static_cast<std::int32_t>(round_up(p.a.list_capacity, kSlotsPerBlock));
  std::int64_t const blocks = a.num_kv_heads * (p.num_slots / kSlotsPerBlock);
  std::int64_t const runs = a.cu_seqlens_q ? 1 : a.batch;  // of tiles, to be cut
  std::int64_t const tiles = a.cu_seqlens_q ? p.a.num_tiles : p.a.tiles_per_sequence;
  std::int64_t const wanted = (kTargetSlotBlocks + blocks * runs - 1) / (blocks * runs);
  std::int64_t const pieces =
      std::clamp<std::int64_t>(wanted, 1, (tiles + kMinPiece - 1) / kMinPiece);
  std::int64_t const tiles_per_piece = (tiles + pieces - 1) / pieces;
  p.tiles_per_piece = static_cast<std::int32_t>(tiles_per_piece);
  p.pieces_per_sequence =
      static_cast<std::int32_t>((tiles + tiles_per_piece - 1) / tiles_per_piece);
  p.num_pieces = static_cast<std::int32_t>(runs * p.pieces_per_sequence);
}

// Points the parameters at the workspace's parts, or only measures them.
void lay_out(AttendBackwardProblem const& b, bool with_sums, Carver& carver, BackwardParams& p) {
  AttendProblem const& a = b.forward;
  auto const floats = [&](std::int64_t count) {
    return carver.take<float>(static_cast<std::size_t>(count));
  };
  std::int64_t const rows = (a.cu_seqlens_q ? 1 : a.batch) * a.num_q_heads * a.seq_len_q;
  p.lse2 = floats(rows);
  p.delta = floats(rows);
  float* const gate_gradient = floats(with_sums ? rows : 0);
  p.gate_gradient = with_sums ? gate_gradient : nullptr;
  lay_out_workspace(a, carver, p.a);
  if (p.num_slots == 0) return;
  std::int64_t const slots = a.num_kv_heads * p.num_slots;
  p.slot_keys = carver.take<std::int32_t>(static_cast<std::size_t>(slots * p.a.num_tiles));
  bool const carries = a.cu_seqlens_q != nullptr || p.pieces_per_sequence > 1;
  std::int64_t const carried = carries ? slots * p.num_pieces : 0;
  p.carried_dk = floats(carried * a.head_dim);
  p.carried_dv = floats(carried * a.head_dim);
  p.carried_dscores = floats(carried);
}

// Whether every row begins at a multiple of 16 bytes.
bool aligned(void const* data, std::array<std::int64_t, 3> const& strides) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 &&
         std::all_of(strides.begin(), strides.end(), [](auto s) { return s % 8 == 0; });
}

BackwardParams make_backward_params(AttendBackwardProblem const& b, float* gate_gradient_sums) {
  // Larger strides between positions do not fit the 32 bits that fast loads have for them.
  constexpr std::int64_t kMaxFastStride = (std::int64_t{1} << 31) - 1;
  AttendProblem const& a = b.forward;
  BackwardParams p{};
  p.a = make_params(a);
  p.sm_scale = static_cast<float>(a.sm_scale);
  p.scale_log2 = static_cast<float>(a.sm_scale * 1.4426950408889634);
  p.a.aligned_loads =
      p.a.aligned_loads &&
      aligned(b.dout, {b.stride_dout_batch, b.stride_dout_head, b.stride_dout_position}) &&
      b.stride_dout_position >= 0 && b.stride_dout_position <= kMaxFastStride;
  p.aligned_out = a.head_dim % 8 == 0 &&
                  aligned(a.out, {a.stride_out_batch, a.stride_out_head, a.stride_out_position});
  p.aligned_gradients =
      a.head_dim % 8 == 0 &&
      aligned(b.dq, {b.stride_dq_batch, b.stride_dq_head, b.stride_dq_position}) &&
      aligned(b.dk, {b.stride_dk_batch, b.stride_dk_head, b.stride_dk_position}) &&
      aligned(b.dv, {b.stride_dv_batch, b.stride_dv_head, b.stride_dv_position});
  p.dout = b.dout, p.dq = b.dq, p.dk = b.dk, p.dv = b.dv;
  p.stride_dout_batch = b.stride_dout_batch, p.stride_dout_head = b.stride_dout_head;
  p.stride_dout_position = b.stride_dout_position;
  p.stride_dq_batch = b.stride_dq_batch, p.stride_dq_head = b.stride_dq_head;
  p.stride_dq_position = b.stride_dq_position;
  p.stride_dk_batch = b.stride_dk_batch, p.stride_dk_head = b.stride_dk_head;
  p.stride_dk_position = b.stride_dk_position;
  p.stride_dv_batch = b.stride_dv_batch, p.stride_dv_head = b.stride_dv_head;
  p.stride_dv_position = b.stride_dv_position;
  p.dscores = static_cast<float*>(b.dscores);
  p.stride_dscores_batch = b.stride_dscores_batch, p.stride_dscores_head = b.stride_dscores_head;
  p.stride_dscores_position = b.stride_dscores_position;
  p.gate_gradient_sums = gate_gradient_sums;
  if (has_queries(a)) plan_slots(a, p);
  return p;
}

template <typename T, int kHeadDim>
void launch(BackwardParams const& p, bool has_queries, cudaStream_t stream) {
  using Kernels = BackwardKernels<T, kHeadDim>;
  if (has_queries) {
    check(Kernels::queries(p, stream), "portable attend_backward: dq");
    if (p.num_slots > 0) {
      assign_slots(p, stream);
      check_launch("portable attend_backward: slots");
      check(Kernels::slots(p, stream), "portable attend_backward: dk and dv of listed keys");
    }
    if (p.gate_gradient) {
      sum_gate_gradients(p, stream);
      check_launch("portable attend_backward: sums over chunks");
    }
  }
  check(Kernels::window(p, stream), "portable attend_backward: dk and dv");
}

template <typename T>
void launch(BackwardParams const& p, bool has_queries, cudaStream_t stream) {
  if (p.a.head_dim <= 64) return launch<T, 64>(p, has_queries, stream);
  if (p.a.head_dim <= 128) return launch<T, 128>(p, has_queries, stream);
  launch<T, 256>(p, has_queries, stream);
}

}  // namespace

bool attend_backward_supported(AttendBackwardProblem const& problem, std::string* reason) {
  return attend_supported(problem.forward, reason);
}

std::size_t attend_backward_workspace(Context const&, AttendBackwardProblem const& problem) {
  if (!has_queries(problem.forward)) return 0;
  BackwardParams params = make_backward_params(problem, nullptr);
  Carver carver(nullptr);
  lay_out(problem, problem.dscores != nullptr && problem.forward.gate != Gate::kNone, carver,
          params);
  return carver.bytes();
}

void attend_backward(Context const& context, AttendBackwardProblem const& problem,
                     float* gate_gradient_sums) {
  std::string reason;
  if (!attend_backward_supported(problem, &reason)) throw Unsupported(reason);
  AttendProblem const& a = problem.forward;
  if (a.batch == 0 || a.num_kv_heads == 0 || a.seq_len_k == 0) return;
  BackwardParams params = make_backward_params(problem, gate_gradient_sums);
  bool const any_queries = has_queries(a);
  if (!any_queries) params.a.num_tiles = 0;
  Workspace const workspace(context, attend_backward_workspace(context, problem));
  cudaStream_t const stream = stream_of(context);
  if (any_queries) {
    Carver carver(workspace.data());
    lay_out(problem, gate_gradient_sums != nullptr, carver, params);
    prepare_tiles(params.a, stream);
    check_launch("portable attend_backward: preparing the tiles");
  }
  if (a.dtype == DataType::kFloat16) {
    launch<__half>(params, any_queries, stream);
  } else {
    launch<__nv_bfloat16>(params, any_queries, stream);
  }
}

}  // namespace sparsek::cuda::portable
