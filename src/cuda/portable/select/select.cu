#include "cuda/portable/select/select.hpp"

#include <algorithm>

#include "cuda/portable/select/geometry.cuh"
#include "cuda/portable/select/plan.hpp"
#include "cuda/runtime.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr std::int64_t kMinSegment =
    4096;  // keys: shorter segments cost more at their start than they save
constexpr int kShortRoundKeys = 2048;  // of a round, at most, where chunks are short
constexpr int kUngrouped = 8;          // so few segments of a row are read one by one
constexpr std::size_t kMaxStartBytes = std::size_t{512} << 20;
constexpr int kCondenseBytes = 2048;          // of shared memory, for what is not keys
constexpr std::size_t kReservedBytes = 1024;  // of shared memory, by the system for each block
constexpr std::size_t kKeyBytes = sizeof(float) + sizeof(int);

}  // namespace

SelectPlan plan_select(SelectProblem const& p, DeviceProperties const& device) {
  SelectPlan plan{};
  plan.rows = static_cast<int>(p.batch * p.num_kv_heads);
  bool const packed = p.cu_seqlens_k != nullptr;
  plan.num_keys = (packed ? 1 : p.batch) * p.num_kv_heads * p.seq_len;
  plan.num_chunks = (packed ? 1 : p.batch) * p.num_kv_heads * p.num_chunks;

  // Rows enough for every multiprocessor: one narrow block each, several side by side. Else wide
  // blocks, and several of them on a row where it is long enough.
  plan.num_segments = static_cast<int>(std::clamp<std::int64_t>(
      p.seq_len / kMinSegment, 1, std::max(1, device.num_sms / std::max(1, plan.rows))));
  plan.num_warps = plan.rows >= 2 * device.num_sms ? kNarrowWarps : kWideWarps;
  plan.group_size = 1;
  while (plan.group_size * plan.group_size < plan.num_segments) ++plan.group_size;
  if (plan.num_segments <= kUngrouped) plan.group_size = plan.num_segments;
  plan.num_groups = ceil_div(plan.num_segments, plan.group_size);

  int const span = Marks::span(p.chunk_size);
  plan.short_chunks = Marks(p.chunk_size, 0, 1).chunks_per_mark > 1;
  auto const fits = [&] {
    int const keys = round_keys(plan.num_warps);
    // NOTE: short chunks are walked past each key of the round that is still to come.
    int const looked_at = plan.short_chunks ? std::min(keys, kShortRoundKeys) : keys;
    plan.round_marks = std::clamp(looked_at / span, 1, max_round_marks(plan.num_warps));
    // The candidates and a round's keys.
    std::int64_t const candidates = std::min(p.num_candidates, p.seq_len);
    plan.list_capacity = std::max(static_cast<int>(std::min(p.seq_len, candidates + keys)), keys);
    plan.shared_list = true;
    return states_shared_bytes(plan) <= static_cast<std::size_t>(device.shared_bytes_per_block);
  };
  if (plan.num_warps == kNarrowWarps && fits() &&
      side_by_side(kNarrowWarps) * (states_shared_bytes(plan) + kReservedBytes) >
          static_cast<std::size_t>(device.shared_bytes_per_sm)) {
    plan.num_warps = kMiddleWarps;
  }
  if (!fits()) {  // the kernels for lists in global memory have wide blocks
    plan.num_warps = kWideWarps;
    plan.shared_list = fits();
  }

  plan.start_capacity = static_cast<int>(std::min(
      p.seq_len, (plan.group_size + plan.num_groups) * std::min(p.num_candidates, p.seq_len)));
  if (static_cast<std::size_t>(plan.rows) * plan.num_segments * plan.start_capacity * kKeyBytes >
      kMaxStartBytes) {
    plan.num_segments = plan.group_size = plan.num_groups = 1;
  }
  plan.condense_room =
      static_cast<int>((device.shared_bytes_per_block - kCondenseBytes) / kKeyBytes);
  std::int64_t const segment_keys =
      p.seq_len / plan.num_segments + 2 * std::max(p.chunk_size, std::int64_t{kMaxMarkSpan});
  plan.condense_room =
      static_cast<int>(std::min<std::int64_t>(plan.condense_room, (segment_keys + 3) / 4 * 4));
  return plan;
}

SelectWorkspace lay_out(SelectPlan const& plan, std::byte* base) {
  Carver carver(base);
  SelectWorkspace w{};
  std::size_t const blocks = static_cast<std::size_t>(plan.rows) * plan.num_segments;
  if (!plan.shared_list) {
    w.list = carver.take<RankedKey>(blocks * padded(plan.list_capacity));
    w.spare = carver.take<RankedKey>(blocks * padded(plan.list_capacity));
  }
  if (plan.num_segments > 1) {
    w.segment_score = carver.take<float>(plan.num_keys);
    w.segment_position = carver.take<int>(plan.num_keys);
    w.group_score = carver.take<float>(plan.num_keys);
    w.group_position = carver.take<int>(plan.num_keys);
    w.start_score = carver.take<float>(blocks * plan.start_capacity);
    w.start_position = carver.take<int>(blocks * plan.start_capacity);
    w.segment_count = carver.take<int>(blocks);
    w.group_count = carver.take<int>(static_cast<std::size_t>(plan.rows) * plan.num_groups);
  }
  w.bytes = carver.bytes();
  return w;
}

std::size_t select_workspace(Context const& context, SelectProblem const& p) {
  return lay_out(plan_select(p, properties_of(context.device)), nullptr).bytes;
}

void select(Context const& context, SelectProblem const& p) {
  SelectPlan const plan = plan_select(p, properties_of(context.device));
  Workspace const memory(context, lay_out(plan, nullptr).bytes);
  SelectWorkspace const workspace = lay_out(plan, memory.data());
  launch_states(p, plan, workspace, stream_of(context));
}

}  // namespace sparsek::cuda::portable
