// The resident kernels' host side: what it serves, and the choice of instantiation.
#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/runtime.hpp"
#include "cuda/sm90/attend/attend.hpp"
#include "cuda/sm90/attend/launch.hpp"
#include "cuda/sm90/attend/residency.hpp"

namespace sparsek::cuda::sm90 {
namespace {

// Rows of queries that do not exist (positions >= lengths[b]): output 0, lse -inf. A warp per row;
// blocks along y share the heads.
constexpr int kFillWarps = 8;
__global__ void __launch_bounds__(32 * kFillWarps)
    fill_missing_rows(__grid_constant__ Params const p) {
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int const heads = p.num_kv_heads * p.group;
  for (std::int64_t item = blockIdx.y; item < static_cast<std::int64_t>(p.batch) * heads;
       item += gridDim.y) {
    int const b = static_cast<int>(item / heads), head = static_cast<int>(item % heads);
    int const valid = min(max(p.lengths[b], 0), p.seq_len_k);
    int const first = max(0, valid - (p.seq_len_k - p.seq_len_q));
    for (int row = first + blockIdx.x * kFillWarps + warp; row < p.seq_len_q;
         row += gridDim.x * kFillWarps) {
      char* const out = p.out_rows + b * p.stride_out_batch + head * p.stride_out_head +
                        row * p.stride_out_position;
      for (int chunk = lane; chunk < p.head_dim / 8; chunk += 32) {
        reinterpret_cast<int4*>(out)[chunk] = make_int4(0, 0, 0, 0);
      }
      if (p.lse && lane == 0) {
        p.lse[b * p.stride_lse_batch + head * p.stride_lse_head + row * p.stride_lse_position] =
            -INFINITY;
      }
    }
  }
}

template <typename T, int kDim>
void launch_mode(AttendProblem const& problem, Params const& p, int num_sms, cudaStream_t stream) {
  if (mode_of(problem) == Mode::kAligned) {
    launch<T, kDim, Mode::kAligned, false>(p, num_sms, stream);
  } else if (problem.gate == Gate::kValue) {
    launch<T, kDim, Mode::kGeneral, true>(p, num_sms, stream);
  } else {
    launch<T, kDim, Mode::kGeneral, false>(p, num_sms, stream);
  }
}

template <typename T>
void launch_dim(AttendProblem const& problem, Params const& p, int num_sms, cudaStream_t stream) {
  if (padded_dim(problem) == 64) {
    launch_mode<T, 64>(problem, p, num_sms, stream);
  } else {
    launch_mode<T, 128>(problem, p, num_sms, stream);
  }
}

}  // namespace

bool attend_supported(AttendProblem const& p, std::string* reason) {
  auto const no = [&](std::string const& why) {
    if (reason) *reason = why;
    return false;
  };
  if (!fits_resident(p, reason)) return false;
  Operand operands[4];
  operands_of(p, operands);
  for (Operand const& operand : operands) {
    std::string why;
    if (!is_addressable(operand, &why)) return no(why);
  }
  return true;
}

std::size_t attend_workspace(Context const&, AttendProblem const& p) {
  // Always: whether there are lengths is not known where only shapes are.
  Carver carver(nullptr);
  carver.take<std::int64_t>(p.batch + 1);
  return carver.bytes();
}

void attend(Context const& context, AttendProblem const& problem) {
  cudaStream_t const stream = stream_of(context);
  Workspace const workspace(context, attend_workspace(context, problem));
  Carver carver(workspace.data());
  auto* const prefix =
      sequences_differ(problem) ? carver.take<std::int64_t>(problem.batch + 1) : nullptr;
  Params const p = resident_params(problem, prefix);
  if (prefix) {
    schedule_sequences(p, prefix, stream);
  }
  if (problem.lengths) {
    auto const blocks = [](std::int64_t wanted, std::int64_t most) {
      return static_cast<unsigned>(std::min(wanted, most));
    };
    dim3 const grid(blocks((problem.seq_len_q + kFillWarps - 1) / kFillWarps, 64),
                    blocks(problem.batch * problem.num_q_heads, 65535));
    fill_missing_rows<<<grid, 32 * kFillWarps, 0, stream>>>(p);
    check_launch("fill_missing_rows");
  }
  int const num_sms = properties_of(context.device).num_sms;
  if (problem.dtype == DataType::kFloat16) {
    launch_dim<__half>(problem, p, num_sms, stream);
  } else {
    launch_dim<__nv_bfloat16>(problem, p, num_sms, stream);
  }
}

}  // namespace sparsek::cuda::sm90
