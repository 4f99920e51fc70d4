// A warp's attention over blocks of 16 cache rows: copies that run ahead, scores, softmax, output.
//
// Everything is transposed: keys are the rows and query rows the columns of the matrix instructions, so that one query needs 8
// columns and not 16 rows. S^T = K Q^T, then O^T = V^T P^T; the weights go from the result's layout to an operand's by
// movmatrix, without shared memory.
#pragma once
#include <cstdint>

#include "cuda/device/cp_async.cuh"
#include "cuda/device/mma_sync.cuh"
#include "cuda/portable/decode/config.cuh"

namespace sparsek::cuda::portable {

// --- which rows ----------------------------------------------------------------------------------

// The keys that a run of tokens sees, in blocks of 16: first the window's, the new tokens at their end, then the selected
// ones. The window's come first because an eviction does not move them: they are under way while it runs.
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

// Where 16 bytes of a row lie: rows 8 apart share banks, so pieces are permuted within 8 (or 4) by the row.
template <typename Config>
__device__ __forceinline__ int permuted(int row) {
  static_assert(Config::kChunks % 8 == 0 || Config::kChunks == 12);
  return Config::kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
}

// --- copies --------------------------------------------------------------------------------------

template <typename Config>
class RowLoader {
 public:
  __device__ RowLoader(HeadState const& state, NewTokens const& tokens, VisibleRows const& rows,
                       std::uint32_t stages)
      : state_(state), tokens_(tokens), rows_(rows), stages_(stages) {}

