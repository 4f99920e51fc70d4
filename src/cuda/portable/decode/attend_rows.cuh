// A warp's attention over blocks of 16 cache rows: copies that run ahead, scores, softmax, output.
//
// Everything is transposed: keys are the rows and query rows the columns of the matrix
// instructions, so that one query needs 8 columns and not 16 rows. S^T = K Q^T, then O^T = V^T P^T;
// the weights go from the result's layout to an operand's by movmatrix, without shared memory.
#pragma once
#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/portable/decode/config.cuh"

namespace sparsek::cuda::portable {

// --- which rows ----------------------------------------------------------------------------------

// The keys that a run of tokens sees, in blocks of 16: first the window's, the new tokens at their
// end, then the selected ones. The window's come first because an eviction does not move them: they
// are under way while it runs.
struct VisibleRows {
  int pool_end, run_begin, run_end;  // window: positions pool_end ... run_end - 1
  int num_selected;

  __device__ int num_recent() const { return run_end - pool_end; }
  __device__ int num_in_ring() const { return run_begin - pool_end; }
  __device__ int recent_blocks() const { return (num_recent() + kBlockKeys - 1) / kBlockKeys; }
  __device__ int num_blocks() const {
    return recent_blocks() + (num_selected + kBlockKeys - 1) / kBlockKeys;
  }
};

// Where 16 bytes of a row lie: rows 8 apart share banks, so pieces are permuted within 8 (or 4) by
// the row.
template <typename Config>
__device__ __forceinline__ int permuted(int row) {
  static_assert(Config::kChunks % 8 == 0 || Config::kChunks == 12);
  return Config::kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
}

// --- copies --------------------------------------------------------------------------------------

template <typename Config>
class RowLoader {
 public:
  __device__ RowLoader(HeadState const& state, NewTokens const& tokens, VisibleRows const& rows)
      : state_(state), tokens_(tokens), rows_(rows) {}

  // Starts to copy block `block` into the stage at `to`.
  __device__ void load(int block, std::uint32_t to) const {
    int const recent_blocks = rows_.recent_blocks();
    bool const recent = block < recent_blocks;
    int const first = (recent ? block : block - recent_blocks) * kBlockKeys;
    int const row = recent ? state_.window_row(rows_.pool_end + first) : first;
    int const end = recent ? state_.num_selected + static_cast<int>(state_.ring_rows.divisor)
                           : rows_.num_selected;
    if (state_.row_bytes == Config::kPitch && row + kBlockKeys <= end &&
        (!recent || first + kBlockKeys <= rows_.num_in_ring())) {
      load_adjacent(row, to);
    } else {
      load_each(first, recent, to);
    }
    // Scores, where they are needed: of selected keys for their gates, of new tokens for the state.
    int const i = first + static_cast<int>(threadIdx.x % 32);
    if (i < first + kBlockKeys && (!recent || first + kBlockKeys > rows_.num_in_ring())) {
      float const* source = state_.scores + i;
      bool exists = i < rows_.num_selected;
      if (recent) {
        exists = i >= rows_.num_in_ring() && i < rows_.num_recent();
        source = tokens_.scores + (rows_.pool_end + i - tokens_.first) * tokens_.stride_scores;
      }
      device::cp_async_4(to + 2 * Config::kTensorBytes + 4 * (i - first),
                         exists ? source : state_.scores, exists);
    }
  }

  // Writes the new tokens of a block that lies in `stage` to the state.
  __device__ void append(int block, std::uint32_t stage) const {
    int const first = block * kBlockKeys, column = threadIdx.x % 32;
    for (int i = max(first, rows_.num_in_ring()); i < min(first + kBlockKeys, rows_.num_recent());
         ++i) {
      int const row = state_.window_row(rows_.pool_end + i);
      if (column * 16 < state_.row_bytes) {
        std::int64_t const to = state_.offset(row) + column * 16;
        *reinterpret_cast<uint4*>(state_.k + to) =
            device::load_shared_16(place(stage, 0, i - first, column));
        *reinterpret_cast<uint4*>(state_.v + to) =
            device::load_shared_16(place(stage, 1, i - first, column));
      }
      if (column == 0) {
        float const u = device::load_shared(stage + 2 * Config::kTensorBytes + 4 * (i - first));
        state_.scores[row] = finite_score(u);
      }
    }
  }

 private:
  struct Source {
    std::byte const *k = nullptr, *v = nullptr;
    bool aligned = true;
  };

  __device__ Source state_row(int row) const {
    return {state_.k + state_.offset(row), state_.v + state_.offset(row), true};
  }
  __device__ Source source_of(int i, bool recent) const {
    if (!recent) return i < rows_.num_selected ? state_row(i) : Source{};
    if (i < rows_.num_in_ring()) return state_row(state_.window_row(rows_.pool_end + i));
    if (i >= rows_.num_recent()) return {};
    int const token = rows_.pool_end + i - tokens_.first;
    return {tokens_.k_row(token), tokens_.v_row(token), tokens_.aligned};
  }

