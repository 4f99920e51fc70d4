#include "cpu/isa.hpp"

#include <array>
#include <cstdlib>
#include <string>
#include <string_view>

#include "sparsek/capability.hpp"
#include "sparsek/error.hpp"

namespace sparsek {
namespace cpu {
namespace {

constexpr std::array kAll{Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool machine_has([[maybe_unused]] Isa isa) {
#if SPARSEK_CPU_X86_KERNELS
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return machine_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Bf16:
      return machine_has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::kPortable;
}

}  // namespace

char const* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

Isa best_isa() {
  static Isa const best = [] {
    Isa found = Isa::kPortable;
    for (Isa const isa : kAll) {
      if (machine_has(isa)) found = isa;
    }
    return found;
  }();
  return best;
}

Isa active_isa() {
  char const* const requested = std::getenv("BLACKWELL_SPARSEK_CPU_ISA");
  if (!requested || !*requested) return best_isa();
  std::string available;
  for (Isa const isa : kAll) {
    if (isa > best_isa()) break;
    if (std::string_view(requested) == name_of(isa)) return isa;
    available += available.empty() ? "" : ", ";
    available += name_of(isa);
  }
  throw InvalidArgument("BLACKWELL_SPARSEK_CPU_ISA: expected one of this machine's and build's (" +
                        available + "), got \"" + requested + "\"");
}

}  // namespace cpu

std::string cpu_isa() { return cpu::name_of(cpu::active_isa()); }

}  // namespace sparsek
