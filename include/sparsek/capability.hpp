// What runs where: which kernel a call would take, or why none does.
#pragma once
#include <array>
#include <cstdint>
#include <string>

#include "sparsek/attend.hpp"

namespace sparsek {

struct Capability {
  bool supported = false;
  std::string
      kernel;  // e.g. "cpu/avx512_bf16", "sm90/resident", "portable/mma"; empty if unsupported
  std::string reason;  // empty if supported and nothing faster exists here; else what is missing
};

// The kernel that attend would run for this dtype, these shapes [B, Hq, Sq, D] and [B, Hkv, Sk, D]
// and these options.
Capability attend_capability(Context const& context, DataType dtype,
                             std::array<std::int64_t, 4> const& q_shape,
                             std::array<std::int64_t, 4> const& k_shape,
                             AttendOptions const& options);

// The kernel that attend_backward would run.
Capability attend_backward_capability(Context const& context, DataType dtype,
                                      std::array<std::int64_t, 4> const& q_shape,
                                      std::array<std::int64_t, 4> const& k_shape,
                                      AttendOptions const& options);

// The kernel that decode would run for a step: q_shape [N, Hq, S, D] and k_shape [N, Hkv, S, D] of the
// new tokens. Of the options only the selection counts.
Capability decode_capability(Context const& context, DataType dtype,
                             std::array<std::int64_t, 4> const& q_shape,
                             std::array<std::int64_t, 4> const& k_shape,
                             AttendOptions const& options);

// Instruction set that the CPU backend chose on this machine: "avx512_bf16", "avx512", "avx2" or
// "portable". The environment variable BLACKWELL_SPARSEK_CPU_ISA names a lower one to use instead.
std::string cpu_isa();

// Whether this build has CUDA kernels, and the architectures they were compiled for ("90a;100",
// empty without).
bool built_with_cuda();
std::string cuda_architectures();

// The library's version, "major.minor.patch".
std::string version();

}  // namespace sparsek
