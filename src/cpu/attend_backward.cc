// attend_backward on the CPU.
//
// A (sequence, KV head) is walked as attend walks it: tile of query positions by tile, with the
// list of keys that the tile sees. A key owns a row of gradients in float32 from the tile that sees
// it first to the one that sees it last, so every product is computed once, dq is complete after
// its tile, and dk and dv are complete when the key leaves the list.
//
// Few heads with many positions are cut into runs of tiles. Keys that are visible across the cut
// leave one partial row per run, and these are added up in the order of the runs. Where the cuts
// are depends on the problem alone, not on the number of threads: the same bits for any number.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/aligned.hpp"
#include "cpu/kernels.hpp"
#include "cpu/sequence.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/threshold_gradient.hpp"
#include "problem.hpp"

namespace sparsek::cpu {
namespace {

// As in attend: long enough for most of a list to be visible to the whole tile, and aligned to
// chunks of 128.
constexpr std::int64_t kTilePositions = 128;
// Rows (positions x query heads) handed to the kernels at once; bounds a thread's workspace.
constexpr std::int64_t kMaxTileRows = 512;
// Into how many runs the tiles of all heads are cut, if that makes runs of kMinRunTiles or more.
constexpr std::int64_t kWantedRuns = 64;
// NOTE: a cut costs writing and reading again the gradients of the keys that are visible across it,
// with the default options 384 rows: 2 to 3 % of the work of 8 tiles.
constexpr std::int64_t kMinRunTiles = 8;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A run of tiles of one unit. It owns the keys home_begin ... home_end - 1: the first of their
// gradients come from it.
struct Run {
  std::int64_t unit;
  std::int64_t begin, end;  // query positions
  std::int64_t home_begin, home_end;
  // Rows of the partial gradients: those of `num_incoming` keys that are visible from before
  // `begin`, then those of its own keys that are visible at `end`.
  std::int64_t first_partial = 0, num_incoming = 0, num_survivors = 0;
  bool is_last = false;
};

// One (sequence, KV head).
struct Unit {
  std::int64_t batch = 0, kv_head = 0;
  Sequence seq;
  std::int64_t first_query = 0;  // its position
  std::int32_t const* expiry = nullptr;
  std::int64_t first_gate_row = 0;          // of its queries' entries in Job::gate_gradient
  std::vector<Run> runs;                    // as planned
  std::int64_t first_run = 0, end_run = 0;  // in Job::runs
};

// What all threads share.
struct Job {
  Job(AttendBackwardProblem const& problem, KernelTable const& kernels)
      : b(problem),
        p(problem.forward),
        table(kernels),
        row_size(kernels.gradient_row_size(p.head_dim)),
        gated(p.gate != Gate::kNone),
        wants_gate_gradient(gated && problem.dscores != nullptr) {}

  AttendBackwardProblem const& b;
  AttendProblem const& p;
  KernelTable const& table;
  std::int64_t const row_size;  // floats
  bool const gated, wants_gate_gradient;
  std::vector<Unit> units;
  std::vector<Run> runs;
  // Partial gradients of keys that are visible across a cut; and which keys they are.
  AlignedArray<float> partial;
  std::unique_ptr<std::int32_t[]> partial_keys;
  // Per query position of each unit, the sum of the gates' gradients over its query heads.
  std::unique_ptr<float[]> gate_gradient;

