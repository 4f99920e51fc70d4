// decode on the CPU: a thread per (sequence, KV head). Tokens are taken in runs within one chunk: a
// run that enters a chunk evicts first, then its keys are appended, then its queries attend to the
// rows of the block.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/aligned.hpp"
#include "cpu/kernels.hpp"
#include "cpu/min_heap.hpp"
#include "cpu/prefix_threshold.hpp"
#include "cpu/rank.hpp"
#include "cpu/thread_pool.hpp"
#include "problem.hpp"

namespace sparsek::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Tokens of one run, and rows (tokens x query heads) handed to the kernels at once; as in attend.
constexpr std::int64_t kMaxRunTokens = 128;
constexpr std::int64_t kMaxTileRows = 512;

// One KV head's part of a state block (decode.hpp has its layout).
class HeadState {
 public:
  HeadState(DecodeStateLayout const& layout, std::byte* head)
      : layout_(layout),
        head_(head),
        row_bytes_(layout.head_dim * static_cast<std::int64_t>(size_of(layout.dtype))) {}

  DecodeHeadHeader& header() { return at<DecodeHeadHeader>(0); }
  float* candidates() { return &at<float>(layout_.candidates_offset); }
  std::int32_t* positions() { return &at<std::int32_t>(layout_.positions_offset); }
  float* scores() { return &at<float>(layout_.scores_offset); }
  std::byte* k() { return head_ + layout_.k_offset; }
  std::byte* v() { return head_ + layout_.v_offset; }
  std::byte* k_row(std::int64_t row) { return k() + row * row_bytes_; }
  std::byte* v_row(std::int64_t row) { return v() + row * row_bytes_; }
  std::int64_t row_bytes() const { return row_bytes_; }

  // The end of the pool that the newest of `num_tokens` tokens sees.
  std::int64_t pool_end(std::int64_t num_tokens) const {
    if (num_tokens == 0) return 0;
    std::int64_t const chunk = (num_tokens - 1) / layout_.chunk_size;
    return std::max<std::int64_t>(0, chunk * layout_.chunk_size - layout_.window);
  }
  std::int64_t num_selected(std::int64_t pool_end) const {
    return std::min(layout_.num_selected, pool_end);
  }
  std::int64_t window_row(std::int64_t position) const {
    return layout_.num_selected + position % (layout_.window + layout_.chunk_size);
  }

 private:
  template <typename T>
  T& at(std::int64_t offset) {
    return *reinterpret_cast<T*>(head_ + offset);
  }

  DecodeStateLayout const& layout_;
  std::byte* head_;
  std::int64_t row_bytes_;
};

// The new tokens of one (sequence, KV head): the token at position p is number p - first.
struct NewTokens {
  std::int64_t first, count;
  std::byte const *k, *v;
  std::int64_t stride_k, stride_v;  // bytes
  float const* scores;
  std::int64_t stride_scores;

  std::byte const* k_row(std::int64_t p) const { return k + (p - first) * stride_k; }
  std::byte const* v_row(std::int64_t p) const { return v + (p - first) * stride_v; }
  float score(std::int64_t p) const { return scores[(p - first) * stride_scores]; }
};

// A selected key: its rank, and the row that holds it or will.
struct Selected {
  std::uint64_t rank;
  std::int64_t row;

  friend bool operator<(Selected const& a, Selected const& b) { return a.rank < b.rank; }
};

