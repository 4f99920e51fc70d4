// What the resident kernels share on the host: which problems fit, tensor maps, parameters, and the
// schedule of sequences that differ.
#include "cuda/sm90/attend/residency.hpp"

#include <cudaTypedefs.h>

#include <algorithm>

#include "cuda/runtime.hpp"
#include "cuda/sm90/attend/schedule.cuh"
#include "sparsek/error.hpp"

namespace sparsek::cuda::sm90 {
namespace {

bool divides_tile(AttendProblem const& p) { return kTile % p.chunk_size == 0; }
bool is_multiple_of_tile(AttendProblem const& p) { return p.chunk_size % kTile == 0; }

// How many keys older than the window tile can still be in the window of a tile's first query. That
// query lies at most this far behind the start of its chunk: 0 where chunks start with tiles, a
// whole number of tiles where tiles start with chunks, else anything.
std::int64_t window_keys_in_slots(AttendProblem const& p) {
  if (is_foreign(p)) return 0;  // max_keys_per_tile counts them
  std::int64_t const behind = divides_tile(p)          ? 0
                              : is_multiple_of_tile(p) ? p.chunk_size - kTile
                                                       : p.chunk_size - 1;
  return std::max<std::int64_t>(0, behind + p.window - kTile);
}

int max_slots(AttendProblem const& p) { return padded_dim(p) == 64 ? 512 : 256; }

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static PFN_cuTensorMapEncodeTiled_v12000 const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw DeviceError("cuTensorMapEncodeTiled: the driver does not have it");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

// Prefix sums of the sequences' costs, one block.
constexpr int kScheduleThreads = 256;
__global__ void __launch_bounds__(kScheduleThreads)
    sum_costs(__grid_constant__ Params const p, std::int64_t* prefix) {
  __shared__ std::int64_t sums[kScheduleThreads];
  int const tid = threadIdx.x, share = (p.batch + kScheduleThreads - 1) / kScheduleThreads;
  int const begin = min(tid * share, p.batch), end = min(begin + share, p.batch);
  std::int64_t const heads = static_cast<std::int64_t>(p.num_kv_heads) * p.group;
  std::int64_t sum = 0;
  for (int b = begin; b < end; ++b) sum += sequence_tiles(p, b).cost(p.num_blocks) * heads;
  sums[tid] = sum;
  __syncthreads();
  for (int step = 1; step < kScheduleThreads; step *= 2) {
    std::int64_t const other = tid >= step ? sums[tid - step] : 0;
    __syncthreads();
    sums[tid] += other;
    __syncthreads();
  }
  std::int64_t at = sums[tid] - sum;
  for (int b = begin; b < end; ++b) {
    prefix[b] = at;
    at += sequence_tiles(p, b).cost(p.num_blocks) * heads;
  }
  if (tid == kScheduleThreads - 1) prefix[p.batch] = sums[tid];
}

}  // namespace

bool is_foreign(AttendProblem const& p) { return p.num_selected < 0; }
bool sequences_differ(AttendProblem const& p) { return p.lengths || p.cu_seqlens_k; }

Mode mode_of(AttendProblem const& p) {
  bool const aligned = !is_foreign(p) && is_multiple_of_tile(p) && p.window >= kTile;
  return aligned && p.gate != Gate::kValue ? Mode::kAligned : Mode::kGeneral;
}

std::int64_t slots_needed(AttendProblem const& p) {
  std::int64_t const keys =
      is_foreign(p) ? p.max_keys_per_tile : p.num_selected + window_keys_in_slots(p);
  std::int64_t const tiles = (p.seq_len_k + kTile - 1) / kTile;
  return std::min(keys, std::max<std::int64_t>(0, tiles - 2) * kTile);
}

int padded_dim(AttendProblem const& p) { return p.head_dim <= 64 ? 64 : 128; }

void operands_of(AttendProblem const& p, Operand (&operands)[4]) {
  std::int64_t const batch = p.cu_seqlens_k ? 1 : p.batch;
  operands[0] = {"q",
                 p.q,
                 batch,
                 p.num_q_heads,
                 p.seq_len_q,
                 p.stride_q_batch,
                 p.stride_q_head,
                 p.stride_q_position};
  operands[1] = {"k",
                 p.k,
                 batch,
                 p.num_kv_heads,
                 p.seq_len_k,
                 p.stride_k_batch,
                 p.stride_k_head,
                 p.stride_k_position};
  operands[2] = {"v",
                 p.v,
                 batch,
                 p.num_kv_heads,
                 p.seq_len_k,
                 p.stride_v_batch,
                 p.stride_v_head,
                 p.stride_v_position};
  operands[3] = {"out",
                 p.out,
                 batch,
                 p.num_q_heads,
                 p.seq_len_q,
                 p.stride_out_batch,
                 p.stride_out_head,
                 p.stride_out_position};
}

bool is_addressable(Operand const& t, std::string* why) {
  auto const step_is_good = [&](std::int64_t size, std::int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < (std::int64_t{1} << 38));
  };
  if (reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && step_is_good(t.batch, t.stride_batch) &&
      step_is_good(t.heads, t.stride_head) && step_is_good(t.positions, t.stride_position)) {
    return true;
  }
  *why = std::string(t.name) +
         ": needs a 16-byte aligned pointer and positive strides of 16 bytes' multiples";
  return false;
}

