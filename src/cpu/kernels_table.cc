// Which compiled copy of kernels.cc serves which instruction set.
#include "cpu/kernels.hpp"

namespace sparsek::cpu {

namespace portable {
extern KernelTable const kTable;
}
#if SPARSEK_CPU_X86_KERNELS
namespace avx2 {
extern KernelTable const kTable;
}
namespace avx512 {
extern KernelTable const kTable;
}
namespace avx512_bf16 {
extern KernelTable const kTable;
}
#endif

KernelTable const& kernels([[maybe_unused]] Isa isa) {
#if SPARSEK_CPU_X86_KERNELS
  switch (isa) {
    case Isa::kAvx512Bf16:
      return avx512_bf16::kTable;
    case Isa::kAvx512:
      return avx512::kTable;
    case Isa::kAvx2:
      return avx2::kTable;
    case Isa::kPortable:
      break;
  }
#endif
  return portable::kTable;
}

}  // namespace sparsek::cpu