  // Starts to copy block `block` into a stage.
  __device__ void load(int block, int stage) const {
    std::uint32_t const to = stages_ + stage * Config::kStageBytes;
    int const recent_blocks = rows_.recent_blocks();
    if (block < recent_blocks) {
      int const first = block * kBlockKeys;
      int const row = state_.window_row(rows_.pool_end + first);
      bool const in_ring = first + kBlockKeys <= rows_.num_in_ring() &&
                           row + kBlockKeys <= state_.num_selected + state_.ring_rows();
      if (in_ring) return load_adjacent(row, to);
      load_each(to, [&](int i) { return recent_row(first + i); });
    } else {
      int const first = (block - recent_blocks) * kBlockKeys;
      if (first + kBlockKeys <= rows_.num_selected) {
        load_adjacent(first, to);
      } else {
        load_each(to, [&](int i) {
          return first + i < rows_.num_selected ? state_row(first + i) : Source{};
        });
      }
      int const lane = threadIdx.x % 32;
      if (lane < kBlockKeys) {
        bool const exists = first + lane < rows_.num_selected;
        device::cp_async_4(to + 2 * Config::kTensorBytes + 4 * lane,
                           state_.scores + (exists ? first + lane : 0), exists);
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
  __device__ Source recent_row(int i) const {
    if (i < rows_.num_in_ring()) return state_row(state_.window_row(rows_.pool_end + i));
    if (i >= rows_.num_recent()) return {};
    int const token = rows_.pool_end + i - tokens_.first;
    return {tokens_.k_row(token), tokens_.v_row(token), tokens_.aligned};
  }

  // Rows that follow each other in the state.
  __device__ void load_adjacent(int row, std::uint32_t to) const {
    std::byte const* const k = state_.k + state_.offset(row);
    std::byte const* const v = state_.v + state_.offset(row);
    if (state_.row_bytes == Config::kPitch) {
      copy_adjacent(k, v, Config::kPitch, to);
    } else {
      copy_adjacent(k, v, state_.row_bytes, to);
    }
  }
  __device__ __forceinline__ void copy_adjacent(std::byte const* k, std::byte const* v,
                                                int row_bytes, std::uint32_t to) const {
#pragma unroll
    for (int tensor = 0; tensor < 2; ++tensor) {
#pragma unroll
      for (int i = 0; i < kBlockKeys * Config::kChunks / 32; ++i) {
        int const piece = i * 32 + static_cast<int>(threadIdx.x % 32);
        int const row = piece / Config::kChunks, column = piece % Config::kChunks;
        if (column * 16 < row_bytes) {
          device::cp_async_16(destination(to, tensor, row, column),
                              (tensor ? v : k) + row * row_bytes + column * 16);
        }
      }
    }
  }

  // Rows from anywhere; a row without a source becomes zeros.
  template <typename RowSource>
  __device__ void load_each(std::uint32_t to, RowSource source) const {
#pragma unroll 1
    for (int i = 0; i < kBlockKeys * Config::kChunks / 32; ++i) {
      int const piece = i * 32 + static_cast<int>(threadIdx.x % 32);
      int const row = piece / Config::kChunks, column = piece % Config::kChunks;
      if (column * 16 >= state_.row_bytes) continue;
      Source const s = source(row);
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor) {
        std::uint32_t const at = destination(to, tensor, row, column);
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

  __device__ static std::uint32_t destination(std::uint32_t to, int tensor, int row, int column) {
    return to + tensor * Config::kTensorBytes + row * Config::kPitch +
           (column ^ permuted<Config>(row)) * 16;
  }

  HeadState const& state_;
  NewTokens const& tokens_;
  VisibleRows const& rows_;
  std::uint32_t stages_;
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

  // Reads the queries: row(i) is the address of query row i of the pass, or null; token(i) its
  // number within the run.
  template <typename RowAddress, typename Token>
  __device__ WarpAttention(int head_dim, bool aligned, RowAddress row, Token token) {
    int const group = lane() / 4, pair = lane() % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      auto const* const q = reinterpret_cast<std::uint16_t const*>(row(tile * kTileRows + group));
#pragma unroll
      for (int step = 0; step < 2 * kSteps; ++step) {
        int const d = step * 8 + pair * 2;
        std::uint32_t value = 0;
        if (q && d < head_dim) {
          value = aligned ? *reinterpret_cast<std::uint32_t const*>(q + d)
                          : q[d] | std::uint32_t{q[d + 1]} << 16;
        }
        query_[tile][step] = value;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        token_[tile][j] = token(tile * kTileRows + pair * 2 + j);
        maximum_[tile][j] = -INFINITY;
        sum_[tile][j] = 0.0f;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[tile][step][j] = 0.0f;
      }
    }
    // Addresses of a lane's rows in ldmatrix: of matrices (rows 0-7, 8-15) x (first, second piece)
    // for k, and (first, second piece) x (rows 0-7, 8-15) for v.
    int const k_row = lane() % 16, v_row = lane() % 8 + lane() / 16 * 8;
    k_offset_ = k_row * Config::kPitch + (lane() / 16 ^ permuted<Config>(k_row)) * 16;
    v_offset_ = Config::kTensorBytes + v_row * Config::kPitch +
                (lane() / 8 % 2 ^ permuted<Config>(v_row)) * 16;
  }

  // Attends to a block that lies in `stage`. Of its keys `count` exist; key i of the block is token
  // first_token + i of the run (negative: older than the run), or a selected key.
  __device__ void attend(std::uint32_t stage, int count, bool selected, int first_token,
                         int num_tiles, Gating const& gating) {
    int const group = lane() / 4;
    float scores[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[tile][j] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t k[4];
      device::ldmatrix_x4(k, stage + piece(k_offset_, step));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile < num_tiles) {
          device::mma_m16n8k16<T>(scores[tile], k, query_[tile][2 * step],
                                  query_[tile][2 * step + 1]);
        }
      }
    }
    // Keys `group` and `group + 8`.
    float gate[2] = {1.0f, 1.0f};
    if (selected && gating.gate != Gate::kNone) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float const u = device::load_shared(stage + 2 * Config::kTensorBytes + 4 * (group + 8 * i));
        gate[i] = __saturatef(u - gating.threshold);
      }
    }
    std::uint32_t weights[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile < num_tiles) {
        weigh(tile, scores[tile], gate, count, selected, first_token, gating, weights[tile]);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t v[4];
      device::ldmatrix_x4_transposed(v, stage + piece(v_offset_, step));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile < num_tiles) {
          device::mma_m16n8k16<T>(out_[tile][step], v, weights[tile][0], weights[tile][1]);
        }
      }
    }
  }

  // Leaves the output, not yet divided by the sums, in `out` [kQueryRows, kOutPitch], and maxima and
  // sums in `weights`.
  __device__ void store(float* out, float2* weights) {
    int const group = lane() / 4, pair = lane() % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int const row = tile * kTileRows + pair * 2 + j;
        float sum = sum_[tile][j];
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (group == 0) weights[row] = {maximum_[tile][j], sum};
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

  // From scores to weights, as the second product's operand; goes on with maxima and sums.
  __device__ __forceinline__ void weigh(int tile, float (&s)[4], float const (&gate)[2], int count,
                                        bool selected, int first_token, Gating const& gating,
                                        std::uint32_t (&weights)[2]) {
    int const group = lane() / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int const key = group + j / 2 * 8;
      bool const visible = key < count && (selected || first_token + key <= token_[tile][j % 2]);
      s[j] = visible ? s[j] * gating.scale_log2 : -INFINITY;
    }
    float rescale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float largest = fmaxf(s[j], s[j + 2]);
      for (int d = 4; d < 32; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
      largest = fmaxf(largest, maximum_[tile][j]);
      float const shift = largest == -INFINITY ? 0.0f : largest;
      rescale[j] = device::exp2_approx(maximum_[tile][j] - shift);
      maximum_[tile][j] = largest;
      float sum = sum_[tile][j] * rescale[j];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float const p = device::exp2_approx(s[j + 2 * i] - shift);
        float const gated = p * gate[i];
        sum += gating.gate == Gate::kSoftmax ? gated : p;
        s[j + 2 * i] = gated;
      }
      sum_[tile][j] = sum;
    }
    if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[tile][step][j] *= rescale[j % 2];
      }
    }
    weights[0] = device::movmatrix(device::pack2<T>(s[0], s[1]));
    weights[1] = device::movmatrix(device::pack2<T>(s[2], s[3]));
  }

  std::uint32_t query_[kTiles][2 * kSteps];
  float out_[kTiles][kSteps][4];               // columns: query rows 2 (lane % 4) and the next
  float maximum_[kTiles][2], sum_[kTiles][2];  // of those rows; sums of this lane's keys alone
  int token_[kTiles][2];
  int k_offset_, v_offset_;
};

}  // namespace sparsek::cuda::portable