  std::int64_t kv_offset(Unit const& unit, std::int64_t j, std::int64_t stride_batch,
                         std::int64_t stride_head, std::int64_t stride_position) const {
    return unit.batch * stride_batch + unit.kv_head * stride_head +
           (unit.seq.first_k + j) * stride_position;
  }
  void const* element(void const* tensor, std::int64_t offset) const {
    return static_cast<std::byte const*>(tensor) +
           offset * static_cast<std::int64_t>(size_of(p.dtype));
  }
  void* element(void* tensor, std::int64_t offset) const {
    return const_cast<void*>(element(static_cast<void const*>(tensor), offset));
  }
  void* dk(Unit const& unit, std::int64_t j) const {
    return element(b.dk,
                   kv_offset(unit, j, b.stride_dk_batch, b.stride_dk_head, b.stride_dk_position));
  }
  void* dv(Unit const& unit, std::int64_t j) const {
    return element(b.dv,
                   kv_offset(unit, j, b.stride_dv_batch, b.stride_dv_head, b.stride_dv_position));
  }
  float* dscore(Unit const& unit, std::int64_t j) const {
    return static_cast<float*>(b.dscores) + kv_offset(unit, j, b.stride_dscores_batch,
                                                      b.stride_dscores_head,
                                                      b.stride_dscores_position);
  }
  float const* scores(Unit const& unit) const {
    return static_cast<float const*>(p.scores) + kv_offset(unit, 0, p.stride_scores_batch,
                                                           p.stride_scores_head,
                                                           p.stride_scores_position);
  }
  std::int64_t first_chunk(Unit const& unit) const {
    return unit.batch * p.stride_chunk_batch + unit.kv_head * p.stride_chunk_head +
           unit.seq.first_chunk;
  }

