// A warp's attention over blocks of 16 cache rows: rows, scores, softmax, output.
//
// Rows go from global memory straight into the operands of the matrix instructions, in pieces of 16
// bytes (8 dimensions). With g = lane / 4 and t = lane % 4 (mma_sync.cuh has the layouts):
//   S = Q K^T. A lane holds of keys g and g + 8 the pieces t + 4 j. Halves of a piece are operands,
//     since the sum over dimensions may take any order; queries are laid out in the same one.
//   O^T = V^T P^T, so that one query needs 8 columns and not 16 rows, and that the weights are an
//     operand as they come from S. A lane holds of keys 2t, 2t + 1, 2t + 8 and 2t + 9 the pieces
//     g + 8 i: register m of a piece has the dimensions 2m and 2m + 1 of one key; of two keys
//     together they become, by a permutation of bytes, rows g and g + 8 of the operand.
#pragma once
#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/portable/decode/config.cuh"

namespace sparsek::cuda::portable {

// --- which rows ----------------------------------------------------------------------------------

// Which rows of the state hold keys that a run of tokens sees: of the selected ones the first, and
// in the ring, from its oldest key on, those of the window, at last the run's tokens (which are
// still in the call's tensors when the run begins).
class VisibleRows {
 public:
  __device__ VisibleRows(HeadState const& state, int pool_end, int run_begin, int run_end)
      : num_selected_(min(state.num_selected, pool_end)),
        ring_first_(state.num_selected),
        ring_size_(static_cast<int>(state.ring_rows.divisor)),
        oldest_(state.window_row(pool_end)),
        num_old_(run_begin - pool_end),
        num_recent_(run_end - pool_end) {}

  __device__ bool is_selected(int row) const { return row < ring_first_; }
  // The run's token whose row this is; negative: an older key's.
  __device__ int token(int row) const { return age(row) - num_old_; }
  __device__ bool exists(int row) const {
    return is_selected(row) ? row < num_selected_
                            : row < ring_first_ + ring_size_ && age(row) < num_recent_;
  }
  // Whether the 16 rows from `row` on hold keys from before the run, either all selected or none.
  __device__ bool are_old(int row) const {
    if (is_selected(row)) return row + kBlockKeys <= num_selected_;
    return row + kBlockKeys <= ring_first_ + ring_size_ && age(row) + kBlockKeys <= num_old_;
  }
  // Whether some of them hold a key.
  __device__ bool some_exist(int row) const {
    if (row < num_selected_) return true;
    int const begin = max(row, ring_first_), end = row + kBlockKeys;
    if (begin >= min(end, ring_first_ + ring_size_)) return false;
    return age(begin) < num_recent_ || (oldest_ > begin && oldest_ < end);
  }

 private:
  // Of a row of the ring: how many rows after the oldest key's.
  __device__ int age(int row) const {
    int const distance = row - oldest_;
    return distance < 0 ? distance + ring_size_ : distance;
  }

  int num_selected_, ring_first_, ring_size_;
  int oldest_, num_old_, num_recent_;
};

// --- rows ----------------------------------------------------------------------------------------

// Zeros that the compiler does not move to where they are not needed.
__device__ __forceinline__ void clear(uint4& r) {
  asm volatile("mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w));
}

// A lane's parts of a block.
// NOTE: clear() is for where nothing is loaded: without a value there, those of the pass before
// would have to be kept in registers, or rather in local memory, since there are not enough.
template <typename Config>
struct KeyPieces {
  uint4 piece[2][Config::kKeyPieces];
  float score;  // of key lane % 16

  __device__ __forceinline__ void clear() {
    score = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (uint4& p : piece[h]) portable::clear(p);
    }
  }
};
template <typename Config>
struct ValuePieces {
  uint4 piece[4][Config::kValuePieces];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (uint4& p : piece[n]) portable::clear(p);
    }
  }
};