CUtensorMap tensor_map(AttendProblem const& p, Operand const& t, int rows) {
  auto const bytes = [](std::int64_t size, std::int64_t stride) {
    return static_cast<cuuint64_t>(size <= 1 ? 16 : 2 * stride);  // a stride that is never taken
  };
  cuuint64_t const sizes[4] = {static_cast<cuuint64_t>(p.head_dim),
                               static_cast<cuuint64_t>(t.positions),
                               static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)};
  cuuint64_t const strides[3] = {bytes(t.positions, t.stride_position),
                                 bytes(t.heads, t.stride_head), bytes(t.batch, t.stride_batch)};
  cuuint32_t const box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  auto const type = p.dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  CUresult const result =
      tensor_map_encoder()(&map, type, 4, const_cast<void*>(t.data), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw DeviceError("cuTensorMapEncodeTiled: error " + std::to_string(result) + " for " + t.name);
  }
  return map;
}

Params resident_params(AttendProblem const& p, std::int64_t const* cost_prefix) {
  Operand operands[4];
  operands_of(p, operands);
  Params r{};
  r.q = tensor_map(p, operands[0], 64);
  r.k = tensor_map(p, operands[1], kTile);
  r.v = tensor_map(p, operands[2], kTile);
  r.out = tensor_map(p, operands[3], 64);
  r.k_rows = static_cast<char const*>(p.k), r.v_rows = static_cast<char const*>(p.v);
  r.out_rows = static_cast<char*>(p.out);
  r.stride_k_batch = 2 * p.stride_k_batch, r.stride_k_head = 2 * p.stride_k_head;
  r.stride_k_position = 2 * p.stride_k_position;
  r.stride_v_batch = 2 * p.stride_v_batch, r.stride_v_head = 2 * p.stride_v_head;
  r.stride_v_position = 2 * p.stride_v_position;
  r.stride_out_batch = 2 * p.stride_out_batch, r.stride_out_head = 2 * p.stride_out_head;
  r.stride_out_position = 2 * p.stride_out_position;
  r.scores = static_cast<float const*>(p.scores);
  r.stride_scores_batch = p.stride_scores_batch, r.stride_scores_head = p.stride_scores_head;
  r.stride_scores_position = p.stride_scores_position;
  r.expiry = p.expiry;
  r.threshold = static_cast<float const*>(p.threshold);
  r.stride_expiry_batch = p.stride_expiry_batch, r.stride_expiry_head = p.stride_expiry_head;
  r.stride_chunk_batch = p.stride_chunk_batch, r.stride_chunk_head = p.stride_chunk_head;
  r.lse = static_cast<float*>(p.lse);
  r.stride_lse_batch = p.stride_lse_batch, r.stride_lse_head = p.stride_lse_head;
  r.stride_lse_position = p.stride_lse_position;
  r.lengths = p.lengths, r.cu_seqlens_q = p.cu_seqlens_q, r.cu_seqlens_k = p.cu_seqlens_k;
  r.cost_prefix = cost_prefix;
  r.batch = static_cast<int>(p.batch), r.num_kv_heads = static_cast<int>(p.num_kv_heads);
  r.group = static_cast<int>(p.group);
  r.seq_len_q = static_cast<int>(p.seq_len_q), r.seq_len_k = static_cast<int>(p.seq_len_k);
  r.head_dim = static_cast<int>(p.head_dim);
  r.chunk_size = static_cast<int>(p.chunk_size), r.window = static_cast<int>(p.window);
  r.chunks = device::Divisor(r.chunk_size);
  r.num_blocks = static_cast<int>((slots_needed(p) + kTile - 1) / kTile);
  r.gated = p.gate != Gate::kNone;
  r.diagonal_plain = !is_foreign(p) && p.window >= kTile - 1;
  r.scale_log2 = static_cast<float>(p.sm_scale * 1.4426950408889634);
  return r;
}

bool fits_resident(AttendProblem const& p, std::string* reason) {
  auto const no = [&](std::string const& why) {
    if (reason) *reason = why;
    return false;
  };
  if (p.dtype != DataType::kFloat16 && p.dtype != DataType::kBFloat16) {
    return no("serves float16 and bfloat16");
  }
  if (p.head_dim < 8 || p.head_dim > 128 || p.head_dim % 8 != 0) {
    return no("serves multiples of 8 up to 128 as head_dim");
  }
  if (!(p.sm_scale > 0.0)) return no("needs a positive sm_scale");
  if (is_foreign(p) && p.max_keys_per_tile < 0) {
    return no("a foreign selection needs max_keys_per_tile");
  }
  if (slots_needed(p) > max_slots(p)) {
    return no("holds " + std::to_string(max_slots(p)) + " keys besides the last two tiles, needs " +
              std::to_string(slots_needed(p)));
  }
  if (mode_of(p) == Mode::kGeneral && p.gate != Gate::kNone && window_keys_in_slots(p) > 0 &&
      slots_needed(p) > 0) {
    return no(
        "gates of a window that reaches beyond the last two tiles need a chunk_size that is a "
        "multiple of 128, a window of at least "
        "128 and a gate other than value");
  }
  return true;
}

void schedule_sequences(Params const& p, std::int64_t* prefix, cudaStream_t stream) {
  sum_costs<<<1, kScheduleThreads, 0, stream>>>(p, prefix);
  check_launch("sum_costs");
}

}  // namespace sparsek::cuda::sm90