  void write_key(Unit const& unit, std::int64_t j, float const* row) const {
    float const du = table.write_gradients(p.dtype, p.head_dim, static_cast<float>(p.sm_scale), row,
                                           dk(unit, j), dv(unit, j));
    if (b.dscores) *dscore(unit, j) = du;
  }
  // No query sees the key.
  void clear_key(Unit const& unit, std::int64_t j) const {
    std::size_t const bytes = p.head_dim * size_of(p.dtype);
    std::memset(dk(unit, j), 0, bytes);
    std::memset(dv(unit, j), 0, bytes);
    if (b.dscores) *dscore(unit, j) = 0.0F;
  }
};

// --- planning ------------------------------------------------------------------------------------

std::vector<Unit> make_units(AttendProblem const& p) {
  std::vector<Unit> units;
  std::int64_t gate_rows = 0;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    Sequence const seq = sequence_of(p, b);
    for (std::int64_t h = 0; h < p.num_kv_heads; ++h) {
      Unit unit;
      unit.batch = b, unit.kv_head = h, unit.seq = seq;
      unit.first_query = seq.num_keys - seq.num_queries;
      unit.expiry = p.expiry + b * p.stride_expiry_batch + h * p.stride_expiry_head + seq.first_k;
      unit.first_gate_row = gate_rows;
      gate_rows += seq.num_queries;
      units.push_back(std::move(unit));
    }
  }
  return units;
}

struct Cut {
  std::int64_t position;
  std::int64_t num_visible;  // keys that are visible across it
};

// Where a unit is cut, at borders of tiles. Runs have at least `run_tiles` tiles and at least half
// as many positions as there are keys visible across their end, so that partial gradients take no
// more memory than a few times those of all keys.
std::vector<Cut> make_cuts(Unit const& unit, std::int64_t first_tile, std::int64_t end_tile,
                           std::int64_t run_tiles) {
  std::vector<Cut> cuts;
  if (end_tile - first_tile < 2 * run_tiles) return cuts;
  // visible[t - first_tile]: how many keys are visible across the beginning of tile t; first as its
  // differences.
  std::vector<std::int64_t> visible(end_tile - first_tile + 1);
  for (std::int64_t j = 0; j < unit.seq.valid; ++j) {
    std::int64_t const expiry = std::min<std::int64_t>(unit.expiry[j], unit.seq.valid);
    std::int64_t const begin = std::max(j / kTilePositions + 1, first_tile);
    std::int64_t const end = ceil_div(expiry, kTilePositions);
    if (expiry <= j || begin >= end) continue;
    ++visible[begin - first_tile];
    --visible[end - first_tile];
  }
  std::int64_t last_cut = first_tile, count = 0;
  for (std::int64_t t = first_tile; t + run_tiles <= end_tile; ++t) {
    count += visible[t - first_tile];
    if (t - last_cut < run_tiles || count > 2 * (t - last_cut) * kTilePositions) continue;
    cuts.push_back({t * kTilePositions, count});
    last_cut = t;
  }
  return cuts;
}

void plan_unit(Unit& unit, std::int64_t index, std::int64_t run_tiles) {
  Sequence const& seq = unit.seq;
  std::int64_t const valid_end = std::max(seq.valid, unit.first_query);
  std::int64_t const first_tile = unit.first_query / kTilePositions;
  std::vector<Cut> const cuts =
      make_cuts(unit, first_tile, ceil_div(valid_end, kTilePositions), run_tiles);
  std::int64_t begin = unit.first_query, home_begin = 0, incoming = 0;
  for (std::size_t r = 0; r <= cuts.size(); ++r) {
    Run run{};
    run.unit = index;
    run.is_last = r == cuts.size();
    run.begin = begin;
    run.end = run.is_last ? valid_end : cuts[r].position;
    run.home_begin = home_begin;
    run.home_end = run.is_last ? seq.num_keys : run.end;
    run.num_incoming = incoming;
    if (!run.is_last) {
      for (std::int64_t j = run.home_begin; j < run.home_end; ++j) {
        run.num_survivors += unit.expiry[j] > run.end;
      }
      incoming = cuts[r].num_visible;
    }
    begin = home_begin = run.end;
    unit.runs.push_back(run);
  }
}

void plan(Job& job, int num_threads) {
  job.units = make_units(job.p);
  std::int64_t num_tiles = 0;
  for (Unit const& unit : job.units) num_tiles += ceil_div(unit.seq.num_queries, kTilePositions);
  std::int64_t const run_tiles = std::max(kMinRunTiles, ceil_div(num_tiles, kWantedRuns));
  auto const num_units = static_cast<std::int64_t>(job.units.size());
  for_each_task(num_threads, num_units,
                [&] { return [&](std::int64_t u) { plan_unit(job.units[u], u, run_tiles); }; });
  std::int64_t num_partial = 0, gate_rows = 0;
  for (Unit& unit : job.units) {
    unit.first_run = static_cast<std::int64_t>(job.runs.size());
    for (Run& run : unit.runs) {
      run.first_partial = num_partial;
      num_partial += run.num_incoming + run.num_survivors;
      job.runs.push_back(run);
    }
    unit.end_run = static_cast<std::int64_t>(job.runs.size());
    gate_rows += unit.seq.num_queries;
  }
  job.partial = make_aligned<float>(num_partial * job.row_size * sizeof(float));
  job.partial_keys = std::make_unique_for_overwrite<std::int32_t[]>(num_partial);
  if (job.wants_gate_gradient) {
    job.gate_gradient = std::make_unique_for_overwrite<float[]>(gate_rows);
  }
}

// --- runs ----------------------------------------------------------------------------------------

// Computes runs; memory of one thread.
class Worker {
 public:
  explicit Worker(Job& job)
      : job_(job),
        p_(job.p),
        heads_per_pass_(
            std::max<std::int64_t>(1, std::min(kMaxTileRows / kTilePositions, p_.group))) {
    std::int64_t const rows = heads_per_pass_ * std::min(kTilePositions, p_.seq_len_q);
    workspace_ = make_aligned<float>(
        static_cast<std::int64_t>(job.table.attend_backward_workspace(p_.head_dim, rows)));
    q_.resize(rows);
    out_.resize(rows);
    dout_.resize(rows);
    dq_.resize(rows);
    lse_.resize(rows);
    position_.resize(rows);
    pool_end_.resize(rows);
    threshold_.resize(rows);
    interior_end_.resize(rows);
    gate_gradient_.resize(rows);
  }

  void run(Run const& run) {
    run_ = &run;
    unit_ = &job_.units[run.unit];
    keys_.clear();
    rows_.clear();
    free_rows_.clear();
    num_rows_ = 0;
    next_key_ = 0;
    for (std::int64_t begin = run.begin; begin < run.end;) {
      std::int64_t const end = std::min(run.end, (begin / kTilePositions + 1) * kTilePositions);
      update_keys(begin, end);
      for (std::int64_t head = 0; head < p_.group; head += heads_per_pass_) {
        attend_tile(begin, end, head, std::min(head + heads_per_pass_, p_.group));
      }
      begin = end;
    }
    finish_keys();
    if (run.is_last) clear_queries(run.end, unit_->seq.num_keys);
  }

