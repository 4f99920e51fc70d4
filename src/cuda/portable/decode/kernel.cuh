// One decode call for one KV head: append, evict and attend in one kernel.
//
// A cluster of blocks (one block before sm_90) owns the head; its warps share the rows in blocks of
// 16. The call's tokens are cut into runs within one chunk. A run
//   1. evicts, where it enters a chunk: the first block of the cluster does, the others wait;
//   2. attends: new tokens come from the call's tensors, older ones from the state;
//   3. appends: the warp that attends to a new token writes its row to the state, where nobody
//      reads it yet;
//   4. combines the warps' results in a fixed order, first in each block, then over the cluster.
#pragma once
#include <cstdint>

#include "cuda/device/cluster.cuh"
#include "cuda/portable/decode/attend_rows.cuh"
#include "cuda/portable/decode/config.cuh"

namespace sparsek::cuda::portable {

// NOTE: the registers are full of rows. What is needed before and after lies in shared memory
// meanwhile (Shared::head, pass), and everything is derived from there again; kept in registers it
// would end in local memory, for which the rows leave no place in L1.
template <typename T, typename Config>
class DecodeBlock {
 public:
  using Shared = typename Config::Shared;

  __device__ DecodeBlock(DecodeCall const& call, Shared& shared, std::byte* dynamic_shared)
      : call_(call),
        p_(call.problem),
        shared_(shared),
        memory_(dynamic_shared),
        thread_(threadIdx.x) {}

  __device__ void run() {
    int const number = static_cast<int>(blockIdx.x) >> call_.cluster_log2;
    Head head;
    head.batch = call_.kv_heads.quotient(number), head.kv_head = call_.kv_heads.remainder(number);
    Sequence const sequence(p_, head.batch);
    head.first_row = sequence.first_row;
    head.memory = sequence.block + head.kv_head * p_.layout.head_bytes;
    DecodeHeadHeader header = empty_header();
    if (sequence.exists && sequence.continues) header = HeadState(call_, head.memory).read_header();
    head.first = header.num_tokens;
    head.count = min(sequence.valid, kMaxTokens - head.first);
    threshold_ = header.threshold;
    if (threadIdx.x == 0) {
      shared_.head = head;
      shared_.missing = sequence.count - head.count;
      shared_.exists = sequence.exists;
    }
    Pass pass{};
    pass.end = head.first;
#pragma unroll 1
    while (pass.end < head.first + head.count) {
      begin_run(head, pass);
      int const num_rows = (pass.end - pass.begin) * group();
#pragma unroll 1
      for (pass.first = 0; pass.first < num_rows; pass.first += Config::kQueryRows) {
        pass.count = min(num_rows - pass.first, Config::kQueryRows);
        attend(head, pass);
        pass = shared_.pass;
        combine(pass);
        head = shared_.head;
        // NOTE: for the compiler another number, so that it does not compute what follows from it
        // before the loops, and keep it.
        asm volatile("" : "+r"(thread_));
      }
    }
    __syncthreads();
    finish();
  }

 private:
  static constexpr int kThreads = Config::kThreads;
  __device__ int lane() const { return static_cast<int>(thread_ % 32); }
  __device__ int warp() const { return static_cast<int>(thread_ / 32); }
  // Of the block in its cluster.
  __device__ int rank() const { return blockIdx.x & ((1 << call_.cluster_log2) - 1); }

  // Of the block, or of the cluster where it has several.
  __device__ void sync_cluster() const {
    if (call_.cluster_log2 == 0) {
      __syncthreads();
    } else {
      __syncwarp();
      device::cluster_arrive();
      device::cluster_wait();
    }
  }

  // The run that follows the one in `pass`.
  __device__ void begin_run(Head const& head, Pass& pass) {
    HeadState const state(call_, head.memory);
    pass.begin = pass.end;
    int const left_in_chunk =
        static_cast<int>(call_.chunk_size.divisor) - call_.chunk_size.remainder(pass.begin);
    pass.end += min(min(head.first + head.count - pass.begin, left_in_chunk), kMaxRun);
    int const old_pool_end = state.pool_end(pass.begin);
    pass.pool_end = state.pool_end(pass.end);
    if (pass.pool_end > old_pool_end) evict_keys(head, old_pool_end, pass.pool_end);
  }

