// Appending alone: one wide block for each KV head streams the new scores, then copies the rows
// that are left.
#include "cuda/portable/decode/config.cuh"
#include "cuda/runtime.hpp"

namespace sparsek::cuda::portable {
namespace {

constexpr int kThreads = AppendEviction::kThreads;

// The tokens at positions begin ... end - 1 of the call go into the window's rows.
__device__ void append_rows(HeadState const& state, NewTokens const& tokens, int begin, int end) {
  copy_rows<kThreads>(end - begin, state.row_bytes, [&](int i) {
    int const token = begin + i - tokens.first;
    std::int64_t const to = state.offset(state.window_row(begin + i));
    return RowCopy{tokens.k_row(token), tokens.v_row(token), state.k + to, state.v + to,
                   tokens.aligned};
  });
  for (int p = begin + static_cast<int>(threadIdx.x); p < end; p += kThreads) {
    state.scores[state.window_row(p)] = tokens.score(p - tokens.first);
  }
}

__global__ void __launch_bounds__(kThreads) append_kernel(__grid_constant__ DecodeCall const call) {
  extern __shared__ __align__(16) std::byte lists[];
  __shared__ EvictionScratch<AppendEviction> scratch;
  DecodeProblem const& p = call.problem;
  int const number = static_cast<int>(blockIdx.x);
  int const batch = call.kv_heads.quotient(number), kv_head = call.kv_heads.remainder(number);
  Sequence const sequence(p, batch);
  if (!sequence.exists) return;
  std::byte* const memory = sequence.block + kv_head * p.layout.head_bytes;
  HeadState const state(call, memory);
  int const first = sequence.continues ? state.read_header().num_tokens : 0;
  Head const head{
      memory, batch, kv_head, sequence.first_row, first, min(sequence.valid, kMaxTokens - first)};
  NewTokens const tokens = tokens_of(call, head);
  int const end = first + tokens.count;
  int const old_pool_end = state.pool_end(first), pool_end = state.pool_end(end);
  if (pool_end > old_pool_end) {
    evict<AppendEviction>(call, head, old_pool_end, pool_end,
                          call.lists ? call.lists + number * call.list_bytes : lists, scratch);
  }
  __syncthreads();  // selected rows have left the window before new tokens take their places
  append_rows(state, tokens, max(first, pool_end), end);
  if (threadIdx.x == 0) state.finish(end);
}

}  // namespace

void launch_append(DecodeCall const& call, DecodePlan const& plan, cudaStream_t stream) {
  auto const bytes = static_cast<int>(plan.lists_in_workspace ? 0 : plan.list_bytes);
  check(cudaFuncSetAttribute(append_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "decode: shared memory of the append kernel");
  auto const blocks = static_cast<unsigned>(call.problem.batch * call.problem.num_kv_heads);
  append_kernel<<<blocks, kThreads, bytes, stream>>>(call);
  check_launch("decode: append kernel");
}

}  // namespace sparsek::cuda::portable