 private:
  bool is_home(std::int64_t j) const { return j >= run_->home_begin; }
  float* row(std::int64_t index) const { return gradients_.get() + index * job_.row_size; }

  // The keys that some query in begin ... end - 1 sees, ascending: what is left of the previous
  // tile's list, and the keys since. (Of the run's first tile, those are all keys before it.)
  void update_keys(std::int64_t begin, std::int64_t end) {
    std::size_t kept = 0;
    for (std::size_t t = 0; t < keys_.size(); ++t) {
      std::int32_t const j = keys_[t], index = rows_[t];
      if (unit_->expiry[j] > begin) {
        keys_[kept] = j;
        rows_[kept++] = index;
      } else {
        retire(j, index);
      }
    }
    keys_.resize(kept);
    rows_.resize(kept);
    for (std::int64_t j = next_key_; j < end; ++j) {
      if (unit_->expiry[j] > std::max(begin, j)) {
        keys_.push_back(static_cast<std::int32_t>(j));
        rows_.push_back(new_row());
        std::fill_n(row(rows_.back()), job_.row_size, 0.0F);
        // The run's first rows are those of the incoming keys, in order.
        if (!is_home(j)) job_.partial_keys[run_->first_partial + rows_.back()] = keys_.back();
      } else if (is_home(j)) {
        job_.clear_key(*unit_, j);
      }
    }
    next_key_ = end;
  }

  std::int32_t new_row() {
    if (!free_rows_.empty()) {
      std::int32_t const index = free_rows_.back();
      free_rows_.pop_back();
      return index;
    }
    if (num_rows_ == capacity_) {
      std::int64_t const capacity = std::max<std::int64_t>(2 * capacity_, 4 * kTilePositions);
      AlignedArray<float> larger = make_aligned<float>(capacity * job_.row_size * sizeof(float));
      std::copy_n(gradients_.get(), num_rows_ * job_.row_size, larger.get());
      gradients_ = std::move(larger);
      capacity_ = capacity;
    }
    return num_rows_++;
  }

  // The key has been seen for the last time by this run, and by any run if it is this run's own.
  void retire(std::int64_t j, std::int32_t index) {
    if (is_home(j)) {
      job_.write_key(*unit_, j, row(index));
    } else {
      save_partial(run_->first_partial + index, index);
    }
    free_rows_.push_back(index);
  }

  void save_partial(std::int64_t partial, std::int32_t index) {
    std::copy_n(row(index), job_.row_size, job_.partial.get() + partial * job_.row_size);
  }

  void finish_keys() {
    std::int64_t survivor = run_->first_partial + run_->num_incoming;
    for (std::size_t t = 0; t < keys_.size(); ++t) {
      std::int32_t const j = keys_[t];
      if (is_home(j) && !run_->is_last && unit_->expiry[j] > run_->end) {
        job_.partial_keys[survivor] = j;
        save_partial(survivor++, rows_[t]);
      } else {
        retire(j, rows_[t]);
      }
    }
    for (std::int64_t j = std::max(next_key_, run_->home_begin); j < run_->home_end; ++j) {
      job_.clear_key(*unit_, j);
    }
  }

