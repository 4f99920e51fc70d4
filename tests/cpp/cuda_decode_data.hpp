// What cuda_decode_check.cc feeds and compares: cases, the tensors of a call in host and device
// memory, whole sequences, and heads of state blocks.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "case_data.hpp"
#include "cuda_check_device.hpp"
#include "sparsek/sparsek.hpp"

namespace sparsek::testing {

inline constexpr std::size_t kGuardBytes = 4096;
inline constexpr std::int64_t kSpareBlocks = 2;  // in the pool, that no sequence uses

// How the tokens of a call lie in memory.
enum class Layout { kHeadsFirst, kTokensFirst, kUnaligned };

struct DecodeCase {
  std::string name;
  std::int64_t batch, kv_heads, group, seq_len, dim;
  SelectOptions select;
  Gate gate;
  DataType dtype;
  std::string scores;              // normal, ties, equal, ascending, descending, huge
  std::string pieces;              // mixed, steps, prompt+steps
  bool graph = false;              // steps are replays of one CUDA graph
  std::int64_t compare_every = 0;  // calls between comparisons of the state; 0: at chunk borders
};

// --- tokens --------------------------------------------------------------------------------------

// One tensor of a call, [sequences or 1, heads, tokens, dim], in host and device memory.
class CallTensor {
 public:
  CallTensor(DataType dtype, std::size_t max_elements)
      : dtype_(dtype),
        host_(max_elements * size_of(dtype)),
        device_(host_.size(), kPoisonInput, kGuardBytes) {}

  void lay_out(Layout layout, std::array<std::int64_t, 4> const& shape) {
    shape_ = shape;
    std::int64_t const dim = shape[3];
    std::int64_t const row = layout == Layout::kUnaligned ? dim + 3 : dim;
    if (layout == Layout::kTokensFirst) {
      stride_ = {shape[1] * shape[2] * row, row, shape[1] * row, 1};
    } else {
      stride_ = {shape[1] * shape[2] * row, shape[2] * row, row, 1};
    }
    offset_ = layout == Layout::kUnaligned ? 1 : 0;
    used_ = (offset_ + shape[0] * shape[1] * shape[2] * row) * size_of(dtype_);
    if (used_ > host_.size()) throw std::logic_error("CallTensor: too small");
    std::memset(host_.data(), kPoisonInput, used_);
  }
  void* row(std::int64_t b, std::int64_t h, std::int64_t t) {
    return host_.data() +
           (offset_ + b * stride_[0] + h * stride_[1] + t * stride_[2]) * size_of(dtype_);
  }
  void upload() {
    if (used_)
      cuda_check(cudaMemcpy(device_.data(), host_.data(), used_, cudaMemcpyHostToDevice), "upload");
    cuda_check(cudaStreamSynchronize(nullptr), "upload");
  }
  void poison_device() { device_.fill(kPoisonInput); }
  void download(std::vector<std::byte>& to) const {
    to.resize(used_);
    if (used_)
      cuda_check(cudaMemcpy(to.data(), device_.data(), used_, cudaMemcpyDeviceToHost), "download");
  }
  bool guards_intact() const { return device_.guards_intact(); }
  std::int64_t index(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return offset_ + b * stride_[0] + h * stride_[1] + t * stride_[2];
  }
  std::byte const* host() const { return host_.data(); }

  // On the host (false) or the device (true); packed: [tokens, heads, dim].
  template <typename View>
  View view(bool device) const {
    std::byte* const base =
        (device ? static_cast<std::byte*>(device_.data()) : const_cast<std::byte*>(host_.data())) +
        offset_ * size_of(dtype_);
    if constexpr (std::tuple_size_v<decltype(View{}.shape)> == 4) {
      return View(base, dtype_, shape_, stride_);
    } else {
      return View(base, dtype_, {shape_[2], shape_[1], shape_[3]}, {stride_[2], stride_[1], 1});
    }
  }
  // Of a tensor whose last dimension is 1.
  template <typename View>
  View scalar_view(bool device) const {
    std::byte* const base =
        (device ? static_cast<std::byte*>(device_.data()) : const_cast<std::byte*>(host_.data())) +
        offset_ * size_of(dtype_);
    if constexpr (std::tuple_size_v<decltype(View{}.shape)> == 3) {
      return View(base, dtype_, {shape_[0], shape_[1], shape_[2]},
                  {stride_[0], stride_[1], stride_[2]});
    } else {
      return View(base, dtype_, {shape_[2], shape_[1]}, {stride_[2], stride_[1]});
    }
  }

