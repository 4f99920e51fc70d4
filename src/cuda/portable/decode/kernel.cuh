// One decode call for one KV head: append, evict and attend in one kernel.
//
// A cluster of blocks (one block before sm_90) owns the head; each warp takes every n-th block of
// 16 rows. The call's tokens are cut into runs within one chunk. A run
//   1. evicts, where it enters a chunk: the first block of the cluster does, while copies of the
//      window's rows are already under way in all;
//   2. attends: new tokens come from the call's tensors, older ones from the state;
//   3. appends: the warp that has attended to a new token writes its row to the state, where nobody
//      reads it yet;
//   4. combines the warps' results in a fixed order, first in each block, then over the cluster.
#pragma once
#include <cstdint>

#include "cuda/device/cluster.cuh"
#include "cuda/portable/decode/attend_rows.cuh"
#include "cuda/portable/decode/config.cuh"

namespace sparsek::cuda::portable {

// What a block knows of its head and its call.
template <typename T, typename Config>
class DecodeBlock {
 public:
  using Shared = typename Config::Shared;

  __device__ DecodeBlock(DecodeCall const& call, Shared& shared, std::byte* dynamic_shared)
      : call_(call),
        p_(call.problem),
        shared_(shared),
        rank_(static_cast<int>(blockIdx.x) & ((1 << call.cluster_log2) - 1)),
        head_(static_cast<int>(blockIdx.x) >> call.cluster_log2),
        batch_(call.kv_heads.quotient(head_)),
        kv_head_(call.kv_heads.remainder(head_)),
        head_dim_(static_cast<int>(p_.head_dim)),
        sequence_(p_, batch_),
        state_(call, sequence_.block + kv_head_ * p_.layout.head_bytes),
        header_(sequence_.exists && sequence_.continues ? state_.read_header() : empty_header()),
        tokens_(
            tokens_of(p_, sequence_, batch_, kv_head_, header_.num_tokens, call.aligned_tokens)),
        threshold_(header_.threshold),
        memory_(dynamic_shared) {
    // The list of an eviction lies in the last stages, to which nothing is copied before it.
    lists_ =
        call.lists ? call.lists + head_ * call.list_bytes : stage_of_warp(call.num_stages - 1, 0);
  }

  __device__ void run() {
    int const end = tokens_.first + tokens_.count;
    for (int begin = tokens_.first; begin < end;) {
      int const left_in_chunk =
          static_cast<int>(state_.chunk_size.divisor) - state_.chunk_size.remainder(begin);
      int const run_end = begin + min(min(end - begin, left_in_chunk), kMaxRun);
      process(begin, run_end);
      begin = run_end;
    }
    // The other blocks have read the old header before the last barrier of the last run.
    if (rank_ == 0 && threadIdx.x == 0 && sequence_.exists) state_.finish(end);
    clear_rows();
  }

 private:
  static constexpr int kThreads = Config::kThreads;
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

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

  __device__ std::byte* stage_of_warp(int stage, int warp) const {
    return memory_ + (stage * Config::kWarps + warp) * Config::kStageBytes;
  }

  __device__ void process(int begin, int end) {
    int const old_pool_end = state_.pool_end(begin), pool_end = state_.pool_end(end);
    VisibleRows const rows{pool_end, begin, end, min(state_.num_selected, pool_end)};
    int const num_rows = (end - begin) * group();
    for (int first = 0; first < num_rows; first += Config::kQueryRows) {
      bool const is_first = first == 0;
      attend(rows, first, min(num_rows - first, Config::kQueryRows), is_first,
             is_first && pool_end > old_pool_end);
    }
  }

  // The pool has grown: its first keys take their rows. All blocks of the cluster.
  __device__ void evict_keys(VisibleRows const& rows) {
    if (rank_ == 0) {
      evict<typename Config::Evict>(state_, tokens_, state_.pool_end(rows.run_begin), rows.pool_end,
                                    lists_, shared_.eviction);
    }
    sync_cluster();
    threshold_ = __ldcg(&state_.header->threshold);
    if (head_dim_ < Config::kMaxDim) clear_stage(call_.num_stages - 1);
  }