  void attend_tile(std::int64_t begin, std::int64_t end, std::int64_t first_head,
                   std::int64_t end_head) {
    AttendBackwardProblem const& b = job_.b;
    bool const gated = job_.gated;
    auto const* const threshold =
        gated ? static_cast<float const*>(p_.threshold) + job_.first_chunk(*unit_) : nullptr;
    std::int64_t rows = 0;
    for (std::int64_t head = first_head; head < end_head; ++head) {
      for (std::int64_t i = begin; i < end; ++i, ++rows) {
        q_[rows] = job_.element(
            p_.q, q_offset(head, i, p_.stride_q_batch, p_.stride_q_head, p_.stride_q_position));
        out_[rows] = job_.element(
            static_cast<void const*>(p_.out),
            q_offset(head, i, p_.stride_out_batch, p_.stride_out_head, p_.stride_out_position));
        dout_[rows] = job_.element(b.dout, q_offset(head, i, b.stride_dout_batch,
                                                    b.stride_dout_head, b.stride_dout_position));
        dq_[rows] = dq(head, i);
        lse_[rows] = static_cast<float const*>(p_.lse)[q_offset(
            head, i, p_.stride_lse_batch, p_.stride_lse_head, p_.stride_lse_position)];
        position_[rows] = static_cast<std::int32_t>(i);
        if (!gated) continue;
        std::int64_t const chunk = i / p_.chunk_size;
        bool const same_chunk = i > begin && (i - 1) / p_.chunk_size == chunk;
        pool_end_[rows] =
            static_cast<std::int32_t>(std::max<std::int64_t>(0, chunk * p_.chunk_size - p_.window));
        threshold_[rows] = threshold[chunk];
        interior_end_[rows] =
            same_chunk ? interior_end_[rows - 1] : interior_end_of(threshold[chunk]);
      }
    }
    AttendBackwardTile const tile{
        .dtype = p_.dtype,
        .head_dim = p_.head_dim,
        .gate = p_.gate,
        .sm_scale = static_cast<float>(p_.sm_scale),
        .num_rows = rows,
        .q = q_.data(),
        .out = out_.data(),
        .dout = dout_.data(),
        .dq = dq_.data(),
        .lse = lse_.data(),
        .position = position_.data(),
        .threshold = threshold_.data(),
        .interior_end = interior_end_.data(),
        .pool_end = pool_end_.data(),
        .gate_gradient = job_.wants_gate_gradient ? gate_gradient_.data() : nullptr,
        .num_keys = static_cast<std::int64_t>(keys_.size()),
        .keys = keys_.data(),
        .expiry = unit_->expiry,
        .scores = gated ? job_.scores(*unit_) : nullptr,
        .stride_scores = p_.stride_scores_position,
        .k = job_.element(p_.k, job_.kv_offset(*unit_, 0, p_.stride_k_batch, p_.stride_k_head,
                                               p_.stride_k_position)),
        .v = job_.element(p_.v, job_.kv_offset(*unit_, 0, p_.stride_v_batch, p_.stride_v_head,
                                               p_.stride_v_position)),
        .stride_k = p_.stride_k_position,
        .stride_v = p_.stride_v_position,
        .gradient_rows = rows_.data(),
        .gradients = gradients_.get(),
        .workspace = reinterpret_cast<std::byte*>(workspace_.get()),
    };
    job_.table.attend_backward(tile);
    if (job_.wants_gate_gradient) add_gate_gradients(begin, end, first_head, end_head);
  }

  void add_gate_gradients(std::int64_t begin, std::int64_t end, std::int64_t first_head,
                          std::int64_t end_head) {
    float* const sums =
        job_.gate_gradient.get() + unit_->first_gate_row + begin - unit_->first_query;
    float const* g = gate_gradient_.data();
    if (first_head == 0) std::fill_n(sums, end - begin, 0.0F);
    for (std::int64_t head = first_head; head < end_head; ++head) {
      for (std::int64_t i = 0; i < end - begin; ++i) sums[i] += *g++;
    }
  }

  // Rows at positions begin ... end - 1 do not exist.
  void clear_queries(std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = 0; head < p_.group; ++head) {
      for (std::int64_t i = begin; i < end; ++i) {
        std::memset(dq(head, i), 0, p_.head_dim * size_of(p_.dtype));
      }
    }
  }

  // Element offset of the row of the query at position i; `head` counts within the group.
  std::int64_t q_offset(std::int64_t head, std::int64_t i, std::int64_t stride_batch,
                        std::int64_t stride_head, std::int64_t stride_position) const {
    std::int64_t const row = unit_->seq.first_q + i - unit_->first_query;
    return unit_->batch * stride_batch + (unit_->kv_head * p_.group + head) * stride_head +
           row * stride_position;
  }
  void* dq(std::int64_t head, std::int64_t i) const {
    AttendBackwardProblem const& b = job_.b;
    return job_.element(
        b.dq, q_offset(head, i, b.stride_dq_batch, b.stride_dq_head, b.stride_dq_position));
  }

  Job& job_;
  AttendProblem const& p_;
  std::int64_t heads_per_pass_;
  AlignedArray<float> workspace_;
  std::vector<void const*> q_, out_, dout_;
  std::vector<void*> dq_;
  std::vector<float> lse_, threshold_, interior_end_, gate_gradient_;
  std::vector<std::int32_t> position_, pool_end_;

