// Memory aligned as the kernels want their workspaces.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/kernels.hpp"

namespace sparsek::cpu {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t{kTileAlignment}); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

// Not initialised.
template <typename T>
AlignedArray<T> make_aligned(std::size_t bytes) {
  return AlignedArray<T>(
      static_cast<T*>(::operator new[](bytes, std::align_val_t{kTileAlignment})));
}

}  // namespace sparsek::cpu
