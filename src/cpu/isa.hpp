// Instruction sets that the CPU kernels are compiled for, and the one that runs.
#pragma once
#include <cstdint>

namespace sparsek::cpu {

// In ascending order of preference: each machine that has one also has those before it.
enum class Isa : std::uint8_t { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The name that cpu_isa() and BLACKWELL_SPARSEK_CPU_ISA use.
char const* name_of(Isa isa);

// The best set of this build that the machine has.
Isa best_isa();

// best_isa(), or the lower one that the environment variable BLACKWELL_SPARSEK_CPU_ISA names. Read
// on every call, so that one process can compare several. Throws InvalidArgument where the name is
// unknown or names a set that this machine or build lacks.
Isa active_isa();

}  // namespace sparsek::cpu
