// attend on the CPU: splits (sequence, KV head) rows into runs of query tiles, keeps the list of
// keys that a tile sees, and hands tiles to the kernels of the instruction set (kernels.hpp).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/aligned.hpp"
#include "cpu/kernels.hpp"
#include "cpu/sequence.hpp"
#include "cpu/thread_pool.hpp"
#include "problem.hpp"

namespace sparsek::cpu {
namespace {

// Positions of one tile: as many as keep most of a list visible to the whole tile, and few enough
// that each of its keys is used by many rows once it is loaded. Tiles are aligned to multiples of
// it, so chunks of 128 have one threshold per tile.
constexpr std::int64_t kTilePositions = 128;
// Rows (positions x query heads) handed to the kernels at once; bounds a thread's workspace.
constexpr std::int64_t kMaxTileRows = 512;
// Tasks per thread, for balance between threads of uneven speed.
constexpr std::int64_t kTasksPerThread = 8;

// A run of consecutive tiles of one (sequence, KV head).
struct Task {
  std::int64_t batch, kv_head;
  std::int64_t first_tile, end_tile;
};

// Memory of one thread.
class Worker {
 public:
  Worker(AttendProblem const& p, KernelTable const& table)
      : p_(p),
        table_(table),
        heads_per_pass_(std::clamp<std::int64_t>(kMaxTileRows / kTilePositions, 1, p.group)),
        keys_(std::make_unique_for_overwrite<std::int32_t[]>(p.seq_len_k)),
        element_bytes_(static_cast<std::int64_t>(size_of(p.dtype))) {
    std::int64_t const rows = heads_per_pass_ * std::min(kTilePositions, p.seq_len_q);
    workspace_ = make_aligned<std::byte>(table.attend_workspace(p.head_dim, rows));
    q_.resize(rows);
    out_.resize(rows);
    lse_.resize(rows);
    position_.resize(rows);
    pool_end_.resize(rows);
    threshold_.resize(rows);
  }

  void run(Task const& task) {
    task_ = task;
    seq_ = sequence_of(p_, task.batch);
    expiry_ = p_.expiry + task.batch * p_.stride_expiry_batch +
              task.kv_head * p_.stride_expiry_head + seq_.first_k;
    num_keys_ = 0;
    next_key_ = 0;
    for (std::int64_t tile = task.first_tile; tile < task.end_tile; ++tile) {
      std::int64_t const begin = std::max(tile * kTilePositions, seq_.num_keys - seq_.num_queries);
      std::int64_t const end = std::min((tile + 1) * kTilePositions, seq_.num_keys);
      std::int64_t const valid_end = std::clamp(seq_.valid, begin, end);
      if (begin < valid_end) {
        update_keys(begin, valid_end);
        for (std::int64_t head = 0; head < p_.group; head += heads_per_pass_) {
          attend_tile(begin, valid_end, head, std::min(head + heads_per_pass_, p_.group));
        }
      }
      for (std::int64_t head = 0; head < p_.group; ++head) clear_rows(valid_end, end, head);
    }
  }

 private:
  // The keys that some query in begin ... end - 1 sees, ascending: what is left of the previous
  // tile's list, and the keys since. (Of the task's first tile, those are all keys before it. A key
  // that has expired never returns.)
  void update_keys(std::int64_t begin, std::int64_t end) {
    std::int64_t kept = 0;
    for (std::int64_t t = 0; t < num_keys_; ++t) {
      std::int32_t const j = keys_[t];
      keys_[kept] = j;
      kept += expiry_[j] > begin;
    }
    for (std::int64_t j = next_key_; j < end; ++j) {
      keys_[kept] = static_cast<std::int32_t>(j);
      kept += expiry_[j] > std::max(begin, j);
    }
    num_keys_ = kept;
    next_key_ = end;
  }

  void attend_tile(std::int64_t begin, std::int64_t end, std::int64_t first_head,
                   std::int64_t end_head) {
    bool const gated = p_.gate != Gate::kNone;
    auto const* const threshold =
        gated ? static_cast<float const*>(p_.threshold) + task_.batch * p_.stride_chunk_batch +
                    task_.kv_head * p_.stride_chunk_head + seq_.first_chunk
              : nullptr;
    std::int64_t rows = 0;
    for (std::int64_t head = first_head; head < end_head; ++head) {
      for (std::int64_t i = begin; i < end; ++i, ++rows) {
        q_[rows] = address(
            p_.q, q_offset(head, i, p_.stride_q_batch, p_.stride_q_head, p_.stride_q_position));
        out_[rows] = out_address(head, i);
        if (p_.lse) lse_[rows] = lse_address(head, i);
        position_[rows] = static_cast<std::int32_t>(i);
        if (gated) {
          std::int64_t const chunk = i / p_.chunk_size;
          pool_end_[rows] = static_cast<std::int32_t>(
              std::max<std::int64_t>(0, chunk * p_.chunk_size - p_.window));
          threshold_[rows] = threshold[chunk];
        }
      }
    }
    AttendTile const tile{
        .dtype = p_.dtype,
        .head_dim = p_.head_dim,
        .gate = p_.gate,
        .sm_scale = static_cast<float>(p_.sm_scale),
        .num_rows = rows,
        .q = q_.data(),
        .out = out_.data(),
        .lse = p_.lse ? lse_.data() : nullptr,
        .position = position_.data(),
        .threshold = threshold_.data(),
        .pool_end = pool_end_.data(),
        .num_keys = num_keys_,
        .keys = keys_.get(),
        .expiry = expiry_,
        .scores = gated ? static_cast<float const*>(p_.scores) +
                              task_.batch * p_.stride_scores_batch +
                              task_.kv_head * p_.stride_scores_head +
                              seq_.first_k * p_.stride_scores_position
                        : nullptr,
        .stride_scores = p_.stride_scores_position,
        .k = address(p_.k, kv_offset(p_.stride_k_batch, p_.stride_k_head, p_.stride_k_position)),
        .v = address(p_.v, kv_offset(p_.stride_v_batch, p_.stride_v_head, p_.stride_v_position)),
        .stride_k = p_.stride_k_position,
        .stride_v = p_.stride_v_position,
        .workspace = workspace_.get(),
    };
    table_.attend(tile);
  }

