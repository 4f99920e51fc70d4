#include "cuda/runtime.hpp"

#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "sparsek/error.hpp"

namespace sparsek::cuda {

void check(cudaError_t status, char const* what) {
  if (status == cudaSuccess) return;
  // A failed launch leaves its error behind; it must not be reported a second time by the next call.
  cudaGetLastError();
  throw DeviceError(std::string(what) + ": " + cudaGetErrorName(status) + " (" +
                    cudaGetErrorString(status) + ")");
}

DeviceGuard::DeviceGuard(Device device) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device.index) return;
  check(cudaSetDevice(device.index), "cudaSetDevice");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

DeviceProperties const& properties_of(Device device) {
  static std::mutex mutex;
  static std::vector<std::optional<DeviceProperties>> cache;
  std::lock_guard const lock(mutex);
  if (cache.empty()) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    cache.resize(count);  // never grows again: references into it stay valid
  }
  if (device.index < 0 || device.index >= static_cast<int>(cache.size())) {
    throw InvalidArgument("device: expected a CUDA index below " + std::to_string(cache.size()) +
                          ", got " + std::to_string(device.index));
  }
  auto& entry = cache[device.index];
  if (!entry) {
    auto const attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device.index), "cudaDeviceGetAttribute");
      return value;
    };
    entry = DeviceProperties{
        .compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                              attribute(cudaDevAttrComputeCapabilityMinor),
        .num_sms = attribute(cudaDevAttrMultiProcessorCount),
        .shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        .shared_bytes_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
  return *entry;
}

Workspace::Workspace(Context const& context, std::size_t bytes) : context_(context) {
  if (bytes == 0) return;
  if (context.allocator) {
    data_ = static_cast<std::byte*>(context.allocator->allocate(bytes));
  } else {
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, bytes, stream_of(context)), "cudaMallocAsync");
    data_ = static_cast<std::byte*>(memory);
  }
}

Workspace::~Workspace() {
  if (!data_) return;
  if (context_.allocator) {
    context_.allocator->deallocate(data_);
  } else {
    cudaFreeAsync(data_, stream_of(context_));
  }
}

}  // namespace sparsek::cuda