  // Rows of full length that follow each other in the state.
  // NOTE: the distances between a lane's pieces are constants, in global and in shared memory.
  __device__ __forceinline__ void load_adjacent(int first, std::uint32_t to) const {
    std::byte const* k = state_.k + state_.offset(first);
    std::byte const* v = state_.v + state_.offset(first);
    if constexpr (32 % Config::kChunks == 0) {
      constexpr int kRows = 32 / Config::kChunks;  // of a warp's 32 pieces
      int const lane = static_cast<int>(threadIdx.x % 32);
      int const row = lane / Config::kChunks, column = lane % Config::kChunks;
      k += lane * 16, v += lane * 16;
      std::uint32_t const place = row * Config::kPitch + (column ^ row) * 16;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        std::uint32_t const at = to + (place ^ (i * kRows & 7) * 16) + i * kRows * Config::kPitch;
        device::cp_async_16(at, k + i * 512);
        device::cp_async_16(at + Config::kTensorBytes, v + i * 512);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        auto const [row, column] = piece(i);
        int const offset = row * Config::kPitch + column * 16;
        device::cp_async_16(place(to, 0, row, column), k + offset);
        device::cp_async_16(place(to, 1, row, column), v + offset);
      }
    }
  }

  // Rows from anywhere; a row without a source becomes zeros.
  // NOTE: the new tokens' block comes this way in every step; several addresses have to be on their
  // way at once.
  __device__ void load_each(int first, bool recent, std::uint32_t to) const {
#pragma unroll 4
    for (int i = 0; i < kPieces; ++i) {
      auto const [row, column] = piece(i);
      if (column * 16 >= state_.row_bytes) continue;
      Source const s = source_of(first + row, recent);
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor) {
        std::uint32_t const at = place(to, tensor, row, column);
        std::byte const* const from = (tensor ? s.v : s.k) + column * 16;
        if (!s.k) {
          device::store_shared_16(at, uint4{});
        } else if (s.aligned) {
          device::cp_async_16(at, from);
        } else {
          device::store_shared_16(at, load_16(from, false));
        }
      }
    }
  }

  // This lane's i-th piece of a tensor's 16 rows.
  static constexpr int kPieces = kBlockKeys * Config::kChunks / 32;
  struct Piece {
    int row, column;
  };
  __device__ static Piece piece(int i) {
    int const n = i * 32 + static_cast<int>(threadIdx.x % 32);
    return {n / Config::kChunks, n % Config::kChunks};
  }
  __device__ static std::uint32_t place(std::uint32_t stage, int tensor, int row, int column) {
    return stage + tensor * Config::kTensorBytes + row * Config::kPitch +
           (column ^ permuted<Config>(row)) * 16;
  }

  HeadState const& state_;
  NewTokens const& tokens_;
  VisibleRows const& rows_;
};

// --- arithmetic ----------------------------------------------------------------------------------

// What the gates of a call need.
struct Gating {
  Gate gate;
  float threshold;   // of the selected keys
  float scale_log2;  // sm_scale * log2(e)
};

// The query rows of a pass: a query row is a pair of a token of the run and a head of the group.
template <typename T, typename Config>
class WarpAttention {
 public:
  static constexpr int kTiles = Config::kTiles;
  static constexpr int kSteps = Config::kMaxDim / 16;  // of 16 dimensions

  __device__ WarpAttention() {
    // Addresses of a lane's rows in ldmatrix: of matrices (rows 0-7, 8-15) x (first, second piece)
    // for k, and (first, second piece) x (rows 0-7, 8-15) for v.
    int const k_row = lane() % 16, v_row = lane() % 8 + lane() / 16 * 8;
    k_offset_ = k_row * Config::kPitch + (lane() / 16 ^ permuted<Config>(k_row)) * 16;
    v_offset_ = Config::kTensorBytes + v_row * Config::kPitch +
                (lane() / 8 % 2 ^ permuted<Config>(v_row)) * 16;
  }

  // Reads the queries, before the first block: row(i) is the address of query row i of the pass, or
  // null; token(i) its number within the run.
  template <typename RowAddress, typename Token>
  __device__ void begin(int head_dim, bool aligned, RowAddress row, Token token) {
    int const group = lane() / 4, pair = lane() % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      std::byte const* const q = row(tile * kTileRows + group);
      if (q && !aligned) {
#pragma unroll
        for (int step = 0; step < 2 * kSteps; ++step) {
          int const d = step * 8 + pair * 2;
          auto const* const half = reinterpret_cast<std::uint16_t const*>(q) + d;
          query_[tile][step] = d < head_dim ? half[0] | std::uint32_t{half[1]} << 16 : 0;
        }
      } else {
#pragma unroll
        for (int step = 0; step < 2 * kSteps; ++step) {
          int const d = step * 8 + pair * 2;
          query_[tile][step] =
              q && d < head_dim ? *reinterpret_cast<std::uint32_t const*>(q + 2 * d) : 0;
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        token_[tile][j] = token(tile * kTileRows + pair * 2 + j);
        reference_[tile][j] = -INFINITY;
        sum_[tile][j] = 0.0f;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[tile][step][j] = 0.0f;
      }
    }
  }

