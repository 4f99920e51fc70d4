// Barriers that are asked ahead.
//
// An answer takes over 100 cycles while the matrix units read shared memory. Asked in the shadow of
// a product it costs nothing, and mostly it is yes.
#pragma once
#include <cstdint>

namespace sparsek::cuda::sm90 {

// Whether the phase with this parity is over: 1 or 0.
__device__ __forceinline__ std::uint32_t mbarrier_test(std::uint32_t barrier,
                                                       std::uint32_t parity) {
  std::uint32_t over;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}\n"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over;
}
// Waits until it is over, unless `over` says so.
__device__ __forceinline__ void mbarrier_wait_unless(std::uint32_t over, std::uint32_t barrier,
                                                     std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p bra DONE;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(barrier),
      "r"(parity), "r"(over)
      : "memory");
}

}  // namespace sparsek::cuda::sm90