  // Query rows first ... first + count - 1 of a run. With `evicts` the state changes when the first
  // copies are under way, before selected rows are read; with `appends` the run's tokens are
  // written to it after that.
  __device__ void attend(VisibleRows const& rows, int first, int count, bool appends, bool evicts) {
    int const num_blocks = rows.num_blocks(), recent_blocks = rows.recent_blocks();
    RowLoader<Config> const loader(state_, tokens_, rows);
    WarpAttention<T, Config> attention;
    if (head_dim_ < Config::kMaxDim) {
      for (int stage = 0; stage < call_.num_stages; ++stage) clear_stage(stage);
    }

    // This warp's blocks are `block`, block + stride, ...; copies run num_stages - 1 of them ahead.
    int const stride = Config::kWarps << call_.cluster_log2, ahead = call_.num_stages - 1;
    int next = rank_ * Config::kWarps + warp();  // to be copied
    int block = next - ahead * stride;           // to be attended to
    int to = 0, from = 1;                        // their stages
    bool ready = false;
    int const num_tiles = (count + kTileRows - 1) / kTileRows;
    for (int step = -ahead; step <= 0 || block < num_blocks; ++step) {
      if (step >= 0) {
        // NOTE: the instruction takes a constant.
        if (ahead == 2) {
          device::cp_async_wait_group<1>();
        } else {
          device::cp_async_wait_group<0>();
        }
        __syncwarp();  // all lanes have their copies, and have read the stage that is next
      }
      if (!ready && (step >= 0 || (evicts && next >= recent_blocks))) {
        if (evicts) evict_keys(rows);
        read_queries(attention, rows, first, count);
        ready = true;
      }
      if (next < num_blocks) {
        loader.load(next, device::shared_address(stage_of_warp(to, warp())));
      }
      device::cp_async_commit();
      if (step >= 0 && block < num_blocks) {
        bool const selected = block >= recent_blocks;
        int const begin = (selected ? block - recent_blocks : block) * kBlockKeys;
        int const exist = (selected ? rows.num_selected : rows.num_recent()) - begin;
        std::uint32_t const stage = device::shared_address(stage_of_warp(from, warp()));
        Gating const gating{p_.gate, threshold_,
                            static_cast<float>(p_.sm_scale) * 1.4426950408889634f};
        bool const has_new = !selected && begin + kBlockKeys > rows.num_in_ring();
        attention.attend(stage, exist, selected, has_new || exist < kBlockKeys,
                         begin - rows.num_in_ring(), num_tiles, gating);
        if (appends && has_new) loader.append(block, stage);
      }
      next += stride, block += stride;
      to = to + 1 == call_.num_stages ? 0 : to + 1;
      from = from + 1 == call_.num_stages ? 0 : from + 1;
    }
    device::cp_async_wait_all();
    __syncthreads();  // results take the stages' place
    attention.store(out_of_warp(warp()), shared_.of_warp[warp()]);
    combine(rows, first, count);
  }

  __device__ void read_queries(WarpAttention<T, Config>& attention, VisibleRows const& rows,
                               int first, int count) const {
    auto const* const q =
        static_cast<std::byte const*>(p_.q) +
        2 * (batch_ * p_.stride_q_batch + sequence_.first_row * p_.stride_q_position);
    attention.begin(
        head_dim_, call_.aligned_queries,
        [&](int i) -> std::byte const* {
          if (i >= count) return nullptr;
          return q + 2 * (head_of(first + i) * p_.stride_q_head +
                          token_of(rows, first + i) * p_.stride_q_position);
        },
        [&](int i) { return call_.group.quotient(first + i); });
  }

  // Dimensions that the head does not have must not hold a NaN.
  __device__ void clear_stage(int stage) const {
    auto* const memory = reinterpret_cast<uint4*>(stage_of_warp(stage, warp()));
    for (int i = lane(); i < Config::kStageBytes / 16; i += 32) memory[i] = uint4{};
    __syncwarp();
  }

  // --- results

  __device__ int group() const { return static_cast<int>(call_.group.divisor); }
  __device__ int head_of(int query_row) const {
    return kv_head_ * group() + call_.group.remainder(query_row);
  }
  // What follows the stages in the same memory: [kQueryRows, kOutPitch] for each warp, then
  // [kQueryRows, kMaxDim].
  __device__ float* out_of_warp(int warp) const {
    return reinterpret_cast<float*>(memory_) + warp * Config::kQueryRows * Config::kOutPitch;
  }
  __device__ float* out_of_block() const { return out_of_warp(Config::kWarps); }

  // Of the call.
  __device__ int token_of(VisibleRows const& rows, int query_row) const {
    return rows.run_begin - tokens_.first + call_.group.quotient(query_row);
  }

