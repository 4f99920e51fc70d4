// Which pool keys each tile of queries sees: prepared once for all query heads of a KV head.
#pragma once
#include <cuda_runtime.h>

#include "cuda/portable/attend/geometry.cuh"

namespace sparsek::cuda::portable {

// Fills the workspace that `params` points at: tile_sequence and first_tile of a packed batch,
// group_expiry and, for KeySource::kLists, list_count and lists. Every kernel of the folder comes
// after it on the same stream.
void prepare_tiles(AttendParams const& params, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