  // The pool has grown: its first keys take their rows. All blocks of the cluster.
  __device__ void evict_keys(Head const& head, int old_pool_end, int pool_end) {
    if (rank() == 0) {
      std::byte* const lists =
          call_.lists ? call_.lists + (blockIdx.x >> call_.cluster_log2) * call_.list_bytes
                      : memory_;
      evict<typename Config::Evict>(call_, head, old_pool_end, pool_end, lists, shared_.eviction);
    }
    sync_cluster();
    threshold_ = __ldcg(&HeadState(call_, head.memory).header->threshold);
  }

  // Every n-th block of 16 rows, 32 of them at a time.
  struct Blocks {
    int base, stride;  // rows
    unsigned left;     // which of the 32 are wanted and still to come
  };

  // The first pass of a run also writes its tokens to the state.
  //
  // Most warps take blocks of 16 old keys, which they load directly, each every n-th. One warp
  // takes the others: the last and first rows of the ring, new tokens, less than 16 keys. (If rows
  // are shorter than the instance's, none is loaded directly and all warps share them.)
  __device__ void attend(Head const& head, Pass const& pass) {
    if (threadIdx.x == 0) shared_.pass = pass;
    WarpAttention<T, Config> attention(device::shared_address(shared_.queries), lane());
    if (full_rows() && warp() < Config::kRowWarps) {
      attend_direct(head, pass, attention);
    } else {
      attend_staged(head, pass, attention);
    }
    __syncwarp();  // results take the stage's place
    attention.store(shared_.pass.count, out_of_warp(warp()), shared_.of_warp[warp()]);
  }

  // The next block is under way while one is attended to.
  __device__ __forceinline__ void attend_direct(Head const& head, Pass const& pass,
                                                WarpAttention<T, Config>& attention) {
    KeyPieces<Config> keys;
    ValuePieces<Config> values;
    HeadState const state(call_, head.memory);
    RowLoader<Config> const loader(p_.layout, head.memory, lane());
    Blocks blocks = every(rank() * Config::kRowWarps + warp(), Config::kRowWarps);
    VisibleRows const rows(state, pass.pool_end, pass.begin, pass.end);
    int row = next(blocks, [&](int row) { return rows.are_old(row); });
    if (row >= 0) {
      loader.load(row, keys);
      loader.load_score(row, keys);
      loader.load(row, values);
    } else {
      keys.clear(), values.clear();
    }
    read_queries(head, pass);
    device::cp_async_wait_all();
    wait_for_queries();
    while (row >= 0) {
      auto scores = attention.multiply(keys);
      float gate[4];
      attention.gates(keys.score, gated(row), threshold_, gate);
      row = next(blocks, [&](int row) {
        HeadState const state(call_, shared_.head.memory);
        Pass const pass = shared_.pass;
        return VisibleRows(state, pass.pool_end, pass.begin, pass.end).are_old(row);
      });
      if (row >= 0) {
        loader.load(row, keys);
        loader.load_score(row, keys);
      }
      auto const weights = attention.weigh(scores, gate, p_.gate, scale_log2());
      attention.add(values, weights, num_tiles());
      if (row >= 0) loader.load(row, values);
    }
  }

  __device__ __forceinline__ void attend_staged(Head const& head, Pass const& pass,
                                                WarpAttention<T, Config>& attention) {
    HeadState const state(call_, head.memory);
    VisibleRows const rows(state, pass.pool_end, pass.begin, pass.end);
    NewTokens const tokens = tokens_of(call_, head);
    RowStage<Config> const stage(state, tokens, rows, pass.begin - head.first, stage_address(),
                                 lane());
    Blocks blocks =
        full_rows() ? every(rank(), 1) : every(rank() * Config::kWarps + warp(), Config::kWarps);
    read_queries(head, pass);
    device::cp_async_commit();
    bool is_first = true;
#pragma unroll 1
    while (true) {
      int const row = next(blocks, [&](int row) { return is_staged(rows, row); });
      if (row >= 0) stage.copy(row);
      device::cp_async_commit();
      if (is_first) {
        device::cp_async_wait_group<1>();
        wait_for_queries();
        is_first = false;
      }
      if (row < 0) break;
      KeyPieces<Config> keys;
      ValuePieces<Config> values;
      stage.wait();
      if (pass.first == 0) stage.append(row);
      stage.load(keys);
      auto scores = attention.multiply(keys);
      attention.mask(scores, [&](int key, int column) {
        int const r = row + key;
        return rows.exists(r) &&
               (rows.is_selected(r) || rows.token(r) <= call_.group.quotient(pass.first + column));
      });
      float gate[4];
      attention.gates(keys.score, gated(row + lane() % kBlockKeys), threshold_, gate);
      auto const weights = attention.weigh(scores, gate, p_.gate, scale_log2());
      stage.load(values);
      attention.add(values, weights, num_tiles());
      __syncwarp();  // all lanes have read the stage
    }
  }

