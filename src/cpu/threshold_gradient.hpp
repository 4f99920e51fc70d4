// The share of the scores' gradients that goes through the thresholds: -gbar_c for every key of
// I_c, for every chunk c (attend_backward.hpp), in O(log) per key.
//
// Thresholds never fall and a key that leaves the candidates never returns, so a key is in I_c for
// one contiguous range of chunks, and what it gets is a difference of prefix sums over chunks.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace sparsek::cpu {

// The smallest score whose gate is 1: a key is in the threshold's support if threshold < score <
// interior_end. The threshold itself where it is infinite: no key is.
inline float interior_end_of(float threshold) {
  double const exact = static_cast<double>(threshold) + 1.0;
  auto const end = static_cast<float>(exact);
  if (static_cast<double>(end) >= exact) return end;
  return std::nextafter(end, std::numeric_limits<float>::infinity());
}

// Chunks first ... of one row of a selection, and the keys' scores.
struct ThresholdRow {
  float const* scores;  // of key 0
  std::int64_t stride_scores;
  std::int64_t num_keys;  // that exist
  float const* threshold;
  std::int32_t const* last_candidate;
  std::int64_t window, chunk_size;
  std::int64_t first_chunk, end_chunk;  // those with queries
};

// Calls subtract(j, value) for every key with a share. gate_gradient[c - first_chunk] is the sum of
// g over the chunk's queries and their selected keys in I_c.
template <typename Subtract>
void for_each_threshold_gradient(ThresholdRow const& row, std::vector<double> const& gate_gradient,
                                 Subtract const& subtract) {
  std::int64_t const num_chunks = row.end_chunk - row.first_chunk;
  float const* const threshold = row.threshold + row.first_chunk;
  std::int32_t const* const last = row.last_candidate + row.first_chunk;
  auto const score = [&](std::int64_t j) { return row.scores[j * row.stride_scores]; };
  std::vector<float> interior_end(num_chunks), last_score(num_chunks);
  for (std::int64_t c = 0; c < num_chunks; ++c) {
    interior_end[c] = interior_end_of(threshold[c]);
    last_score[c] = last[c] < 0 ? -std::numeric_limits<float>::infinity() : score(last[c]);
  }

  // Chunks begin ... end - 1 (counted from first_chunk) have key j in their I_c.
  struct Range {
    std::int64_t begin, end;
  };
  std::vector<Range> ranges(row.num_keys);
  std::vector<std::int64_t> support(num_chunks + 1);  // |I_c|, first as its differences
  for (std::int64_t j = 0; j < row.num_keys; ++j) {
    float const u = score(j);
    // The first chunk whose pool has the key, and the first whose threshold is high enough.
    std::int64_t const enters = (j + row.window) / row.chunk_size + 1 - row.first_chunk;
    std::int64_t const unsaturates =
        std::upper_bound(interior_end.begin(), interior_end.end(), u) - interior_end.begin();
    std::int64_t const dies = std::lower_bound(threshold, threshold + num_chunks, u) - threshold;
    Range range{std::max(enters, unsaturates), dies};
    // The first chunk of those whose last candidate ranks before the key.
    std::int64_t low = range.begin, high = range.end;
    while (low < high) {
      std::int64_t const c = (low + high) / 2;
      bool const candidate =
          last[c] < 0 || u > last_score[c] || (u == last_score[c] && j <= last[c]);
      if (candidate) {
        low = c + 1;
      } else {
        high = c;
      }
    }
    range.end = low;
    ranges[j] = range;
    if (range.begin >= range.end) continue;
    ++support[range.begin];
    --support[range.end];
  }

  std::vector<double> prefix(num_chunks + 1);  // of gbar
  std::int64_t size = 0;
  for (std::int64_t c = 0; c < num_chunks; ++c) {
    size += support[c];
    prefix[c + 1] = prefix[c] + (size > 0 ? gate_gradient[c] / static_cast<double>(size) : 0.0);
  }
  for (std::int64_t j = 0; j < row.num_keys; ++j) {
    auto const [begin, end] = ranges[j];
    if (begin < end) subtract(j, prefix[end] - prefix[begin]);
  }
}

}  // namespace sparsek::cpu
