// The instantiations of the resident kernels, one translation unit each (generated, see
// CMakeLists.txt).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/attend/config.hpp"

namespace sparsek::cuda::sm90 {

template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch(Params const& p, int num_sms, cudaStream_t stream);

#define SPARSEK_DECLARE_ONE(T, kDim, kMode, kValueGate) \
  extern template void launch<T, kDim, Mode::kMode, kValueGate>(Params const&, int, cudaStream_t);
#define SPARSEK_DECLARE(T)                     \
  SPARSEK_DECLARE_ONE(T, 64, kAligned, false)  \
  SPARSEK_DECLARE_ONE(T, 64, kGeneral, false)  \
  SPARSEK_DECLARE_ONE(T, 64, kGeneral, true)   \
  SPARSEK_DECLARE_ONE(T, 128, kAligned, false) \
  SPARSEK_DECLARE_ONE(T, 128, kGeneral, false) \
  SPARSEK_DECLARE_ONE(T, 128, kGeneral, true)
SPARSEK_DECLARE(__half)
SPARSEK_DECLARE(__nv_bfloat16)
#undef SPARSEK_DECLARE
#undef SPARSEK_DECLARE_ONE

}  // namespace sparsek::cuda::sm90
