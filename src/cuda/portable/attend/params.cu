// From a validated problem to what the kernels are given.
#include "cuda/portable/attend/params.cuh"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace sparsek::cuda::portable {
namespace {

// Larger strides between positions, in elements, do not fit the 32 bits that the fast loads have
// for them in bytes.
constexpr std::int64_t kMaxFastStride = (std::int64_t{1} << 31) - 1;

// Most pool keys that a tile lists, -1 if unknown.
std::int64_t list_bound(AttendProblem const& a) {
  std::int64_t const bound = a.num_selected >= 0 ? a.num_selected : a.max_keys_per_tile;
  return bound < 0 ? -1 : std::min(bound, a.seq_len_k);
}

// Whether every row begins at a multiple of 16 bytes.
bool aligned(void const* data, std::array<std::int64_t, 3> const& strides) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 &&
         std::all_of(strides.begin(), strides.end(), [](auto s) { return s % 8 == 0; });
}

}  // namespace

std::int64_t count_tiles(AttendProblem const& a) {
  if (a.cu_seqlens_q) return a.seq_len_q / kQueryTile + 2 * a.batch;
  return a.batch * portable::count_tiles(static_cast<int>(a.seq_len_k - a.seq_len_q),
                                         static_cast<int>(a.seq_len_k));
}

KeySource choose_source(AttendProblem const& a) {
  std::int64_t const bound = list_bound(a);
  return bound < 0 || 2 * bound >= a.seq_len_k ? KeySource::kWalk : KeySource::kLists;
}

void lay_out_workspace(AttendProblem const& a, Carver& carver, AttendParams& p) {
  bool const packed = a.cu_seqlens_q != nullptr;
  bool const listed = choose_source(a) == KeySource::kLists;
  std::int64_t const tiles = count_tiles(a), tile_rows = tiles * a.num_kv_heads;
  auto const take = [&](std::int64_t count) {
    return carver.take<std::int32_t>(static_cast<std::size_t>(count));
  };
  p.tile_sequence = take(packed ? tiles : 0);
  p.first_tile = take(packed ? a.batch + 1 : 0);
  p.group_expiry = take(groups_per_row(a.seq_len_k, packed, a.batch) * a.num_kv_heads);
  p.list_count = take(listed ? tile_rows : 0);
  p.lists = take(listed ? tile_rows * list_bound(a) : 0);
}

std::size_t workspace_bytes(AttendProblem const& a) {
  AttendParams unused{};
  Carver carver(nullptr);
  lay_out_workspace(a, carver, unused);
  return carver.bytes();
}

AttendParams make_params(AttendProblem const& a) {
  auto const narrow = [](std::int64_t x) { return static_cast<std::int32_t>(x); };
  AttendParams p{};
  p.batch = narrow(a.batch);
  p.num_kv_heads = narrow(a.num_kv_heads);
  p.group = narrow(a.group);
  p.seq_len_q = narrow(a.seq_len_q);
  p.seq_len_k = narrow(a.seq_len_k);
  p.head_dim = narrow(a.head_dim);
  p.window = narrow(std::min(a.window, a.seq_len_k));
  p.chunk_size =
      narrow(std::clamp<std::int64_t>(a.chunk_size, 1, std::max<std::int64_t>(a.seq_len_k, 1)));
  p.foreign = a.num_selected < 0;
  p.value_gate = a.gate == Gate::kValue;

  p.aligned_loads =
      a.head_dim % 8 == 0 &&
      aligned(a.q, {a.stride_q_batch, a.stride_q_head, a.stride_q_position}) &&
      aligned(a.k, {a.stride_k_batch, a.stride_k_head, a.stride_k_position}) &&
      aligned(a.v, {a.stride_v_batch, a.stride_v_head, a.stride_v_position}) &&
      std::max({a.stride_q_position, a.stride_k_position, a.stride_v_position}) <= kMaxFastStride &&
      std::min({a.stride_q_position, a.stride_k_position, a.stride_v_position}) >= 0;
  p.aligned_stores = a.head_dim % 8 == 0 &&
                     aligned(a.out, {a.stride_out_batch, a.stride_out_head, a.stride_out_position});
  double const magnitude = a.sm_scale == 0 ? 1 : std::abs(a.sm_scale);
  p.scale_log2 = static_cast<float>(magnitude * 1.4426950408889634);
  p.q_and = a.sm_scale == 0 ? 0u : ~0u;
  p.q_xor = a.sm_scale < 0 ? 0x80008000u : 0u;

  p.q = a.q, p.k = a.k, p.v = a.v, p.out = a.out, p.lse = static_cast<float*>(a.lse);
  p.stride_q_batch = a.stride_q_batch, p.stride_q_head = a.stride_q_head;
  p.stride_q_position = a.stride_q_position;
  p.stride_k_batch = a.stride_k_batch, p.stride_k_head = a.stride_k_head;
  p.stride_k_position = a.stride_k_position;
  p.stride_v_batch = a.stride_v_batch, p.stride_v_head = a.stride_v_head;
  p.stride_v_position = a.stride_v_position;
  p.stride_out_batch = a.stride_out_batch, p.stride_out_head = a.stride_out_head;
  p.stride_out_position = a.stride_out_position;
  p.stride_lse_batch = a.stride_lse_batch, p.stride_lse_head = a.stride_lse_head;
  p.stride_lse_position = a.stride_lse_position;

  if (a.gate != Gate::kNone && a.scores && a.threshold) {
    p.scores = static_cast<float const*>(a.scores);
    p.threshold = static_cast<float const*>(a.threshold);
  }
  p.expiry = a.expiry;
  p.stride_scores_batch = a.stride_scores_batch, p.stride_scores_head = a.stride_scores_head;
  p.stride_scores_position = a.stride_scores_position;
  p.stride_expiry_batch = a.stride_expiry_batch, p.stride_expiry_head = a.stride_expiry_head;
  p.stride_chunk_batch = a.stride_chunk_batch, p.stride_chunk_head = a.stride_chunk_head;
  p.lengths = a.lengths, p.cu_seqlens_q = a.cu_seqlens_q, p.cu_seqlens_k = a.cu_seqlens_k;

  p.source = choose_source(a);
  p.num_tiles = narrow(count_tiles(a));
  p.tiles_per_sequence =
      narrow(a.cu_seqlens_q ? 0 : count_tiles(a) / std::max<std::int64_t>(a.batch, 1));
  p.list_capacity = narrow(std::max<std::int64_t>(list_bound(a), 0));
  return p;
}

}  // namespace sparsek::cuda::portable