// Memory of one thread.
class Worker {
 public:
  Worker(DecodeProblem const& p, KernelTable const& table)
      : p_(p),
        table_(table),
        layout_(p.layout),
        element_bytes_(static_cast<std::int64_t>(size_of(p.dtype))),
        selected_(std::make_unique_for_overwrite<Selected[]>(layout_.num_selected)),
        saturated_(std::make_unique_for_overwrite<std::int32_t[]>(layout_.num_candidates + 1)),
        interior_(std::make_unique_for_overwrite<std::int32_t[]>(layout_.num_candidates + 1)) {
    if (!p.q) return;
    heads_per_pass_ = std::clamp<std::int64_t>(kMaxTileRows / max_run(), 1, p.group);
    std::int64_t const rows = heads_per_pass_ * max_run();
    workspace_ = make_aligned<std::byte>(table.attend_workspace(p.head_dim, rows));
    q_.resize(rows);
    out_.resize(rows);
    lse_.resize(rows);
    position_.resize(rows);
    pool_end_.resize(rows);
    threshold_.resize(rows);
    keys_.resize(layout_.num_rows);
    key_rows_.resize(layout_.num_rows);
    for (std::int64_t t = 0; t < layout_.num_rows; ++t) keys_[t] = static_cast<std::int32_t>(t);
  }

  void run(std::int64_t batch, std::int64_t kv_head) {
    batch_ = batch, kv_head_ = kv_head;
    first_token_ = p_.cu_seqlens ? p_.cu_seqlens[batch] : 0;
    std::int64_t const num_tokens =
        p_.cu_seqlens ? p_.cu_seqlens[batch + 1] - first_token_ : p_.seq_len;
    std::int64_t const valid = p_.lengths ? p_.lengths[batch] : num_tokens;

    auto* const block = static_cast<std::byte*>(p_.state) + p_.block_index[batch] * p_.stride_block;
    HeadState state(layout_, block + kv_head * layout_.head_bytes);
    DecodeHeadHeader& header = state.header();
    bool const continues = (!p_.continues || p_.continues[batch]) && header.num_tokens > 0;
    if (!continues) header = {.num_tokens = 0, .num_candidates = 0, .threshold = -kInfinity};
    NewTokens const tokens = new_tokens(header.num_tokens, valid);

    std::int64_t const end = tokens.first + tokens.count;
    for (std::int64_t begin = tokens.first; begin < end;) {
      std::int64_t run_end = end;
      if (p_.q) {
        std::int64_t const chunk_end = (begin / layout_.chunk_size + 1) * layout_.chunk_size;
        run_end = std::min({end, chunk_end, begin + max_run()});
      }
      append(state, tokens, run_end);
      for (std::int64_t head = 0; p_.q && head < p_.group; head += heads_per_pass_) {
        attend(state, tokens, begin, head, std::min(head + heads_per_pass_, p_.group));
      }
      begin = run_end;
    }
    if (p_.q) clear_rows(valid, num_tokens);
  }

 private:
  std::int64_t max_run() const {
    return std::min({kMaxRunTokens, layout_.chunk_size, std::max<std::int64_t>(1, p_.seq_len)});
  }

  NewTokens new_tokens(std::int64_t first, std::int64_t count) const {
    auto const row = [&](void const* tensor, std::int64_t stride_batch, std::int64_t stride_head,
                         std::int64_t stride_position) {
      return static_cast<std::byte const*>(tensor) +
             (batch_ * stride_batch + kv_head_ * stride_head + first_token_ * stride_position) *
                 element_bytes_;
    };
    return {
        .first = first,
        .count = count,
        .k = row(p_.k, p_.stride_k_batch, p_.stride_k_head, p_.stride_k_position),
        .v = row(p_.v, p_.stride_v_batch, p_.stride_v_head, p_.stride_v_position),
        .stride_k = p_.stride_k_position * element_bytes_,
        .stride_v = p_.stride_v_position * element_bytes_,
        .scores = p_.scores + batch_ * p_.stride_scores_batch + kv_head_ * p_.stride_scores_head +
                  first_token_ * p_.stride_scores_position,
        .stride_scores = p_.stride_scores_position,
    };
  }

