// What the kernels of this folder are given, and how they find their way in it: sequences, query
// tiles, visible keys.
#pragma once
#include <climits>
#include <cstdint>

namespace sparsek::cuda::portable {

// Queries per tile. Tiles begin at positions that are multiples of it, so that chunks of 128 n lie
// in whole tiles.
inline constexpr int kQueryTile = 128;
// Keys per entry of `group_expiry`.
inline constexpr int kKeyGroup = 64;

// Which keys a tile goes through besides its window.
enum class KeySource : std::int32_t {
  kLists,  // lists made by build_tile_lists
  kWalk,   // every group of keys that is not wholly expired
};

struct AttendParams {
  // Sizes. Packed sequences: seq_len_* are totals over all sequences.
  std::int32_t batch, num_kv_heads, group;
  std::int32_t seq_len_q, seq_len_k, head_dim;
  std::int32_t window, chunk_size;  // both clamped to seq_len_k: no query can tell
  bool foreign;                     // only `expiry` describes the mask
  bool value_gate;                  // the gate multiplies v instead of the weight
  bool aligned_loads;               // 16-byte pieces of q, k, v rows may be read at once
  bool aligned_stores;              // and of out rows be written
  float scale_log2;                 // |sm_scale| log2(e); its sign is applied to q:
  std::uint32_t q_and, q_xor;

  void const *q, *k, *v;
  std::int64_t stride_q_batch, stride_q_head, stride_q_position;
  std::int64_t stride_k_batch, stride_k_head, stride_k_position;
  std::int64_t stride_v_batch, stride_v_head, stride_v_position;
  void* out;
  std::int64_t stride_out_batch, stride_out_head, stride_out_position;
  float* lse;  // or null
  std::int64_t stride_lse_batch, stride_lse_head, stride_lse_position;

  float const* scores;         // [batch, num_kv_heads, seq_len_k], or null: no gate
  float const* threshold;      // [batch, num_kv_heads, num_chunks]; null where scores are
  std::int32_t const* expiry;  // [batch, num_kv_heads, seq_len_k]
  std::int64_t stride_scores_batch, stride_scores_head, stride_scores_position;
  std::int64_t stride_expiry_batch, stride_expiry_head, stride_chunk_batch, stride_chunk_head;
  std::int32_t const* lengths;                      // [batch] or null
  std::int32_t const *cu_seqlens_q, *cu_seqlens_k;  // [batch + 1] or null

  // Workspace.
  KeySource source;
  std::int32_t num_tiles;           // of one head, all sequences; packed: an upper bound
  std::int32_t tiles_per_sequence;  // dense
  std::int32_t list_capacity;
  std::int32_t* tile_sequence;  // packed [num_tiles]: the tile's sequence, -1 beyond the last tile
  std::int32_t* first_tile;     // packed [batch + 1]: number of tiles before each sequence
  std::int32_t* group_expiry;   // latest expiry of each group of keys, rows as in sequence_groups
  std::int32_t* list_count;     // [num_kv_heads, num_tiles]
  std::int32_t* lists;          // [num_kv_heads, num_tiles, list_capacity]: ascending positions
};

// One sequence of the batch.
struct Sequence {
  int index;
  int num_queries, num_keys;
  int length;                           // keys and queries at positions >= length do not exist
  std::int64_t first_query, first_key;  // where it begins in packed tensors; 0 in dense ones
  // Position of query row 0.
  __device__ int query_offset() const { return num_keys - num_queries; }
};

// Values that contradict each other (which the host does not see) are clamped, so that every access
// stays in bounds.
__device__ inline Sequence load_sequence(AttendParams const& p, int b) {
  Sequence s;
  s.index = b;
  s.first_query = s.first_key = 0;
  s.num_queries = p.seq_len_q;
  s.num_keys = p.seq_len_k;
  if (p.cu_seqlens_k) {
    int const q0 = min(max(p.cu_seqlens_q[b], 0), p.seq_len_q);
    int const k0 = min(max(p.cu_seqlens_k[b], 0), p.seq_len_k);
    s.first_query = q0;
    s.first_key = k0;
    s.num_keys = min(max(p.cu_seqlens_k[b + 1], k0), p.seq_len_k) - k0;
    s.num_queries = min(min(max(p.cu_seqlens_q[b + 1], q0), p.seq_len_q) - q0, s.num_keys);
  }
  s.length = p.lengths ? min(max(p.lengths[b], 0), s.num_keys) : s.num_keys;
  return s;
}

// Tiles that the queries at positions [first, last) touch.
__host__ __device__ inline int count_tiles(int first, int last) {
  return first < last ? (last - 1) / kQueryTile - first / kQueryTile + 1 : 0;
}

// The queries of one tile: positions [first, last) of a sequence. Empty where the tile does not
// exist.
struct TileSpan {
  Sequence sequence;
  int begin;  // a multiple of kQueryTile
  int first, last;
};

__device__ inline TileSpan locate_tile(AttendParams const& p, int tile) {
  TileSpan span;
  span.begin = span.first = span.last = 0;
  int in_sequence;
  if (p.cu_seqlens_k) {
    int const b = p.tile_sequence[tile];
    if (b < 0) {
      span.sequence = Sequence{-1, 0, 0, 0, 0, 0};
      return span;
    }
    span.sequence = load_sequence(p, b);
    in_sequence = tile - p.first_tile[b];
  } else {
    int const b = tile / p.tiles_per_sequence;
    span.sequence = load_sequence(p, b);
    in_sequence = tile - b * p.tiles_per_sequence;
  }
  int const offset = span.sequence.query_offset();
  span.begin = (offset / kQueryTile + in_sequence) * kQueryTile;
  span.first = max(span.begin, offset);
  span.last = min(span.begin + kQueryTile, span.sequence.num_keys);
  return span;
}

// Keys before this position are soft (gated) for the query at position i. Keys from it to i are its
// window.
__device__ inline int window_begin(AttendParams const& p, int i) {
  return max(0, i / p.chunk_size * p.chunk_size - p.window);
}

// A tile whose first query is at position i lists the keys before this position that i sees; it
// reads all keys from here on. Lists hold at most num_selected keys: what enters later comes from
// beyond this position. Of a foreign selection, the 128 keys before the tile count as window.
__device__ inline int list_end(AttendParams const& p, int i) {
  return p.foreign ? max(0, i - kQueryTile) : window_begin(p, i);
}

__device__ inline std::int32_t const* expiry_row(AttendParams const& p, Sequence const& s,
                                                 int kv_head) {
  return p.expiry + p.stride_expiry_batch * s.index + p.stride_expiry_head * kv_head + s.first_key;
}

// Groups of all sequences lie behind one another in a head's row; the added index keeps packed
// sequences apart.
__host__ __device__ inline std::int64_t groups_per_row(std::int64_t seq_len_k, bool packed,
                                                       std::int64_t batch) {
  return packed ? seq_len_k / kKeyGroup + batch : (seq_len_k + kKeyGroup - 1) / kKeyGroup * batch;
}

__device__ inline std::int32_t* group_expiry_row(AttendParams const& p, Sequence const& s,
                                                 int kv_head) {
  bool const packed = p.cu_seqlens_k != nullptr;
  std::int64_t const first =
      packed ? s.first_key / kKeyGroup + s.index
             : static_cast<std::int64_t>(s.index) * ((p.seq_len_k + kKeyGroup - 1) / kKeyGroup);
  return p.group_expiry + groups_per_row(p.seq_len_k, packed, p.batch) * kv_head + first;
}

}  // namespace sparsek::cuda::portable
