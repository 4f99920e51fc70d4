// The share of the scores' gradients that goes through the thresholds: -gbar_c for every key of
// I_c, for every chunk c (attend_backward.hpp), in O(log) per key.
//
// Thresholds never fall and a key that leaves the candidates never returns, so a key is in I_c for
// one contiguous range of chunks. Three kernels: each key finds its range by binary search and
// counts itself in at the range's ends (integer additions: their order does not matter); a scan
// over the chunks of a row turns the counts into |I_c| and then gbar_c = sums[c] / |I_c| into
// prefix sums in float64; each key subtracts the difference of two of them.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/portable/attend_backward/threshold_gradient.hpp"
#include "cuda/runtime.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr int kWarp = 32;
constexpr int kKeyThreads = 256;
constexpr int kScanThreads = 512;

struct Params {
  std::int32_t batch, num_kv_heads;
  std::int32_t seq_len_q, seq_len_k;  // packed: totals
  std::int64_t window, chunk_size;    // as given
  float const* scores;
  std::int64_t stride_scores_batch, stride_scores_head, stride_scores_position;
  float const* threshold;
  std::int32_t const* last_candidate;
  std::int64_t stride_expiry_batch, stride_expiry_head, stride_chunk_batch, stride_chunk_head;
  std::int32_t const* lengths;
  std::int32_t const *cu_seqlens_q, *cu_seqlens_k;
  float* dscores;
  std::int64_t stride_dscores_batch, stride_dscores_head, stride_dscores_position;
  std::int64_t support_per_row;
  ThresholdGradient parts;
};

// Entries of `support` for one row, which has one more of them than chunks.
std::int64_t support_per_row(AttendProblem const& a) {
  return a.num_chunks + (a.cu_seqlens_k ? a.batch : 0) + 1;
}
// Rows of the selection: packed sequences lie behind one another in a KV head's row.
std::int64_t num_rows(AttendProblem const& a) {
  return a.num_kv_heads * (a.cu_seqlens_k ? 1 : a.batch);
}

// One (sequence, KV head).
struct Row {
  int sequence, kv_head;
  int num_keys;                // that exist
  std::int64_t first_key;      // packed: of the sequence
  int first_chunk, end_chunk;  // those with queries
  std::int64_t chunks;         // offset of chunk 0 in threshold, last_candidate and the sums
  std::int64_t support;        // and in support and prefix
};

__device__ Row locate_row(Params const& p, int b, int kv_head) {
  Row r{b, kv_head, 0, 0, 0, 0, 0, 0};
  int keys = p.seq_len_k, queries = p.seq_len_q;
  if (p.cu_seqlens_k) {
    int const q0 = min(max(p.cu_seqlens_q[b], 0), p.seq_len_q);
    int const k0 = min(max(p.cu_seqlens_k[b], 0), p.seq_len_k);
    keys = min(max(p.cu_seqlens_k[b + 1], k0), p.seq_len_k) - k0;
    queries = min(min(max(p.cu_seqlens_q[b + 1], q0), p.seq_len_q) - q0, keys);
    r.first_key = k0;
  }
  r.num_keys = p.lengths ? min(max(p.lengths[b], 0), keys) : keys;
  int const first_query = keys - queries;
  if (first_query < r.num_keys) {
    r.first_chunk = static_cast<int>(first_query / p.chunk_size);
    r.end_chunk = static_cast<int>((r.num_keys + p.chunk_size - 1) / p.chunk_size);
  }
  std::int64_t const before = p.cu_seqlens_k ? r.first_key / p.chunk_size : 0;
  r.chunks =
      p.stride_chunk_batch * b + p.stride_chunk_head * kv_head + before + (p.cu_seqlens_k ? b : 0);
  // Twice the sequence's index: each has one entry more than chunks.
  std::int64_t const row =
      p.cu_seqlens_k ? kv_head : static_cast<std::int64_t>(b) * p.num_kv_heads + kv_head;
  r.support = p.support_per_row * row + before + (p.cu_seqlens_k ? 2 * b : 0);
  return r;
}