  Run const* run_ = nullptr;
  Unit const* unit_ = nullptr;
  std::vector<std::int32_t> keys_, rows_;  // the keys of the tile and their rows of gradients_
  std::vector<std::int32_t> free_rows_;
  AlignedArray<float> gradients_;
  std::int32_t num_rows_ = 0;  // of gradients_ that have been in use
  std::int64_t capacity_ = 0;
  std::int64_t next_key_ = 0;  // keys before it have been considered
};

// --- what is left when all runs are done ---------------------------------------------------------

// Adds up the partial gradients of the run's own keys that are visible across its end.
void combine_partials(Job const& job, std::int64_t index) {
  Run const& run = job.runs[index];
  Unit const& unit = job.units[run.unit];
  if (run.num_survivors == 0) return;
  // Where the next of the run's keys is among the incoming ones of each later run.
  std::vector<std::int64_t> next;
  for (std::int64_t r = index + 1; r < unit.end_run; ++r) {
    std::int32_t const* const incoming = job.partial_keys.get() + job.runs[r].first_partial;
    next.push_back(
        job.runs[r].first_partial +
        (std::lower_bound(incoming, incoming + job.runs[r].num_incoming, run.home_begin) -
         incoming));
  }
  std::int64_t const first = run.first_partial + run.num_incoming;
  for (std::int64_t s = first; s < first + run.num_survivors; ++s) {
    std::int32_t const j = job.partial_keys[s];
    float* const sum = job.partial.get() + s * job.row_size;
    for (std::int64_t r = index + 1; r < unit.end_run && unit.expiry[j] > job.runs[r].begin; ++r) {
      float const* const part = job.partial.get() + next[r - index - 1]++ * job.row_size;
      for (std::int64_t d = 0; d < job.row_size; ++d) sum[d] += part[d];
    }
    job.write_key(unit, j, sum);
  }
}

void add_threshold_gradients(Job const& job, Unit const& unit) {
  AttendProblem const& p = job.p;
  std::int64_t const valid = unit.seq.valid;
  if (valid <= unit.first_query) return;
  std::int64_t const first = unit.first_query / p.chunk_size;
  std::int64_t const end = ceil_div(valid, p.chunk_size);
  std::vector<double> sums(end - first);
  float const* g = job.gate_gradient.get() + unit.first_gate_row;
  for (std::int64_t i = unit.first_query; i < valid; ++i) sums[i / p.chunk_size - first] += *g++;
  ThresholdRow const row{
      .scores = job.scores(unit),
      .stride_scores = p.stride_scores_position,
      .num_keys = valid,
      .threshold = static_cast<float const*>(p.threshold) + job.first_chunk(unit),
      .last_candidate = p.last_candidate + job.first_chunk(unit),
      .window = p.window,
      .chunk_size = p.chunk_size,
      .first_chunk = first,
      .end_chunk = end,
  };
  for_each_threshold_gradient(row, sums, [&](std::int64_t j, double value) {
    float* const du = job.dscore(unit, j);
    *du = static_cast<float>(static_cast<double>(*du) - value);
  });
}

}  // namespace

void attend_backward(Context const& context, AttendBackwardProblem const& problem) {
  Job job(problem, kernels(active_isa()));
  plan(job, context.num_threads);
  auto const num_runs = static_cast<std::int64_t>(job.runs.size());
  auto const num_units = static_cast<std::int64_t>(job.units.size());
  for_each_task(context.num_threads, num_runs, [&] {
    return [&job, worker = Worker(job)](std::int64_t r) mutable { worker.run(job.runs[r]); };
  });
  for_each_task(context.num_threads, num_runs == num_units ? 0 : num_runs,
                [&] { return [&](std::int64_t r) { combine_partials(job, r); }; });
  for_each_task(context.num_threads, job.wants_gate_gradient ? num_units : 0, [&] {
    return [&](std::int64_t u) { add_threshold_gradients(job, job.units[u]); };
  });
}

}  // namespace sparsek::cpu
