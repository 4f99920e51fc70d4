// Warpgroup matrix instructions with both operands in shared memory, and additions of 16-bit rows
// to global memory: what the backward on Hopper needs besides wgmma.cuh and hopper.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparsek::cuda::device {

// D[64 x 64] (+)= A[64 x 16] B[16 x 64], both with the summed dimension contiguous ("K-major").
template <typename T>
struct WgmmaShared64;

#define SPARSEK_WGMMA_SHARED(T, TYPES)                                                          \
  template <>                                                                                   \
  struct WgmmaShared64<T> {                                                                     \
    /* D = A B: writes D only. */                                                               \
    static __device__ __forceinline__ void first(float (&d)[32], std::uint64_t a,               \
                                                 std::uint64_t b) {                             \
      asm volatile(                                                                             \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                   \
          " {"                                                                                  \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "              \
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "              \
          "%30, %31"                                                                            \
          "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                    \
          : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), \
            "=f"(d[7]), "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]),          \
            "=f"(d[13]), "=f"(d[14]), "=f"(d[15]), "=f"(d[16]), "=f"(d[17]), "=f"(d[18]),       \
            "=f"(d[19]), "=f"(d[20]), "=f"(d[21]), "=f"(d[22]), "=f"(d[23]), "=f"(d[24]),       \
            "=f"(d[25]), "=f"(d[26]), "=f"(d[27]), "=f"(d[28]), "=f"(d[29]), "=f"(d[30]),       \
            "=f"(d[31])                                                                         \
          : "l"(a), "l"(b));                                                                    \
    }                                                                                           \
    /* D = A B + D. */                                                                          \
    static __device__ __forceinline__ void next(float (&d)[32], std::uint64_t a,                \
                                                std::uint64_t b) {                              \
      asm volatile(                                                                             \
          "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                   \
          " {"                                                                                  \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "              \
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "              \
          "%30, %31"                                                                            \
          "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                    \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), \
            "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),          \
            "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),       \
            "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
            "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),       \
            "+f"(d[31])                                                                         \
          : "l"(a), "l"(b));                                                                    \
    }                                                                                           \
  };
SPARSEK_WGMMA_SHARED(__half, "f16.f16")
SPARSEK_WGMMA_SHARED(__nv_bfloat16, "bf16.bf16")
#undef SPARSEK_WGMMA_SHARED

// D[64 x 8] += A[64 x 16] B[16 x 8], A in registers, B in shared memory.
template <typename T>
struct Wgmma8;
#define SPARSEK_WGMMA_8(T, TYPES)                                                                  \
  template <>                                                                                      \
  struct Wgmma8<T> {                                                                               \
    static __device__ __forceinline__ void next(float (&d)[4], std::uint32_t a0, std::uint32_t a1, \
                                                std::uint32_t a2, std::uint32_t a3,                \
                                                std::uint64_t b) {                                 \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                               \
          "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPES                                       \
          " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;\n}\n"                              \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                           \
    }                                                                                              \
  };
SPARSEK_WGMMA_8(__half, "f16.f16")
SPARSEK_WGMMA_8(__nv_bfloat16, "bf16.bf16")
#undef SPARSEK_WGMMA_8

// Adds two 16-bit values to global memory where `adds`, element by element; each addition rounds
// once.
template <typename T>
__device__ __forceinline__ void add_2(void* destination, std::uint32_t x, bool adds);
template <>
__device__ __forceinline__ void add_2<__half>(void* destination, std::uint32_t x, bool adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n"
      "@p red.relaxed.gpu.global.add.noftz.f16x2 [%0], %1;\n}\n" ::"l"(destination),
      "r"(x), "r"(static_cast<int>(adds))
      : "memory");
}
template <>
__device__ __forceinline__ void add_2<__nv_bfloat16>(void* destination, std::uint32_t x,
                                                     bool adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n"
      "@p red.relaxed.gpu.global.add.noftz.bf16x2 [%0], %1;\n}\n" ::"l"(destination),
      "r"(x), "r"(static_cast<int>(adds))
      : "memory");
}

// Two packed values as floats.
template <typename T>
__device__ __forceinline__ float2 unpack2(std::uint32_t x);
template <>
__device__ __forceinline__ float2 unpack2<__half>(std::uint32_t x) {
  return __half22float2(*reinterpret_cast<__half2*>(&x));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(std::uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

}  // namespace sparsek::cuda::device
