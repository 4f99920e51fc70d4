// The CPU kernels. Compiled once per instruction set, with SPARSEK_CPU_ISA naming the namespace
// (CMakeLists.txt).
#include "cpu/kernels.hpp"

#include <math.h>

#include "cpu/attend_backward_tile.hpp"
#include "cpu/attend_rows.hpp"
#include "cpu/attend_tile.hpp"
#include "cpu/elements.hpp"

namespace sparsek::cpu::SPARSEK_CPU_ISA {
namespace {

template <typename Words, typename Element>
void attend_elements(AttendTile const& tile) {
  // Words of two elements make the tile kernel, but not the other one, twice as fast.
  if (tile.num_rows <= kFewRows / Words::kPerWord) {
    RowsKernel<Element>(tile).run();
  } else {
    TileKernel<Words, Element>(tile).run();
  }
}

void attend(AttendTile const& tile) {
  switch (tile.dtype) {
    case DataType::kFloat32:
      return attend_elements<FloatWords, float>(tile);
    case DataType::kFloat16:
      return attend_elements<FloatWords, Fp16>(tile);
    default:
#if defined(__AVX512BF16__)
      return attend_elements<Bf16Words, Bf16>(tile);
#else
      return attend_elements<FloatWords, Bf16>(tile);
#endif
  }
}

size_t attend_workspace(int64_t head_dim, int64_t num_rows) {
  return larger_of(make_scratch(nullptr, head_dim, num_rows).bytes,
                   make_rows_scratch(nullptr, head_dim).bytes);
}

void attend_backward(AttendBackwardTile const& tile) {
  switch (tile.dtype) {
    case DataType::kFloat32:
      return BackwardTileKernel<FloatWords, float>(tile).run();
    case DataType::kFloat16:
      return BackwardTileKernel<FloatWords, Fp16>(tile).run();
    default:
#if defined(__AVX512BF16__)
      return BackwardTileKernel<Bf16Words, Bf16>(tile).run();
#else
      return BackwardTileKernel<FloatWords, Bf16>(tile).run();
#endif
  }
}

size_t attend_backward_workspace(int64_t head_dim, int64_t num_rows) {
  return make_backward_scratch(nullptr, head_dim, num_rows).bytes;
}

int64_t size_of_gradient_row(int64_t head_dim) { return gradient_row_size(head_dim); }

float write_gradients(DataType dtype, int64_t head_dim, float sm_scale, float const* row, void* dk,
                      void* dv) {
  auto const write = [&](auto* typed_dk) {
    return write_gradient_row(head_dim, sm_scale, row, typed_dk,
                              static_cast<decltype(typed_dk)>(dv));
  };
  switch (dtype) {
    case DataType::kFloat32:
      return write(static_cast<float*>(dk));
    case DataType::kFloat16:
      return write(static_cast<Fp16*>(dk));
    default:
      return write(static_cast<Bf16*>(dk));
  }
}

template <typename Element>
float negative_norm(Element const* row, int64_t head_dim) {
  VecF sums{};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    VecF const x = load_floats(row + d, head_dim - d);
    sums += x * x;
  }
  float sum = 0.0F;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return -sqrtf(sum);
}

void negative_norms(DataType dtype, void const* k, int64_t stride_k, int64_t num_keys,
                    int64_t head_dim, float* scores, int64_t stride_scores) {
  auto const run = [&](auto const* rows) {
    for (int64_t j = 0; j < num_keys; ++j) {
      scores[j * stride_scores] = negative_norm(rows + j * stride_k, head_dim);
    }
  };
  switch (dtype) {
    case DataType::kFloat32:
      return run(static_cast<float const*>(k));
    case DataType::kFloat16:
      return run(static_cast<Fp16 const*>(k));
    default:
      return run(static_cast<Bf16 const*>(k));
  }
}

}  // namespace

extern KernelTable const kTable;
KernelTable const kTable{attend,
                         attend_workspace,
                         attend_backward,
                         attend_backward_workspace,
                         size_of_gradient_row,
                         write_gradients,
                         negative_norms};

}  // namespace sparsek::cpu::SPARSEK_CPU_ISA