  // All warps, each in the role it has.
  __device__ static void wait_for_queries() {
    asm volatile("barrier.cta.sync 1, %0;" ::"n"(kThreads) : "memory");
  }
  __device__ float scale_log2() const {
    return static_cast<float>(p_.sm_scale) * 1.4426950408889634f;
  }
  __device__ int num_tiles() const {
    return Config::kTiles == 1 ? 1 : (shared_.pass.count + kTileRows - 1) / kTileRows;
  }

  __device__ Blocks every(int first, int stride) const {
    int const rows = (stride << call_.cluster_log2) * kBlockKeys;
    return {first * kBlockKeys - 32 * rows, rows, 0};
  }
  // The first row of the next block that is wanted, negative if there is none. All lanes.
  template <typename Wanted>
  __device__ int next(Blocks& blocks, Wanted wanted) const {
    int const end = static_cast<int>(p_.layout.num_rows);
#pragma unroll 1
    while (blocks.left == 0) {
      blocks.base += 32 * blocks.stride;
      if (blocks.base >= end) return -1;
      int const row = blocks.base + lane() * blocks.stride;
      blocks.left = __ballot_sync(~0u, row < end && wanted(row));
    }
    int const row = blocks.base + (__ffs(blocks.left) - 1) * blocks.stride;
    blocks.left &= blocks.left - 1;
    return row;
  }
  __device__ bool is_staged(VisibleRows const& rows, int row) const {
    return rows.some_exist(row) && !(full_rows() && rows.are_old(row));
  }
  __device__ bool full_rows() const { return row_bytes() == Config::kPitch; }
  __device__ bool gated(int row) const {
    return p_.gate != Gate::kNone && row < static_cast<int>(p_.layout.num_selected);
  }

