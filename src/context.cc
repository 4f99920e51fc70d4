#include "sparsek/context.hpp"

#include <string>

#include "sparsek/error.hpp"

namespace sparsek {

void* BufferAllocator::allocate(std::size_t bytes) {
  std::size_t const rounded =
      (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  if (rounded > bytes_ - used_) {
    throw InvalidArgument("workspace: expected at least " + std::to_string(used_ + rounded) +
                          " bytes, got " + std::to_string(bytes_));
  }
  void* const piece = data_ + used_;
  used_ += rounded;
  return piece;
}

}  // namespace sparsek