// The first c of [low, high) for which reached(c) is true, which it stays; high if none.
template <typename Predicate>
__device__ int first_where(int low, int high, Predicate const& reached) {
  while (low < high) {
    int const middle = (low + high) / 2;
    if (reached(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ ChunkRange find_range(Params const& p, Row const& r, int j) {
  float const* const scores = p.scores + p.stride_scores_batch * r.sequence +
                              p.stride_scores_head * r.kv_head +
                              p.stride_scores_position * r.first_key;
  float const* const threshold = p.threshold + r.chunks;
  std::int32_t const* const last = p.last_candidate + r.chunks;
  float const u = scores[p.stride_scores_position * j];
  // The first chunk whose pool has the key.
  std::int64_t const enters = (j + p.window) / p.chunk_size + 1;
  if (enters >= r.end_chunk) return {0, 0};
  // From where on the gate is below 1: the sum, rounded up, is the smallest score with a gate of 1.
  int const begin = first_where(max(static_cast<int>(enters), r.first_chunk), r.end_chunk,
                                [&](int c) { return u < __fadd_ru(threshold[c], 1.f); });
  // And from where on it is 0.
  int const dies = first_where(begin, r.end_chunk, [&](int c) { return u <= threshold[c]; });
  int const end = first_where(begin, dies, [&](int c) {
    int const l = last[c];
    if (l < 0) return false;
    // Clamped: scores that are not finite give unspecified candidates, but no access out of bounds.
    float const lowest = scores[p.stride_scores_position * min(l, r.num_keys - 1)];
    return u < lowest || (u == lowest && j > l);
  });
  return {begin, end};
}

__global__ void __launch_bounds__(kKeyThreads) count_support(__grid_constant__ Params const p) {
  Row const r = locate_row(p, blockIdx.x / p.num_kv_heads, blockIdx.x % p.num_kv_heads);
  ChunkRange* const ranges = p.parts.ranges + p.stride_expiry_batch * r.sequence +
                             p.stride_expiry_head * r.kv_head + r.first_key;
  for (int j = blockIdx.y * kKeyThreads + threadIdx.x; j < r.num_keys;
       j += gridDim.y * kKeyThreads) {
    ChunkRange const range = find_range(p, r, j);
    ranges[j] = range;
    if (range.begin >= range.end) continue;
    atomicAdd(p.parts.support + r.support + range.begin, 1);
    atomicSub(p.parts.support + r.support + range.end, 1);
  }
}

// Inclusive scan over a block in a fixed order; `total` is that of the whole block.
template <typename T>
__device__ T scan_block(T value, T* warp_totals, T* total) {
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int d = 1; d < kWarp; d *= 2) {
    T const other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  if (lane == kWarp - 1) warp_totals[warp] = value;
  __syncthreads();
  T before = 0, all = 0;
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    if (w == warp) before = all;
    all += warp_totals[w];
  }
  __syncthreads();
  *total = all;
  return before + value;
}

// One block for each (sequence, KV head).
__global__ void __launch_bounds__(kScanThreads) scan_chunks(__grid_constant__ Params const p) {
  __shared__ std::int32_t warp_counts[kScanThreads / kWarp];
  __shared__ double warp_sums[kScanThreads / kWarp];
  Row const r = locate_row(p, blockIdx.x / p.num_kv_heads, blockIdx.x % p.num_kv_heads);
  std::int32_t const* const support = p.parts.support + r.support;
  double* const prefix = p.parts.prefix + r.support;
  float const* const sums = p.parts.gate_gradient_sums + r.chunks;
  std::int32_t count = 0;
  double sum = 0.0;
  for (int base = r.first_chunk; base < r.end_chunk; base += kScanThreads) {
    int const c = base + static_cast<int>(threadIdx.x);
    bool const valid = c < r.end_chunk;
    std::int32_t counted;
    std::int32_t const size = count + scan_block(valid ? support[c] : 0, warp_counts, &counted);
    double const gbar =
        valid && size > 0 ? static_cast<double>(sums[c]) / static_cast<double>(size) : 0.0;
    double summed;
    double const inclusive = scan_block(gbar, warp_sums, &summed);
    if (valid) prefix[c + 1] = sum + inclusive;
    count += counted;
    sum += summed;
  }
  if (threadIdx.x == 0) prefix[r.first_chunk] = 0.0;
}

__global__ void __launch_bounds__(kKeyThreads) subtract_means(__grid_constant__ Params const p) {
  Row const r = locate_row(p, blockIdx.x / p.num_kv_heads, blockIdx.x % p.num_kv_heads);
  ChunkRange const* const ranges = p.parts.ranges + p.stride_expiry_batch * r.sequence +
                                   p.stride_expiry_head * r.kv_head + r.first_key;
  double const* const prefix = p.parts.prefix + r.support;
  float* const dscores = p.dscores + p.stride_dscores_batch * r.sequence +
                         p.stride_dscores_head * r.kv_head +
                         p.stride_dscores_position * r.first_key;
  for (int j = blockIdx.y * kKeyThreads + threadIdx.x; j < r.num_keys;
       j += gridDim.y * kKeyThreads) {
    ChunkRange const range = ranges[j];
    if (range.begin >= range.end) continue;
    float* const target = dscores + p.stride_dscores_position * j;
    *target = static_cast<float>(*target - (prefix[range.end] - prefix[range.begin]));
  }
}

Params make_params(AttendBackwardProblem const& b, ThresholdGradient const& parts) {
  AttendProblem const& a = b.forward;
  auto const narrow = [](std::int64_t x) { return static_cast<std::int32_t>(x); };
  Params p{};
  p.batch = narrow(a.batch), p.num_kv_heads = narrow(a.num_kv_heads);
  p.seq_len_q = narrow(a.seq_len_q), p.seq_len_k = narrow(a.seq_len_k);
  p.window = a.window, p.chunk_size = a.chunk_size;
  p.scores = static_cast<float const*>(a.scores);
  p.stride_scores_batch = a.stride_scores_batch, p.stride_scores_head = a.stride_scores_head;
  p.stride_scores_position = a.stride_scores_position;
  p.threshold = static_cast<float const*>(a.threshold), p.last_candidate = a.last_candidate;
  p.stride_expiry_batch = a.stride_expiry_batch, p.stride_expiry_head = a.stride_expiry_head;
  p.stride_chunk_batch = a.stride_chunk_batch, p.stride_chunk_head = a.stride_chunk_head;
  p.lengths = a.lengths, p.cu_seqlens_q = a.cu_seqlens_q, p.cu_seqlens_k = a.cu_seqlens_k;
  p.dscores = static_cast<float*>(b.dscores);
  p.stride_dscores_batch = b.stride_dscores_batch, p.stride_dscores_head = b.stride_dscores_head;
  p.stride_dscores_position = b.stride_dscores_position;
  p.support_per_row = support_per_row(a);
  p.parts = parts;
  return p;
}

ThresholdGradient lay_out(AttendProblem const& a, Carver& carver) {
  auto const count = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  ThresholdGradient parts{};
  parts.gate_gradient_sums = carver.take<float>(count(num_rows(a) * a.num_chunks));
  parts.ranges = carver.take<ChunkRange>(count(num_rows(a) * a.seq_len_k));
  parts.support = carver.take<std::int32_t>(count(num_rows(a) * support_per_row(a)));
  parts.prefix = carver.take<double>(count(num_rows(a) * support_per_row(a)));
  return parts;
}

}  // namespace

std::size_t threshold_gradient_workspace(AttendProblem const& a) {
  Carver carver(nullptr);
  lay_out(a, carver);
  return carver.bytes();
}

ThresholdGradient lay_out_threshold_gradient(AttendProblem const& a, std::byte* workspace) {
  Carver carver(workspace);
  return lay_out(a, carver);
}

void subtract_threshold_gradient(Context const& context, AttendBackwardProblem const& b,
                                 ThresholdGradient const& parts) {
  AttendProblem const& a = b.forward;
  if (a.batch == 0 || a.num_kv_heads == 0 || a.seq_len_k == 0 || a.seq_len_q == 0) return;
  cudaStream_t const stream = stream_of(context);
  Params p = make_params(b, parts);
  check(cudaMemsetAsync(
            parts.support, 0,
            static_cast<std::size_t>(num_rows(a) * support_per_row(a)) * sizeof(std::int32_t),
            stream),
        "attend_backward: clearing counts");
  // x of the grid: (sequence, KV head); y: blocks of keys, more for fewer rows.
  constexpr std::int64_t kTargetBlocks = 2048;
  std::int64_t const rows = a.batch * a.num_kv_heads;
  std::int64_t const mean_keys =
      a.cu_seqlens_k ? (a.seq_len_k + a.batch - 1) / a.batch : a.seq_len_k;
  auto const blocks = static_cast<unsigned>(
      std::clamp<std::int64_t>((mean_keys + kKeyThreads - 1) / kKeyThreads, 1,
                               std::max<std::int64_t>(kTargetBlocks / rows, 16)));
  dim3 const grid(static_cast<unsigned>(rows), blocks);
  count_support<<<grid, kKeyThreads, 0, stream>>>(p);
  scan_chunks<<<static_cast<unsigned>(rows), kScanThreads, 0, stream>>>(p);
  subtract_means<<<grid, kKeyThreads, 0, stream>>>(p);
  check_launch("attend_backward: gradient through the thresholds");
}

}  // namespace sparsek::cuda::portable
