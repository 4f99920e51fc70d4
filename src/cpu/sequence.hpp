// Where one sequence of a problem lies: dense batches and packed sequences look the same from here
// on.
#pragma once
#include <cstdint>

#include "problem.hpp"

namespace sparsek::cpu {

struct Sequence {
  std::int64_t first_k = 0;      // its first key in a packed tensor (dense: 0)
  std::int64_t first_q = 0;      // its first query row in a packed tensor (dense: 0)
  std::int64_t first_chunk = 0;  // its first entry in a row of threshold or last_candidate
  std::int64_t num_keys = 0;     // positions
  std::int64_t num_queries = 0;  // query rows: positions num_keys - num_queries ...
  std::int64_t valid = 0;        // positions >= valid do not exist
};

// The keys of sequence b: of a ScoreProblem with chunk_size 1, or of a SelectProblem.
inline Sequence key_sequence(std::int64_t b, std::int64_t seq_len, std::int64_t chunk_size,
                             std::int32_t const* lengths, std::int32_t const* cu_seqlens_k) {
  Sequence s;
  if (cu_seqlens_k) {
    s.first_k = cu_seqlens_k[b];
    s.first_chunk = s.first_k / chunk_size + b;
    s.num_keys = s.valid = cu_seqlens_k[b + 1] - s.first_k;
  } else {
    s.num_keys = seq_len;
    s.valid = lengths ? lengths[b] : seq_len;
  }
  return s;
}

inline Sequence sequence_of(AttendProblem const& p, std::int64_t b) {
  Sequence s = key_sequence(b, p.seq_len_k, p.chunk_size, p.lengths, p.cu_seqlens_k);
  s.num_queries = p.seq_len_q;
  if (p.cu_seqlens_q) {
    s.first_q = p.cu_seqlens_q[b];
    s.num_queries = p.cu_seqlens_q[b + 1] - s.first_q;
  }
  return s;
}

}  // namespace sparsek::cpu