 private:
  DataType dtype_;
  std::vector<std::byte> host_;
  DeviceBuffer device_;
  std::array<std::int64_t, 4> shape_{}, stride_{};
  std::int64_t offset_ = 0;
  std::size_t used_ = 0;
};

class CallIndices {
 public:
  explicit CallIndices(std::size_t max) : device_(4 * max, kPoisonInput, kGuardBytes) {}
  void set(std::vector<std::int32_t> values) {
    values_ = std::move(values);
    cuda_check(
        cudaMemcpy(device_.data(), values_.data(), 4 * values_.size(), cudaMemcpyHostToDevice),
        "upload");
    cuda_check(cudaStreamSynchronize(nullptr), "upload");
  }
  ConstTensorView<1> view(bool device) const {
    return {device ? device_.data() : static_cast<void const*>(values_.data()),
            DataType::kInt32,
            {static_cast<std::int64_t>(values_.size())}};
  }

 private:
  std::vector<std::int32_t> values_;
  DeviceBuffer device_;
};

// Whole sequences, of which calls take their pieces.
struct Sequences {
  explicit Sequences(DecodeCase const& c) : c(c), random(static_cast<unsigned>(7 + c.seq_len)) {
    auto const rows = [&](std::int64_t heads) { return c.batch * heads * c.seq_len; };
    q.resize(rows(c.kv_heads * c.group) * c.dim);
    k.resize(rows(c.kv_heads) * c.dim);
    v.resize(k.size());
    scores.resize(rows(c.kv_heads));
    std::normal_distribution<float> normal;
    // A table of values; drawing each one anew would take most of a case's time.
    std::vector<std::uint16_t> table(65537);
    for (std::size_t i = 0; i < table.size(); ++i) {
      store_element(table.data(), c.dtype, static_cast<std::int64_t>(i), normal(random));
    }
    for (auto* tensor : {&q, &k, &v}) {
      std::size_t at = random() % table.size();
      for (std::uint16_t& x : *tensor) {
        x = table[at];
        at = at + 1 == table.size() ? random() % table.size() : at + 1;
      }
    }
    for (std::size_t i = 0; i < scores.size(); ++i) {
      auto const position = static_cast<float>(i % static_cast<std::size_t>(c.seq_len));
      float const u = normal(random);
      scores[i] = c.scores == "ties"         ? std::floor(u * 2.0F) * 0.25F
                  : c.scores == "equal"      ? 0.5F
                  : c.scores == "ascending"  ? position * 0.013F
                  : c.scores == "descending" ? -position * 0.013F
                  : c.scores == "huge"       ? u * 300.0F
                  : c.scores == "zeros"      ? (i % 3 ? 0.0F : -0.0F)
                                             : u;
    }
  }

  DecodeCase const& c;
  std::mt19937 random;
  std::vector<std::uint16_t> q, k, v;
  std::vector<float> scores;
};

// --- state ---------------------------------------------------------------------------------------

// Memory for the pool on the host, aligned.
struct HostPool {
  explicit HostPool(std::size_t bytes) : memory(bytes + kDecodeStateAlignment) {
    auto const at = reinterpret_cast<std::uintptr_t>(memory.data());
    data = memory.data() +
           (kDecodeStateAlignment - at % kDecodeStateAlignment) % kDecodeStateAlignment;
    std::memset(data, kPoisonInput, bytes);
  }
  std::vector<std::byte> memory;
  std::byte* data;
};

struct Difference : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void differ(char const* format, Parts... parts) {
  char text[400];
  std::snprintf(text, sizeof(text), format, parts...);
  throw Difference(text);
}

// What one head's part of a block says.
class HeadView {
 public:
  HeadView(DecodeStateLayout const& layout, std::byte const* head) : l_(layout), head_(head) {
    std::memcpy(&header, head, sizeof(header));
  }
  template <typename T>
  T at(std::int64_t offset, std::int64_t i) const {
    T value;
    std::memcpy(&value, head_ + offset + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  std::int64_t pool_end() const {
    if (header.num_tokens == 0) return 0;
    std::int64_t const chunk = (header.num_tokens - 1) / l_.chunk_size;
    return std::max<std::int64_t>(0, chunk * l_.chunk_size - l_.window);
  }
  std::int64_t num_selected() const { return std::min(l_.num_selected, pool_end()); }
  // Slots in the order of their positions.
  std::vector<std::int64_t> slots() const {
    std::vector<std::int64_t> order(num_selected());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
    std::sort(order.begin(), order.end(),
              [&](auto a, auto b) { return position(a) < position(b); });
    return order;
  }
  std::int32_t position(std::int64_t slot) const {
    return at<std::int32_t>(l_.positions_offset, slot);
  }
  float score(std::int64_t row) const { return at<float>(l_.scores_offset, row); }
  std::byte const* k(std::int64_t row) const { return head_ + l_.k_offset + row * l_.head_dim * 2; }
  std::byte const* v(std::int64_t row) const { return head_ + l_.v_offset + row * l_.head_dim * 2; }
  std::vector<float> candidates() const {
    std::vector<float> all(std::clamp<std::int64_t>(header.num_candidates, 0, l_.num_candidates));
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i] = at<float>(l_.candidates_offset, static_cast<std::int64_t>(i));
    }
    std::sort(all.begin(), all.end());
    return all;
  }
  DecodeHeadHeader header;