  // Starts to copy the queries of a pass to shared memory; rows and dimensions that do not exist
  // are zeros.
  __device__ void read_queries(Head const& head, Pass const& pass) const {
    using Attention = WarpAttention<T, Config>;
    auto const* const q =
        static_cast<std::byte const*>(p_.q) +
        2 * (head.batch * p_.stride_q_batch + head.first_row * p_.stride_q_position);
    std::uint32_t const to = device::shared_address(shared_.queries);
#pragma unroll 1
    for (int i = static_cast<int>(thread_); i < Config::kQueryRows * Config::kChunks;
         i += kThreads) {
      int const row = i / Config::kChunks, piece = i % Config::kChunks;
      bool const exists = row < pass.count && piece * 16 < row_bytes();
      std::byte const* from = q;
      if (exists) {
        from += 2 * (head_of(head, pass.first + row) * p_.stride_q_head +
                     token_of(head, pass, row) * p_.stride_q_position) +
                piece * 16;
      }
      if (call_.aligned_queries || !exists) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          device::cp_async_4(to + Attention::query_place(row, piece, j), from + 4 * j, exists);
        }
      } else {
        uint4 const data = load_16(from, false);
        device::store_shared_4(to + Attention::query_place(row, piece, 0), data.x);
        device::store_shared_4(to + Attention::query_place(row, piece, 1), data.y);
        device::store_shared_4(to + Attention::query_place(row, piece, 2), data.z);
        device::store_shared_4(to + Attention::query_place(row, piece, 3), data.w);
      }
    }
  }

  // --- results

  __device__ int row_bytes() const { return static_cast<int>(p_.head_dim) * 2; }
  __device__ int group() const { return static_cast<int>(call_.group.divisor); }
  __device__ int head_of(Head const& head, int query_row) const {
    return head.kv_head * group() + call_.group.remainder(query_row);
  }
  // Of a query row of a pass, the token within the call.
  __device__ int token_of(Head const& head, Pass const& pass, int row) const {
    return pass.begin - head.first + call_.group.quotient(pass.first + row);
  }
  // Of a warp: its stage, then its outputs [kQueryRows, kOutPitch]; of the block, [kQueryRows,
  // kMaxDim].
  __device__ std::uint32_t stage_address() const {
    return device::shared_address(memory_ + warp() * Config::kWarpBytes);
  }
  __device__ float* out_of_warp(int warp) const {
    return reinterpret_cast<float*>(memory_ + warp * Config::kWarpBytes);
  }
  __device__ float* out_of_block() const { return out_of_warp(Config::kWarps); }

  // Sums over the warps, then over the blocks of the cluster, and writes the rows. Ends with a
  // barrier, after which all blocks see what has been appended.
  __device__ void combine(Pass const& pass) {
    constexpr int kPieces = Config::kMaxDim / 4;  // of 4 dimensions
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(thread_); i < pass.count * kPieces; i += kThreads) {
      int const row = i / kPieces, d = i % kPieces * 4;
      if (d * 2 >= row_bytes()) continue;
      Weighted result;
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) result.raise(shared_.of_warp[w][row].x);
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        float const* const out = out_of_warp(w) + row * Config::kOutPitch + d;
        result.add(shared_.of_warp[w][row], *reinterpret_cast<float4 const*>(out));
      }
      if (call_.cluster_log2 == 0) {
        write(pass, row, d, result);
      } else {
        *reinterpret_cast<float4*>(out_of_block() + row * Config::kMaxDim + d) = result.out;
        if (d == 0) shared_.of_block[row] = {result.maximum, result.sum};
      }
    }
    if (call_.cluster_log2 == 0) {
      __syncthreads();
    } else {
      combine_cluster(pass);
    }
  }

  __device__ void combine_cluster(Pass const& pass) {
    constexpr int kPieces = Config::kMaxDim / 4;
    int const cluster_size = 1 << call_.cluster_log2;
    sync_cluster();
    std::uint32_t const of_block = device::shared_address(shared_.of_block);
    std::uint32_t const out = device::shared_address(out_of_block());
    for (int i = rank() + static_cast<int>(thread_ << call_.cluster_log2); i < pass.count * kPieces;
         i += kThreads << call_.cluster_log2) {
      int const row = i / kPieces, d = i % kPieces * 4;
      if (d * 2 >= row_bytes()) continue;
      // All loads are under way at once; ranks beyond the cluster's size read the first block
      // again.
      float2 weights[kMaxClusterSize];
      float4 part[kMaxClusterSize];
#pragma unroll
      for (int r = 0; r < kMaxClusterSize; ++r) {
        int const rank = r < cluster_size ? r : 0;
        weights[r] = device::load_from_rank_x2(of_block + 8 * row, rank);
        part[r] = device::load_from_rank_x4(out + 4 * (row * Config::kMaxDim + d), rank);
      }
      Weighted result;
#pragma unroll
      for (int r = 0; r < kMaxClusterSize; ++r) result.raise(weights[r].x);
#pragma unroll
      for (int r = 0; r < kMaxClusterSize; ++r) {
        if (r < cluster_size) result.add(weights[r], part[r]);
      }
      write(pass, row, d, result);
    }
    // Nobody leaves, or goes on, while others read its memory.
    // NOTE: at the end nobody has to see what was written to the state; waiting for that would take
    // a good part of a microsecond.
    bool const is_last = pass.end == shared_.head.first + shared_.head.count &&
                         pass.first + Config::kQueryRows >= (pass.end - pass.begin) * group();
    if (is_last) {
      __syncwarp();
      device::cluster_arrive_relaxed();
      device::cluster_wait();
    } else {
      sync_cluster();
    }
  }

  // Sums of weights and outputs that were taken relative to different maxima.
  struct Weighted {
    float maximum = -INFINITY, sum = 0.0f;
    float4 out{0.0f, 0.0f, 0.0f, 0.0f};

    __device__ void raise(float other) { maximum = fmaxf(maximum, other); }
    // A part without a visible key has the maximum -inf and counts nothing. All maxima are known.
    __device__ void add(float2 weights, float4 part) {
      float const scale = weights.x == -INFINITY ? 0.0f : device::exp2_approx(weights.x - maximum);
      sum = fmaf(weights.y, scale, sum);
      out.x = fmaf(part.x, scale, out.x), out.y = fmaf(part.y, scale, out.y);
      out.z = fmaf(part.z, scale, out.z), out.w = fmaf(part.w, scale, out.w);
    }
  };

  __device__ std::byte* out_address(Head const& head, int q_head, int token, int d) const {
    return static_cast<std::byte*>(p_.out) +
           2 * (head.batch * p_.stride_out_batch + q_head * p_.stride_out_head +
                (head.first_row + token) * p_.stride_out_position + d);
  }
  __device__ float* lse_address(Head const& head, int q_head, int token) const {
    return p_.lse + head.batch * p_.stride_lse_batch + q_head * p_.stride_lse_head +
           (head.first_row + token) * p_.stride_lse_position;
  }

  __device__ void write(Pass const& pass, int row, int d, Weighted const& r) const {
    Head const head = shared_.head;
    int const q_head = head_of(head, pass.first + row), token = token_of(head, pass, row);
    float const scale = r.sum > 0.0f ? __fdividef(1.0f, r.sum) : 0.0f;
    store_4(out_address(head, q_head, token, d), device::pack2<T>(r.out.x * scale, r.out.y * scale),
            device::pack2<T>(r.out.z * scale, r.out.w * scale));
    if (d == 0 && p_.lse) {
      *lse_address(head, q_head, token) = (r.maximum + log2f(r.sum)) * 0.6931471805599453f;
    }
  }

  __device__ void store_4(std::byte* to, std::uint32_t low, std::uint32_t high) const {
    if (call_.aligned_queries) {
      *reinterpret_cast<uint2*>(to) = {low, high};
    } else {
      auto* const half = reinterpret_cast<std::uint16_t*>(to);
      half[0] = static_cast<std::uint16_t>(low), half[1] = static_cast<std::uint16_t>(low >> 16);
      half[2] = static_cast<std::uint16_t>(high), half[3] = static_cast<std::uint16_t>(high >> 16);
    }
  }

  // The header, and output 0 and lse -inf for tokens of the call that do not exist. The other
  // blocks have read the old header before the last barrier of the last pass.
  __device__ void finish() const {
    Head const head = shared_.head;
    if (rank() == 0 && threadIdx.x == 0 && shared_.exists) {
      HeadState(call_, head.memory).finish(head.first + head.count);
    }
    int const pieces = row_bytes() / 8, missing = shared_.missing;
    for (int token = head.count; token < head.count + missing; ++token) {
      for (int i = rank() * kThreads + static_cast<int>(threadIdx.x); i < group() * pieces;
           i += kThreads << call_.cluster_log2) {
        int const q_head = head.kv_head * group() + i / pieces, d = i % pieces * 4;
        store_4(out_address(head, q_head, token, d), 0, 0);
        if (d == 0 && p_.lse) *lse_address(head, q_head, token) = -INFINITY;
      }
    }
  }

  DecodeCall const& call_;
  DecodeProblem const& p_;
  Shared& shared_;
  std::byte* memory_;  // dynamic shared memory
  unsigned thread_;
  float threshold_;
};

// NOTE: before sm_90 there are no clusters, and the instances for them are empty.
template <typename T, int kMaxDim, int kTiles, int kBlocksPerSm>
__global__ void __launch_bounds__((DecodeConfig<kMaxDim, kTiles>::kThreads), kBlocksPerSm)
    decode_kernel(__grid_constant__ DecodeCall const call) {
  using Config = DecodeConfig<kMaxDim, kTiles>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kIsUsed = kBlocksPerSm == Config::kBlocksPerSm;
#else
  constexpr bool kIsUsed = true;
#endif
  if constexpr (kIsUsed) {
    extern __shared__ __align__(128) std::byte dynamic_shared[];
    __shared__ typename Config::Shared shared;
    DecodeBlock<T, Config>(call, shared, dynamic_shared).run();
  }
}

}  // namespace sparsek::cuda::portable