  // The block's tokens become those at positions 0 ... end - 1.
  void append(HeadState& state, NewTokens const& tokens, std::int64_t end) {
    std::int64_t const old_pool_end = state.pool_end(state.header().num_tokens);
    std::int64_t const pool_end = state.pool_end(end);
    // Selected rows are copied out of the window before new keys take its rows.
    if (pool_end > old_pool_end) evict(state, tokens, old_pool_end, end);
    for (std::int64_t p = std::max<std::int64_t>(state.header().num_tokens, pool_end); p < end;
         ++p) {
      copy_row(state, state.window_row(p), tokens.k_row(p), tokens.v_row(p), tokens.score(p));
    }
    state.header().num_tokens = static_cast<std::int32_t>(end);
  }

  static void copy_row(HeadState& state, std::int64_t row, std::byte const* k, std::byte const* v,
                       float score) {
    std::memcpy(state.k_row(row), k, state.row_bytes());
    std::memcpy(state.v_row(row), v, state.row_bytes());
    state.scores()[row] = score;
  }

  // The keys that leave the window on the way to `end` tokens compete with the selected ones, chunk
  // by chunk as in select.
  void evict(HeadState& state, NewTokens const& tokens, std::int64_t old_pool_end,
             std::int64_t end) {
    std::int64_t const k = layout_.num_selected;
    DecodeHeadHeader& header = state.header();
    MinHeap<Selected> selected(selected_.get());
    for (std::int64_t row = 0; row < state.num_selected(old_pool_end); ++row) {
      selected.push({rank_of(state.scores()[row], state.positions()[row]), row});
    }
    PrefixThreshold threshold(k, layout_.num_candidates, saturated_.get(), interior_.get());
    if (k > 0) threshold.restore(header.threshold, state.candidates(), header.num_candidates);

    float tau = header.threshold;
    std::int64_t const last_chunk = (end - 1) / layout_.chunk_size;
    std::int64_t pool_size = old_pool_end;
    std::int64_t chunk = (old_pool_end + layout_.window) / layout_.chunk_size + 1;  // it grows here
    for (; chunk <= last_chunk; ++chunk) {
      std::int64_t const boundary = chunk * layout_.chunk_size - layout_.window;
      for (; pool_size < boundary; ++pool_size) {
        float const score = pool_size < tokens.first ? state.scores()[state.window_row(pool_size)]
                                                     : tokens.score(pool_size);
        std::uint64_t const rank = rank_of(score, pool_size);
        if (selected.size() < k) {
          selected.push({rank, selected.size()});
        } else if (k > 0 && selected.min().rank < rank) {
          selected.replace_min({rank, selected.min().row});
        }
        if (k > 0) threshold.insert(score);
      }
      if (pool_size > k) {
        tau = k == 0 ? kInfinity
                     : std::max(tau,
                                stored_threshold(threshold.solve(), score_of(selected.min().rank)));
      }
    }

    for (Selected const& key : selected) {
      std::int64_t const position = position_of(key.rank);
      if (position < old_pool_end) continue;  // there already
      if (position < tokens.first) {
        std::int64_t const from = state.window_row(position);
        copy_row(state, key.row, state.k_row(from), state.v_row(from), score_of(key.rank));
      } else {
        copy_row(state, key.row, tokens.k_row(position), tokens.v_row(position),
                 score_of(key.rank));
      }
      state.positions()[key.row] = static_cast<std::int32_t>(position);
    }
    header.threshold = tau;
    header.num_candidates =
        k > 0 ? static_cast<std::int32_t>(threshold.save(state.candidates())) : 0;
  }

