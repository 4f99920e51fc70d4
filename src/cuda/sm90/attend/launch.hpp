// The instantiations of the resident kernel, one translation unit each (generated, see
// CMakeLists.txt).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/attend/config.hpp"

namespace sparsek::cuda::sm90 {

template <typename T, int kDim, Mode kMode, bool kValueGate>
void launch(Params const& p, int num_sms, cudaStream_t stream);

#define SPARSEK_DECLARE(T)                                                                      \
  extern template void launch<T, 64, Mode::kAligned, false>(Params const&, int, cudaStream_t);  \
  extern template void launch<T, 64, Mode::kGeneral, false>(Params const&, int, cudaStream_t);  \
  extern template void launch<T, 64, Mode::kGeneral, true>(Params const&, int, cudaStream_t);   \
  extern template void launch<T, 128, Mode::kAligned, false>(Params const&, int, cudaStream_t); \
  extern template void launch<T, 128, Mode::kGeneral, false>(Params const&, int, cudaStream_t); \
  extern template void launch<T, 128, Mode::kGeneral, true>(Params const&, int, cudaStream_t);
SPARSEK_DECLARE(__half)
SPARSEK_DECLARE(__nv_bfloat16)
#undef SPARSEK_DECLARE

}  // namespace sparsek::cuda::sm90