 private:
  DecodeStateLayout const& l_;
  std::byte const* head_;
};

// Counts thresholds that differ in the last bit (of the largest score: sums have its rounding).
inline void compare_head(DecodeStateLayout const& l, HeadView const& ours, HeadView const& expected,
                         int& last_bits) {
  if (ours.header.num_tokens != expected.header.num_tokens) {
    differ("num_tokens: expected %d, got %d", expected.header.num_tokens, ours.header.num_tokens);
  }
  if (ours.header.num_tokens == 0) return;
  auto const compare_rows = [&](char const* what, std::int64_t position, std::int64_t row,
                                std::int64_t expected_row) {
    std::size_t const bytes = static_cast<std::size_t>(l.head_dim) * 2;
    if (std::memcmp(ours.k(row), expected.k(expected_row), bytes) != 0 ||
        std::memcmp(ours.v(row), expected.v(expected_row), bytes) != 0) {
      differ("%s: row of position %d (row %d) differs", what, static_cast<int>(position),
             static_cast<int>(row));
    }
    if (ours.score(row) != expected.score(expected_row)) {
      differ("%s: score of position %d: expected %.9g, got %.9g", what, static_cast<int>(position),
             static_cast<double>(expected.score(expected_row)),
             static_cast<double>(ours.score(row)));
    }
  };
  auto const slots = ours.slots(), expected_slots = expected.slots();
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (ours.position(slots[i]) != expected.position(expected_slots[i])) {
      differ("selected position %d of %d: expected %d, got %d", static_cast<int>(i),
             static_cast<int>(slots.size()), expected.position(expected_slots[i]),
             ours.position(slots[i]));
    }
    compare_rows("selected", ours.position(slots[i]), slots[i], expected_slots[i]);
  }
  for (std::int64_t p = ours.pool_end(); p < ours.header.num_tokens; ++p) {
    std::int64_t const row = l.num_selected + p % (l.window + l.chunk_size);
    compare_rows("window", p, row, row);
  }
  float largest = 0.0F;
  for (std::int64_t const slot : slots) largest = std::max(largest, std::fabs(ours.score(slot)));
  float const tau = ours.header.threshold, expected_tau = expected.header.threshold;
  if (tau == expected_tau) {
    if (ours.header.num_candidates != expected.header.num_candidates) {
      differ("num_candidates: expected %d, got %d", expected.header.num_candidates,
             ours.header.num_candidates);
    }
  } else if (std::nextafter(tau, expected_tau) == expected_tau ||
             std::fabs(tau - expected_tau) <= 0x1p-24F * largest) {
    ++last_bits;
  } else {
    differ("threshold: expected %.9g, got %.9g", static_cast<double>(expected_tau),
           static_cast<double>(tau));
  }
  // Above both thresholds.
  auto candidates = ours.candidates(), expected_candidates = expected.candidates();
  float const highest = std::max(tau, expected_tau);
  for (auto* list : {&candidates, &expected_candidates}) {
    list->erase(list->begin(), std::upper_bound(list->begin(), list->end(), highest));
  }
  if (candidates != expected_candidates) {
    differ("candidates differ: %d and %d expected above %.9g", static_cast<int>(candidates.size()),
           static_cast<int>(expected_candidates.size()), static_cast<double>(highest));
  }
}

}  // namespace sparsek::testing
