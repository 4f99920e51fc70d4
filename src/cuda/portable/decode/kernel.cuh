// One decode call for one KV head: append, evict and attend in one kernel.
//
// A cluster of blocks (one block before sm_90) owns the head; each warp takes every n-th block of 16 rows. The call's tokens
// are cut into runs within one chunk. A run
//   1. evicts, where it enters a chunk: the first block of the cluster does, while the copies of the window's rows are
//      already under way in all;
//   2. appends its tokens to the state; nobody reads these rows there, since
//   3. its queries take the new tokens from the call's tensors, older ones from the state;
//   4. the warps' results are combined in a fixed order, first in each block, then over the cluster.
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
        rank_(static_cast<int>(blockIdx.x) % call.cluster_size),
        head_(static_cast<int>(blockIdx.x) / call.cluster_size),
        batch_(head_ / static_cast<int>(p_.num_kv_heads)),
        kv_head_(head_ % static_cast<int>(p_.num_kv_heads)),
        head_dim_(static_cast<int>(p_.head_dim)),
        group_(static_cast<int>(p_.group)),
        sequence_(p_, batch_),
        state_(p_, sequence_.block + kv_head_ * p_.layout.head_bytes),
        tokens_(tokens_of(p_, sequence_, batch_, kv_head_,
                          sequence_.exists && sequence_.continues ? state_.num_tokens() : 0,
                          call.aligned_tokens)) {
    std::byte* const turns =
        dynamic_shared + Config::kWarps * call.num_stages * Config::kStageBytes;
    lists_ = call.lists ? call.lists + head_ * call.list_bytes : turns;
    partial_ = reinterpret_cast<float*>(turns);
    stages_ = dynamic_shared + warp() * call.num_stages * Config::kStageBytes;
    first_stage_ = device::shared_address(stages_);
  }

  __device__ void run() {
    int const end = tokens_.first + tokens_.count;
    if (tokens_.first > 0) threshold_ = state_.threshold();
    for (int begin = tokens_.first; begin < end;) {
      std::int64_t const chunk_end =
          (std::int64_t{begin / state_.chunk_size} + 1) * state_.chunk_size;
      int const run_end =
          static_cast<int>(min(min(std::int64_t{end}, chunk_end), std::int64_t{begin} + kMaxRun));
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
    if (call_.cluster_size == 1) {
      __syncthreads();
    } else {
      __syncwarp();
      device::cluster_arrive();
      device::cluster_wait();
    }
  }

  __device__ void process(int begin, int end) {
    int const old_pool_end = state_.pool_end(begin), pool_end = state_.pool_end(end);
    VisibleRows const rows{pool_end, begin, end, min(state_.num_selected, pool_end)};
    bool evicts = pool_end > old_pool_end;
    bool appends = true;
    int const num_rows = (end - begin) * group_;
    for (int first = 0; first < num_rows; first += Config::kQueryRows) {
      attend(rows, first, min(num_rows - first, Config::kQueryRows), [&] {
        if (evicts) {
          if (rank_ == 0) {
            evict<typename Config::Evict>(state_, tokens_, old_pool_end, pool_end, lists_,
                                          shared_.eviction);
          }
          sync_cluster();
          threshold_ = state_.threshold();
        }
        if (appends && rank_ == 0) append_rows<kThreads>(state_, tokens_, begin, end);
        evicts = appends = false;
      });
    }
  }

  // Query rows first ... first + count - 1 of a run. `change_state` is called when the first copies are under way.
  template <typename ChangeState>
  __device__ void attend(VisibleRows const& rows, int first, int count, ChangeState change_state) {
    int const stride = call_.cluster_size * Config::kWarps;
    int const num_blocks = rows.num_blocks(), recent_blocks = rows.recent_blocks();
    RowLoader<Config> const loader(state_, tokens_, rows, first_stage_);
    if (head_dim_ < Config::kMaxDim) clear_stages();

    // Copies run num_stages - 1 blocks ahead.
    int next = rank_ * Config::kWarps + warp();  // to be loaded
    int block = next, to = 0, from = 0, issued = 0;
    int const ahead = call_.num_stages - 1;
    auto const load_next = [&] {
      if (next < num_blocks) loader.load(next, to);
      device::cp_async_commit();
      next += stride;
      to = to + 1 == call_.num_stages ? 0 : to + 1;
      ++issued;
    };
    while (issued < ahead && next < recent_blocks) load_next();

    std::int64_t const q_batch = batch_ * p_.stride_q_batch;
    auto const* const q = static_cast<std::byte const*>(p_.q);
    WarpAttention<T, Config> attention(
        head_dim_, call_.aligned_queries,
        [&](int i) -> std::byte const* {
          if (i >= count) return nullptr;
          return q + 2 * (q_batch + head_of(first + i) * p_.stride_q_head +
                          (sequence_.first_row + token_of(rows, first + i)) * p_.stride_q_position);
        },
        [&](int i) { return (first + i) / group_; });

    change_state();
    while (issued < ahead) load_next();
    Gating const gating{p_.gate, threshold_, static_cast<float>(p_.sm_scale) * 1.4426950408889634f};
    int const num_tiles = (count + kTileRows - 1) / kTileRows;
    for (; block < num_blocks; block += stride) {
      // NOTE: the wait counts groups at compile time.
      if (ahead == 2) {
        device::cp_async_wait_group<1>();
      } else {
        device::cp_async_wait_group<0>();
      }
      __syncwarp();
      load_next();  // into the stage that was read last
      bool const selected = block >= recent_blocks;
      int const begin = (selected ? block - recent_blocks : block) * kBlockKeys;
      int const exist = (selected ? rows.num_selected : rows.num_recent()) - begin;
      attention.attend(first_stage_ + from * Config::kStageBytes, exist, selected,
                       begin - rows.num_in_ring(), num_tiles, gating);
      from = from + 1 == call_.num_stages ? 0 : from + 1;
    }
    device::cp_async_wait_all();
    __syncwarp();
    attention.store(reinterpret_cast<float*>(stages_), shared_.of_warp[warp()]);
    combine(rows, first, count);
  }

  // Dimensions that the head does not have must not hold a NaN.
  __device__ void clear_stages() const {
    for (int i = lane(); i < call_.num_stages * Config::kStageBytes / 16; i += 32) {
      reinterpret_cast<uint4*>(stages_)[i] = uint4{};
    }
    __syncwarp();
  }

  // --- results

  __device__ int head_of(int query_row) const { return kv_head_ * group_ + query_row % group_; }
  // Of the call.
  __device__ int token_of(VisibleRows const& rows, int query_row) const {
    return rows.run_begin - tokens_.first + query_row / group_;
  }

  // Sums over the warps, then over the blocks of the cluster, and writes the rows. Ends with a barrier, after which all
  // blocks see what the first one has appended.
  __device__ void combine(VisibleRows const& rows, int first, int count) {
    int const pieces = head_dim_ / 4;  // of 4 dimensions
    __syncthreads();
    for (int i = threadIdx.x; i < count * pieces; i += kThreads) {
      int const row = i / pieces, d = i % pieces * 4;
      Weighted result;
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        result.raise(shared_.of_warp[w][row].x);
      }
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        auto const* const out =
            reinterpret_cast<float const*>(stages_ +
                                           (w - warp()) * call_.num_stages * Config::kStageBytes) +
            row * Config::kOutPitch + d;
        result.add(shared_.of_warp[w][row], *reinterpret_cast<float4 const*>(out));
      }
      if (call_.cluster_size == 1) {
        write(rows, first + row, d, result);
      } else {
        *reinterpret_cast<float4*>(partial_ + row * Config::kMaxDim + d) = result.out;
        if (d == 0) shared_.of_block[row] = {result.maximum, result.sum};
      }
    }
    if (call_.cluster_size == 1) {
      __syncthreads();
      return;
    }
    sync_cluster();
    std::uint32_t const of_block = device::shared_address(shared_.of_block);
    std::uint32_t const partial = device::shared_address(partial_);
    for (int i = rank_ + call_.cluster_size * static_cast<int>(threadIdx.x); i < count * pieces;
         i += call_.cluster_size * kThreads) {
      int const row = i / pieces, d = i % pieces * 4;
      Weighted result;
      for (int r = 0; r < call_.cluster_size; ++r) {
        result.raise(device::load_from_rank_x2(of_block + 8 * row, r).x);
      }
      for (int r = 0; r < call_.cluster_size; ++r) {
        result.add(device::load_from_rank_x2(of_block + 8 * row, r),
                   device::load_from_rank_x4(partial + 4 * (row * Config::kMaxDim + d), r));
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
    float const scale = r.sum > 0.0f ? 1.0f / r.sum : 0.0f;
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
    int const pieces = head_dim_ / 4, missing = sequence_.count - tokens_.count;
    std::int64_t const total = std::int64_t{missing} * group_ * pieces;
    for (std::int64_t i = rank_ * kThreads + static_cast<int>(threadIdx.x); i < total;
         i += call_.cluster_size * kThreads) {
      int const d = static_cast<int>(i % pieces) * 4;
      int const head = kv_head_ * group_ + static_cast<int>(i / pieces % group_);
      int const token = tokens_.count + static_cast<int>(i / pieces / group_);
      store_4(out_address(head, token, d), 0, 0);
      if (d == 0 && p_.lse) *lse_address(head, token) = -INFINITY;
    }
  }

  DecodeCall const& call_;
  DecodeProblem const& p_;
  Shared& shared_;
  int rank_;  // of the block in its cluster
  int head_, batch_, kv_head_;
  int head_dim_, group_;
  Sequence sequence_;
  HeadState state_;
  NewTokens tokens_;
  float threshold_ = -INFINITY;
  std::byte* lists_;
  float* partial_;     // [kQueryRows, kMaxDim], shared
  std::byte* stages_;  // this warp's
  std::uint32_t first_stage_;
};

template <typename T, int kMaxDim, int kTiles>
__global__ void __launch_bounds__((DecodeConfig<kMaxDim, kTiles>::kThreads))
    decode_kernel(__grid_constant__ DecodeCall const call) {
  using Config = DecodeConfig<kMaxDim, kTiles>;
  extern __shared__ __align__(128) std::byte dynamic_shared[];
  __shared__ typename Config::Shared shared;
  DecodeBlock<T, Config>(call, shared, dynamic_shared).run();
}

}  // namespace sparsek::cuda::portable