  // Attends to a block that lies in `stage`. Of its keys `count` exist; key i of the block is token
  // first_token + i of the run (negative: older than the run), or a selected key. `masked`: some
  // query must not see all of them.
  __device__ void attend(std::uint32_t stage, int count, bool selected, bool masked,
                         int first_token, int num_tiles, Gating const& gating) {
    int const group = lane() / 4;
    float gate[2] = {1.0f, 1.0f};  // of keys `group` and `group + 8`
    if (selected && gating.gate != Gate::kNone) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float const u = device::load_shared(stage + 2 * Config::kTensorBytes + 4 * (group + 8 * i));
        gate[i] = __saturatef(u - gating.threshold);
      }
    }
    float scores[kTiles][4];
    multiply_keys(stage, num_tiles, scores);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[tile][j] *= gating.scale_log2;
        if (masked) {
          int const key = group + j / 2 * 8;
          bool const visible =
              key < count && (selected || first_token + key <= token_[tile][j % 2]);
          if (!visible) scores[tile][j] = -INFINITY;
        }
      }
    }
    raise_references(scores, num_tiles);
    std::uint32_t weights[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float(&s)[4] = scores[tile];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float const shift = reference_[tile][j] == -INFINITY ? 0.0f : reference_[tile][j];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float const p = device::exp2_approx(s[j + 2 * i] - shift);
          s[j + 2 * i] = p * gate[i];
          sum_[tile][j] += gating.gate == Gate::kSoftmax ? s[j + 2 * i] : p;
        }
      }
      weights[tile][0] = device::movmatrix(device::pack2<T>(s[0], s[1]));
      weights[tile][1] = device::movmatrix(device::pack2<T>(s[2], s[3]));
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t v[4];
      device::ldmatrix_x4_transposed(v, stage + piece(v_offset_, step));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile == 0 || tile < num_tiles) {
          device::mma_m16n8k16<T>(out_[tile][step], v, weights[tile][0], weights[tile][1]);
        }
      }
    }
  }

  // Leaves the output, not yet divided by the sums, in `out` [kQueryRows, kOutPitch], and
  // references and sums in `weights`.
  __device__ void store(float* out, float2* weights) {
    int const group = lane() / 4, pair = lane() % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int const row = tile * kTileRows + pair * 2 + j;
        float sum = sum_[tile][j];
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (group == 0) weights[row] = {reference_[tile][j], sum};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          out[row * Config::kOutPitch + step * 16 + group] = out_[tile][step][j];
          out[row * Config::kOutPitch + step * 16 + group + 8] = out_[tile][step][j + 2];
        }
      }
    }
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  // From the address of a lane's piece at dimension 0 to that at dimension 16 * step.
  __device__ static int piece(int offset, int step) {
    constexpr int kPermutedSteps = Config::kChunks % 8 == 0 ? 4 : 2;
    return (offset ^ step % kPermutedSteps * 32) + step / kPermutedSteps * kPermutedSteps * 32;
  }

  // scores = K Q^T. Two chains of sums for each tile: one would be waited for at every step.
  __device__ __forceinline__ void multiply_keys(std::uint32_t stage, int num_tiles,
                                                float (&scores)[kTiles][4]) const {
    float other[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[tile][j] = other[tile][j] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t k[4];
      device::ldmatrix_x4(k, stage + piece(k_offset_, step));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile == 0 || tile < num_tiles) {
          device::mma_m16n8k16<T>(step % 2 ? other[tile] : scores[tile], k, query_[tile][2 * step],
                                  query_[tile][2 * step + 1]);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[tile][j] += other[tile][j];
    }
  }

  // Weights are 2^(score - reference). The reference follows the maximum only where a score is more
  // than kSlack above it, which the first block settles mostly: one vote instead of reductions.
  // NOTE: weights up to 2^kSlack leave the sums in float32 and the weights in float16 as exact as
  // before.
  static constexpr float kSlack = 8.0f;
  __device__ __forceinline__ void raise_references(float const (&scores)[kTiles][4],
                                                   int num_tiles) {
    bool above = false;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        above |= fmaxf(scores[tile][j], scores[tile][j + 2]) > reference_[tile][j] + kSlack;
      }
    }
    if (!__any_sync(~0u, above)) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= num_tiles) continue;
      float rescale[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float largest = fmaxf(scores[tile][j], scores[tile][j + 2]);
        for (int d = 4; d < 32; d *= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
        }
        largest = fmaxf(largest, reference_[tile][j]);
        // Nothing is summed yet where the reference is -inf.
        rescale[j] =
            largest == -INFINITY ? 1.0f : device::exp2_approx(reference_[tile][j] - largest);
        reference_[tile][j] = largest;
        sum_[tile][j] *= rescale[j];
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[tile][step][j] *= rescale[j % 2];
      }
    }
  }

  std::uint32_t query_[kTiles][2 * kSteps];
  float out_[kTiles][kSteps][4];                 // columns: query rows 2 (lane % 4) and the next
  float reference_[kTiles][2], sum_[kTiles][2];  // of those rows; sums of this lane's keys alone
  int token_[kTiles][2];
  int k_offset_, v_offset_;
};

}  // namespace sparsek::cuda::portable