// NOTE: through L1. Lanes ask for half a line at a time, and past L1 the rows take a tenth longer.
// What other blocks have written is seen nevertheless, after a barrier of the cluster.
__device__ __forceinline__ uint4 load_global_16(std::byte const* from) {
  uint4 r;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(from));
  return r;
}

__device__ __forceinline__ float load_global_4(std::byte const* from) {
  float r;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(r) : "l"(from));
  return r;
}

// What a lane holds of 16 keys.
template <typename Config>
struct LanePart {
  int lane;

  __device__ int group() const { return lane / 4; }
  __device__ int pair() const { return lane % 4; }
  __device__ int key(int h) const { return group() + 8 * h; }
  __device__ int value(int n) const { return pair() * 2 + n % 2 + n / 2 * 8; }
  // Whether the lane's i-th piece of a value is one.
  __device__ bool in_row(int i) const {
    return Config::kChunks % 8 == 0 || group() + 8 * i < Config::kChunks;
  }
};

// Loads 16 adjacent rows of the state, as long as the instance's, straight to registers.
template <typename Config>
class RowLoader {
 public:
  __device__ RowLoader(DecodeStateLayout const& layout, std::byte const* head, int lane)
      : layout_(layout), head_(head), lane_{lane} {}

  __device__ __forceinline__ void load(int row, KeyPieces<Config>& keys) const {
    std::byte const* const from = head() + layout_.k_offset + std::int64_t{row} * Config::kPitch +
                                  (lane_.key(0) * Config::kPitch + lane_.pair() * 16);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < Config::kKeyPieces; ++j) {
        keys.piece[h][j] = load_global_16(from + (h * 8 * Config::kPitch + j * 64));
      }
    }
  }
  __device__ __forceinline__ void load_score(int row, KeyPieces<Config>& keys) const {
    keys.score = load_global_4(head() + layout_.scores_offset +
                               4 * std::int64_t{row + lane_.lane % kBlockKeys});
  }
  __device__ __forceinline__ void load(int row, ValuePieces<Config>& values) const {
    std::byte const* const from = head() + layout_.v_offset + std::int64_t{row} * Config::kPitch +
                                  (lane_.value(0) * Config::kPitch + lane_.group() * 16);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < Config::kValuePieces; ++i) {
        // A piece beyond the row: the first once more.
        int const at = lane_.in_row(i) ? i * 128 : 0;
        values.piece[n][i] = load_global_16(from + ((n % 2 + n / 2 * 8) * Config::kPitch + at));
      }
    }
  }

 private:
  // NOTE: the sums with the offsets are made anew each time; three addresses in registers are two
  // too many.
  __device__ std::byte const* head() const {
    std::byte const* p = head_;
    asm volatile("" : "+l"(p));
    return p;
  }

  DecodeStateLayout const& layout_;
  std::byte const* head_;
  LanePart<Config> lane_;
};

// Brings any 16 rows to registers by way of a stage in shared memory: some of them may not exist,
// be new tokens, or be shorter than the instance's.
template <typename Config>
class RowStage {
 public:
  __device__ RowStage(HeadState const& state, NewTokens const& tokens, VisibleRows const& rows,
                      int first_token, std::uint32_t stage, int lane)
      : state_(state),
        tokens_(tokens),
        rows_(rows),
        first_token_(first_token),
        stage_(stage),
        lane_{lane} {}

