// The kernels of the backward as the host sees them; the large ones are instantiated one
// translation unit each (generated, see CMakeLists.txt).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/attend_backward/config.hpp"

namespace sparsek::cuda::sm90::backward {

// dq, delta; must run first.
template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch_queries(BackwardParams const& p, int num_sms, cudaStream_t stream);
// dk, dv, dscores: window form, then slot form.
template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch_keys(BackwardParams const& p, int num_sms, cudaStream_t stream);

// dq of queries that do not exist (lengths): zeros.
void clear_missing_rows(BackwardParams const& p, cudaStream_t stream);
// Adds what segments left for keys that they inherited.
template <typename T>
void add_inherited(BackwardParams const& p, int padded_dim, cudaStream_t stream);
// Sums of the gates' gradients over chunks.
void sum_gate_gradients(BackwardParams const& p, Mode mode, cudaStream_t stream);

#define SPARSEK_DECLARE_ONE(T, D, M, V)                                                      \
  extern template void launch_queries<T, D, M, V>(BackwardParams const&, int, cudaStream_t); \
  extern template void launch_keys<T, D, M, V>(BackwardParams const&, int, cudaStream_t);
#define SPARSEK_DECLARE(T)                           \
  SPARSEK_DECLARE_ONE(T, 64, Mode::kAligned, false)  \
  SPARSEK_DECLARE_ONE(T, 64, Mode::kGeneral, false)  \
  SPARSEK_DECLARE_ONE(T, 64, Mode::kGeneral, true)   \
  SPARSEK_DECLARE_ONE(T, 128, Mode::kAligned, false) \
  SPARSEK_DECLARE_ONE(T, 128, Mode::kGeneral, false) \
  SPARSEK_DECLARE_ONE(T, 128, Mode::kGeneral, true)
SPARSEK_DECLARE(__half)
SPARSEK_DECLARE(__nv_bfloat16)
#undef SPARSEK_DECLARE
#undef SPARSEK_DECLARE_ONE

}  // namespace sparsek::cuda::sm90::backward