  // Rows at positions begin ... end - 1 do not exist: output 0, lse -inf.
  void clear_rows(std::int64_t begin, std::int64_t end, std::int64_t head) {
    for (std::int64_t i = begin; i < end; ++i) {
      auto* const row = static_cast<std::byte*>(out_address(head, i));
      std::fill_n(row, p_.head_dim * element_bytes_, std::byte{0});
      if (p_.lse) *lse_address(head, i) = -std::numeric_limits<float>::infinity();
    }
  }

  // Element offset of the row of the query at position i; `head` counts within the group.
  std::int64_t q_offset(std::int64_t head, std::int64_t i, std::int64_t stride_batch,
                        std::int64_t stride_head, std::int64_t stride_position) const {
    std::int64_t const row = seq_.first_q + i - (seq_.num_keys - seq_.num_queries);
    return task_.batch * stride_batch + (task_.kv_head * p_.group + head) * stride_head +
           row * stride_position;
  }
  std::int64_t kv_offset(std::int64_t stride_batch, std::int64_t stride_head,
                         std::int64_t stride_position) const {
    return task_.batch * stride_batch + task_.kv_head * stride_head +
           seq_.first_k * stride_position;
  }
  void const* address(void const* tensor, std::int64_t offset) const {
    return static_cast<std::byte const*>(tensor) + offset * element_bytes_;
  }
  void* out_address(std::int64_t head, std::int64_t i) const {
    return static_cast<std::byte*>(p_.out) +
           q_offset(head, i, p_.stride_out_batch, p_.stride_out_head, p_.stride_out_position) *
               element_bytes_;
  }
  float* lse_address(std::int64_t head, std::int64_t i) const {
    return static_cast<float*>(p_.lse) +
           q_offset(head, i, p_.stride_lse_batch, p_.stride_lse_head, p_.stride_lse_position);
  }

  AttendProblem const& p_;
  KernelTable const& table_;
  std::int64_t heads_per_pass_;
  std::unique_ptr<std::int32_t[]> keys_;
  std::int64_t element_bytes_;
  AlignedArray<std::byte> workspace_;
  std::vector<void const*> q_;
  std::vector<void*> out_;
  std::vector<float*> lse_;
  std::vector<std::int32_t> position_, pool_end_;
  std::vector<float> threshold_;

  Task task_{};
  Sequence seq_;
  std::int32_t const* expiry_ = nullptr;
  std::int64_t num_keys_ = 0;  // of keys_
  std::int64_t next_key_ = 0;  // keys before it have been considered
};

// A task's first tile scans expiry from the start of the sequence; runs are as long as balance
// allows.
std::vector<Task> make_tasks(AttendProblem const& p, int num_threads) {
  std::int64_t num_tiles = 0;
  auto const for_each_row = [&](auto const& body) {
    for (std::int64_t b = 0; b < p.batch; ++b) {
      Sequence const seq = sequence_of(p, b);
      if (seq.num_queries == 0) continue;
      std::int64_t const first = (seq.num_keys - seq.num_queries) / kTilePositions;
      std::int64_t const end = (seq.num_keys + kTilePositions - 1) / kTilePositions;
      body(b, first, end);
    }
  };
  for_each_row([&](std::int64_t, std::int64_t first, std::int64_t end) {
    num_tiles += (end - first) * p.num_kv_heads;
  });
  std::int64_t const run = std::max<std::int64_t>(1, num_tiles / (num_threads * kTasksPerThread));
  std::vector<Task> tasks;
  for_each_row([&](std::int64_t b, std::int64_t first, std::int64_t end) {
    for (std::int64_t h = 0; h < p.num_kv_heads; ++h) {
      for (std::int64_t tile = first; tile < end; tile += run) {
        tasks.push_back({b, h, tile, std::min(tile + run, end)});
      }
    }
  });
  return tasks;
}

}  // namespace

void attend(Context const& context, AttendProblem const& p) {
  KernelTable const& table = kernels(active_isa());
  int const wanted = resolve_threads(context.num_threads, std::numeric_limits<int>::max());
  std::vector<Task> const tasks = make_tasks(p, wanted);
  for_each_task(context.num_threads, static_cast<std::int64_t>(tasks.size()), [&] {
    return [&tasks, worker = Worker(p, table)](std::int64_t t) mutable { worker.run(tasks[t]); };
  });
}

}  // namespace sparsek::cpu