  // Starts to copy the rows from `first` on to the stage: two lanes for each.
  __device__ __forceinline__ void copy(int first) const {
    int const row = first + lane_.lane / 2, half = lane_.lane % 2;
    // Keys that do not exist become zeros: they count with weight 0, but have to be numbers.
    bool const exists = rows_.exists(row);
    bool const is_new = exists && !rows_.is_selected(row) && rows_.token(row) >= 0;
    std::byte const *k = state_.k, *v = state_.v;
    float const* score = state_.scores;
    if (is_new) {
      int const token = first_token_ + rows_.token(row);
      k = tokens_.k_row(token), v = tokens_.v_row(token);
      score = tokens_.score_address(token);
    } else if (exists) {
      k += state_.offset(row), v += state_.offset(row);
      score += row;
    }
    std::uint32_t const to = place(lane_.lane / 2, half);
    if (!is_new || tokens_.aligned) {
#pragma unroll
      for (int j = 0; j < Config::kChunks / 2; ++j) {
        bool const copied = exists && (half + 2 * j) * 16 < state_.row_bytes;
        int const at = copied ? (half + 2 * j) * 16 : 0;
        device::cp_async_16(to + j * 32, k + at, copied);
        device::cp_async_16(to + Config::kTensorBytes + j * 32, v + at, copied);
      }
    } else {
#pragma unroll 1
      for (int j = half; j < Config::kChunks; j += 2) {
        bool const copied = j * 16 < state_.row_bytes;
        std::uint32_t const at = to + (j - half) * 16;
        device::store_shared_16(at, copied ? load_16(k + j * 16, false) : uint4{});
        device::store_shared_16(at + Config::kTensorBytes,
                                copied ? load_16(v + j * 16, false) : uint4{});
      }
    }
    // Scores: of selected keys for their gates, of new tokens for the state.
    if (half == 0) device::cp_async_4(score_place(lane_.lane / 2), score, exists);
  }

  // Waits for the rows in the stage.
  __device__ __forceinline__ void wait() const {
    device::cp_async_wait_all();
    __syncwarp();
  }
  __device__ __forceinline__ void load(KeyPieces<Config>& keys) const {
    keys.score = device::load_shared(score_place(lane_.lane % kBlockKeys));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < Config::kKeyPieces; ++j) {
        keys.piece[h][j] = device::load_shared_16(place(lane_.key(h), lane_.pair()) + j * 64);
      }
    }
  }
  __device__ __forceinline__ void load(ValuePieces<Config>& values) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < Config::kValuePieces; ++i) {
        int const at = lane_.in_row(i) ? i * 128 : 0;
        values.piece[n][i] = device::load_shared_16(place(lane_.value(n), lane_.group()) +
                                                    Config::kTensorBytes + at);
      }
    }
  }

  // Writes the new tokens among the rows from `first` on, which lie in the stage, to the state.
  __device__ __forceinline__ void append(int first) const {
    int const row = first + lane_.lane / 2, half = lane_.lane % 2;
    if (rows_.is_selected(row) || !rows_.exists(row) || rows_.token(row) < 0) return;
    std::uint32_t const from = place(lane_.lane / 2, half);
    std::int64_t const to = state_.offset(row) + half * 16;
#pragma unroll 4
    for (int j = 0; j < Config::kChunks / 2; ++j) {
      if ((half + 2 * j) * 16 >= state_.row_bytes) break;
      *reinterpret_cast<uint4*>(state_.k + to + j * 32) = device::load_shared_16(from + j * 32);
      *reinterpret_cast<uint4*>(state_.v + to + j * 32) =
          device::load_shared_16(from + Config::kTensorBytes + j * 32);
    }
    if (half == 0)
      state_.scores[row] = finite_score(device::load_shared(score_place(lane_.lane / 2)));
  }

 private:
  // Where a piece of a key's row of k lies in the stage.
  __device__ std::uint32_t place(int key, int piece) const {
    return stage_ + key * Config::kPitch + piece * 16;
  }
  __device__ std::uint32_t score_place(int key) const {
    return stage_ + 2 * Config::kTensorBytes + key * 4;
  }

  HeadState const& state_;
  NewTokens const& tokens_;
  VisibleRows const& rows_;
  int first_token_;  // of the run, in the call
  std::uint32_t stage_;
  LanePart<Config> lane_;
};

// --- arithmetic ----------------------------------------------------------------------------------