  // Sums over the warps, then over the blocks of the cluster, and writes the rows. Ends with a
  // barrier, after which all blocks see what has been appended.
  __device__ void combine(VisibleRows const& rows, int first, int count) {
    constexpr int kPieces = Config::kMaxDim / 4;  // of 4 dimensions
    __syncthreads();
    for (int i = threadIdx.x; i < count * kPieces; i += kThreads) {
      int const row = i / kPieces, d = i % kPieces * 4;
      if (d >= head_dim_) continue;
      Weighted result;
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) result.raise(shared_.of_warp[w][row].x);
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        float const* const out = out_of_warp(w) + row * Config::kOutPitch + d;
        result.add(shared_.of_warp[w][row], *reinterpret_cast<float4 const*>(out));
      }
      if (call_.cluster_log2 == 0) {
        write(rows, first + row, d, result);
      } else {
        *reinterpret_cast<float4*>(out_of_block() + row * Config::kMaxDim + d) = result.out;
        if (d == 0) shared_.of_block[row] = {result.maximum, result.sum};
      }
    }
    if (call_.cluster_log2 == 0) {
      __syncthreads();
    } else {
      combine_cluster(rows, first, count);
    }
  }

  __device__ void combine_cluster(VisibleRows const& rows, int first, int count) {
    constexpr int kPieces = Config::kMaxDim / 4;
    int const cluster_size = 1 << call_.cluster_log2;
    sync_cluster();
    std::uint32_t const of_block = device::shared_address(shared_.of_block);
    std::uint32_t const out = device::shared_address(out_of_block());
    for (int i = rank_ + (static_cast<int>(threadIdx.x) << call_.cluster_log2); i < count * kPieces;
         i += kThreads << call_.cluster_log2) {
      int const row = i / kPieces, d = i % kPieces * 4;
      if (d >= head_dim_) continue;
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
      write(rows, first + row, d, result);
    }
    sync_cluster();  // nobody leaves, or goes on, while others read its memory
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

  __device__ std::byte* out_address(int head, int token, int d) const {
    return static_cast<std::byte*>(p_.out) +
           2 * (batch_ * p_.stride_out_batch + head * p_.stride_out_head +
                (sequence_.first_row + token) * p_.stride_out_position + d);
  }
  __device__ float* lse_address(int head, int token) const {
    return p_.lse + batch_ * p_.stride_lse_batch + head * p_.stride_lse_head +
           (sequence_.first_row + token) * p_.stride_lse_position;
  }

  __device__ void write(VisibleRows const& rows, int query_row, int d, Weighted const& r) const {
    int const head = head_of(query_row), token = token_of(rows, query_row);
    float const scale = r.sum > 0.0f ? __fdividef(1.0f, r.sum) : 0.0f;
    store_4(out_address(head, token, d), device::pack2<T>(r.out.x * scale, r.out.y * scale),
            device::pack2<T>(r.out.z * scale, r.out.w * scale));
    if (d == 0 && p_.lse) {
      *lse_address(head, token) = (r.maximum + log2f(r.sum)) * 0.6931471805599453f;
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

  // Tokens of the call that do not exist: output 0, lse -inf.
  __device__ void clear_rows() const {
    int const pieces = head_dim_ / 4;
    for (int token = tokens_.count; token < sequence_.count; ++token) {
      for (int i = rank_ * kThreads + static_cast<int>(threadIdx.x); i < group() * pieces;
           i += kThreads << call_.cluster_log2) {
        int const head = kv_head_ * group() + i / pieces, d = i % pieces * 4;
        store_4(out_address(head, token, d), 0, 0);
        if (d == 0 && p_.lse) *lse_address(head, token) = -INFINITY;
      }
    }
  }

  DecodeCall const& call_;
  DecodeProblem const& p_;
  Shared& shared_;
  int rank_;  // of the block in its cluster
  int head_, batch_, kv_head_;
  int head_dim_;
  Sequence sequence_;
  HeadState state_;
  DecodeHeadHeader header_;
  NewTokens tokens_;
  float threshold_;
  std::byte* memory_;  // dynamic shared memory
  std::byte* lists_;
};

template <typename T, int kMaxDim, int kTiles>
__global__ void __launch_bounds__((DecodeConfig<kMaxDim, kTiles>::kThreads),
                                  (DecodeConfig<kMaxDim, kTiles>::kBlocksPerSm))
    decode_kernel(__grid_constant__ DecodeCall const call) {
  using Config = DecodeConfig<kMaxDim, kTiles>;
  extern __shared__ __align__(128) std::byte dynamic_shared[];
  __shared__ typename Config::Shared shared;
  DecodeBlock<T, Config>(call, shared, dynamic_shared).run();
}

}  // namespace sparsek::cuda::portable