  // The queries at positions begin ... of some heads of the group; the block ends with the last of
  // them. The kernel's positions are places in the list of keys: the selected ones first, whose
  // order is of no account, then the window's in their order.
  void attend(HeadState& state, NewTokens const& tokens, std::int64_t begin,
              std::int64_t first_head, std::int64_t end_head) {
    std::int64_t const end = state.header().num_tokens;
    std::int64_t const pool_end = state.pool_end(end);
    std::int64_t const num_selected = state.num_selected(pool_end);
    if (first_head == 0) {
      for (std::int64_t t = 0; t < num_selected; ++t) {
        key_rows_[t] = static_cast<std::int32_t>(t);
      }
      for (std::int64_t p = pool_end; p < end; ++p) {
        key_rows_[num_selected + p - pool_end] = static_cast<std::int32_t>(state.window_row(p));
      }
    }
    std::int64_t rows = 0;
    for (std::int64_t head = first_head; head < end_head; ++head) {
      for (std::int64_t p = begin; p < end; ++p, ++rows) {
        std::int64_t const token = p - tokens.first;
        q_[rows] =
            static_cast<std::byte const*>(p_.q) +
            row_offset(head, token, p_.stride_q_batch, p_.stride_q_head, p_.stride_q_position) *
                element_bytes_;
        out_[rows] = out_address(head, token);
        if (p_.lse) lse_[rows] = lse_address(head, token);
        position_[rows] = static_cast<std::int32_t>(num_selected + p - pool_end);
        pool_end_[rows] = static_cast<std::int32_t>(num_selected);
        threshold_[rows] = state.header().threshold;
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
        .num_keys = num_selected + end - pool_end,
        .keys = keys_.data(),
        .key_rows = key_rows_.data(),
        .expiry = nullptr,
        .scores = state.scores(),
        .stride_scores = 1,
        .k = state.k(),
        .v = state.v(),
        .stride_k = p_.head_dim,
        .stride_v = p_.head_dim,
        .workspace = workspace_.get(),
    };
    table_.attend(tile);
  }

  // Tokens begin ... end - 1 of the call do not exist: output 0, lse -inf.
  void clear_rows(std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = 0; head < p_.group; ++head) {
      for (std::int64_t token = begin; token < end; ++token) {
        auto* const row = static_cast<std::byte*>(out_address(head, token));
        std::fill_n(row, p_.head_dim * element_bytes_, std::byte{0});
        if (p_.lse) *lse_address(head, token) = -kInfinity;
      }
    }
  }

  // Element offset of the row of a query head of the group at a token of the call.
  std::int64_t row_offset(std::int64_t head, std::int64_t token, std::int64_t stride_batch,
                          std::int64_t stride_head, std::int64_t stride_position) const {
    return batch_ * stride_batch + (kv_head_ * p_.group + head) * stride_head +
           (first_token_ + token) * stride_position;
  }
  void* out_address(std::int64_t head, std::int64_t token) const {
    return static_cast<std::byte*>(p_.out) + row_offset(head, token, p_.stride_out_batch,
                                                        p_.stride_out_head,
                                                        p_.stride_out_position) *
                                                 element_bytes_;
  }
  float* lse_address(std::int64_t head, std::int64_t token) const {
    return p_.lse +
           row_offset(head, token, p_.stride_lse_batch, p_.stride_lse_head, p_.stride_lse_position);
  }

  DecodeProblem const& p_;
  KernelTable const& table_;
  DecodeStateLayout const& layout_;
  std::int64_t element_bytes_;
  std::int64_t heads_per_pass_ = 1;
  std::unique_ptr<Selected[]> selected_;
  std::unique_ptr<std::int32_t[]> saturated_, interior_;
  AlignedArray<std::byte> workspace_;
  std::vector<void const*> q_;
  std::vector<void*> out_;
  std::vector<float*> lse_;
  std::vector<std::int32_t> position_, pool_end_;
  std::vector<float> threshold_;
  std::vector<std::int32_t> keys_, key_rows_;

  std::int64_t batch_ = 0, kv_head_ = 0, first_token_ = 0;
};

}  // namespace

void decode(Context const& context, DecodeProblem const& p) {
  KernelTable const& table = kernels(active_isa());
  for_each_task(context.num_threads, p.batch * p.num_kv_heads, [&] {
    return [&p, worker = Worker(p, table)](std::int64_t t) mutable {
      worker.run(t / p.num_kv_heads, t % p.num_kv_heads);
    };
  });
}

}  // namespace sparsek::cpu