// The query rows of a pass: a query row is a pair of a token of the run and a head of the group.
template <typename T, typename Config>
class WarpAttention {
 public:
  static constexpr int kTiles = Config::kTiles;
  static constexpr int kAtOnce = 2;                           // pieces of queries
  static constexpr int kOutSteps = Config::kValuePieces * 4;  // of 16 rows of O^T

  // `queries`: of the pass, as operands in shared memory (query_place).
  __device__ WarpAttention(std::uint32_t queries, int lane)
      : lane_(lane), queries_(queries + lane * 16) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      reference_[tile] = -INFINITY;
      sum_[tile] = 0.0f;
#pragma unroll
      for (int step = 0; step < kOutSteps; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[tile][step][j] = 0.0f;
      }
    }
  }

  // Where the i-th two dimensions of a query row's piece lie in shared memory, [steps, lanes, 4
  // registers of 4 bytes]: halves of a piece are registers 0 and 2 of a step, 1 and 3 from row 8.
  __device__ static int query_place(int row, int piece, int i) {
    int const step = piece / 4 * 2 + i / 2, lane = row % 8 * 4 + piece % 4;
    return (step * 32 + lane) * 16 + (row / 8 + i % 2 * 2) * 4;
  }

  // Of query rows `lane / 4` of a tile and keys 2 (lane % 4), the next, and 8 keys on.
  struct Scores {
    float of[kTiles][4];
  };
  // The operand P^T of a block of keys.
  struct Weights {
    std::uint32_t of[kTiles][2];
  };

  // S = Q K^T.
  __device__ __forceinline__ Scores multiply(KeyPieces<Config> const& keys) const {
    float s[2][4] = {};  // of the halves of the keys
#pragma unroll
    for (int j = 0; j < Config::kKeyPieces; j += kAtOnce) {
      // NOTE: several at once, so that shared memory's latency is waited for once.
      uint4 q[kAtOnce][2];
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        if (j + i / 2 < Config::kKeyPieces) {
          q[i / 2][i % 2] = device::load_shared_16(queries_ + (2 * j + i) * 512);
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        if (j + i / 2 >= Config::kKeyPieces) continue;
        uint4 const a = q[i / 2][i % 2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint4 const k = keys.piece[h][j + i / 2];
          device::mma_m16n8k16<T>(s[h], {a.x, a.y, a.z, a.w}, i % 2 ? k.z : k.x, i % 2 ? k.w : k.y);
        }
      }
    }
    Scores scores;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores.of[tile][i] = s[i / 2][tile * 2 + i % 2];
    }
    return scores;
  }

  // Scores of keys that a query must not see become -inf.
  template <typename Sees>
  __device__ __forceinline__ void mask(Scores& scores, Sees sees) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!sees(key_of(i), tile * kTileRows + lane_ / 4)) {
          scores.of[tile][i] = -INFINITY;
        }
      }
    }
  }

  // Gates of a lane's keys; this lane's own key (lane % 16) has the score u and is gated or not.
  __device__ __forceinline__ void gates(float u, bool gated, float threshold,
                                        float (&gate)[4]) const {
    float const own = gated ? __saturatef(u - threshold) : 1.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) gate[i] = __shfl_sync(~0u, own, key_of(i));
  }

  // Softmax over the keys of a block.
  __device__ __forceinline__ Weights weigh(Scores& scores, float const (&gate)[4], Gate kind,
                                           float scale_log2) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores.of[tile][i] *= scale_log2;
    }
    raise_references(scores);
    Weights weights;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float(&s)[4] = scores.of[tile];
      float const shift = reference_[tile] == -INFINITY ? 0.0f : reference_[tile];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const p = device::exp2_approx(s[i] - shift);
        s[i] = p * gate[i];
        sum_[tile] += kind == Gate::kSoftmax ? s[i] : p;
      }
      weights.of[tile][0] = device::pack2<T>(s[0], s[1]);
      weights.of[tile][1] = device::pack2<T>(s[2], s[3]);
    }
    return weights;
  }

  // O^T += V^T P^T.
  __device__ __forceinline__ void add(ValuePieces<Config> const& values, Weights const& weights,
                                      int num_tiles) {
#pragma unroll
    for (int i = 0; i < Config::kValuePieces; ++i) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        auto const word = [&](int n) { return (&values.piece[n][i].x)[m]; };
        std::uint32_t const a[4] = {
            __byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
            __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632)};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (tile == 0 || tile < num_tiles) {
            device::mma_m16n8k16<T>(out_[tile][i * 4 + m], a, weights.of[tile][0],
                                    weights.of[tile][1]);
          }
        }
      }
    }
  }

  // Leaves the output of `count` query rows, not yet divided by the sums, in `out`
  // [count, kOutPitch], and references and sums in `weights`.
  __device__ __forceinline__ void store(int count, float* out, float2* weights) {
    int const group = lane_ / 4, pair = lane_ % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float sum = sum_[tile];
      for (int d = 1; d < 4; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (int const row = tile * kTileRows + group; pair == 0 && row < count) {
        weights[row] = {reference_[tile], sum};
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int const row = tile * kTileRows + pair * 2 + j;
        if (row >= count) continue;
#pragma unroll
        for (int i = 0; i < Config::kValuePieces; ++i) {
          int const piece = group + 8 * i;
          if (piece >= Config::kChunks) continue;
          auto* const to = reinterpret_cast<float4*>(out + row * Config::kOutPitch + piece * 8);
          float const(&o)[kOutSteps][4] = out_[tile];
          to[0] = {o[4 * i][j], o[4 * i][j + 2], o[4 * i + 1][j], o[4 * i + 1][j + 2]};
          to[1] = {o[4 * i + 2][j], o[4 * i + 2][j + 2], o[4 * i + 3][j], o[4 * i + 3][j + 2]};
        }
      }
    }
  }

 private:
  // The block's key that a lane's i-th score belongs to.
  __device__ int key_of(int i) const { return lane_ % 4 * 2 + i % 2 + i / 2 * 8; }

  // Weights are 2^(score - reference). The reference follows the maximum only where a score is more
  // than kSlack above it, which the first block settles mostly: one vote instead of reductions.
  // NOTE: weights up to 2^kSlack leave the sums in float32 and the weights in float16 as exact as
  // before.
  static constexpr float kSlack = 8.0f;
  __device__ __forceinline__ void raise_references(Scores const& scores) {
    float largest[kTiles];
    bool above = false;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float const(&s)[4] = scores.of[tile];
      largest[tile] = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
      above |= largest[tile] > reference_[tile] + kSlack;
    }
    if (!__any_sync(~0u, above)) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int d = 1; d < 4; d *= 2) {
        largest[tile] = fmaxf(largest[tile], __shfl_xor_sync(~0u, largest[tile], d));
      }
      largest[tile] = fmaxf(largest[tile], reference_[tile]);
      // Nothing is summed yet where the reference is -inf.
      float const rescale =
          largest[tile] == -INFINITY ? 1.0f : device::exp2_approx(reference_[tile] - largest[tile]);
      reference_[tile] = largest[tile];
      sum_[tile] *= rescale;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float const of_column = __shfl_sync(~0u, rescale, (lane_ % 4 * 2 + j) * 4);
#pragma unroll
        for (int step = 0; step < kOutSteps; ++step) {
          out_[tile][step][j] *= of_column;
          out_[tile][step][j + 2] *= of_column;
        }
      }
    }
  }

  int lane_;
  std::uint32_t queries_;                  // this lane's operand of the first step
  float out_[kTiles][kOutSteps][4];        // columns: query rows 2 (lane % 4) and the next
  float reference_[kTiles], sum_[kTiles];  // of query rows lane / 4; sums of this lane's keys alone
};

}  // namespace sparsek::cuda::portable
