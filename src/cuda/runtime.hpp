// What every CUDA stage needs from the runtime: errors as exceptions, the right device, workspace.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "sparsek/context.hpp"

namespace sparsek::cuda {

// Throws DeviceError, naming `what` and the runtime's reason, unless `status` is success.
void check(cudaError_t status, char const* what);

// Throws DeviceError if the kernel launch before it failed. Never synchronises.
inline void check_launch(char const* kernel) { check(cudaGetLastError(), kernel); }

inline cudaStream_t stream_of(Context const& context) {
  return static_cast<cudaStream_t>(context.stream);
}

// Makes a device current and restores the caller's on the way out.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device);
  ~DeviceGuard();
  DeviceGuard(DeviceGuard const&) = delete;
  DeviceGuard& operator=(DeviceGuard const&) = delete;

 private:
  int previous_ = -1;  // -1: nothing to restore
};

// What the choice of kernel depends on; asked once per device and process.
struct DeviceProperties {
  int compute_capability;  // 10 * major + minor
  int num_sms;
  int shared_bytes_per_block;  // with opt-in
  int shared_bytes_per_sm;
};
DeviceProperties const& properties_of(Device device);

// Scratch memory of one call: from the context's allocator, else from the device's stream-ordered
// pool. Given back in stream order when it goes out of scope.
class Workspace {
 public:
  Workspace(Context const& context, std::size_t bytes);
  ~Workspace();
  Workspace(Workspace const&) = delete;
  Workspace& operator=(Workspace const&) = delete;

  std::byte* data() const { return data_; }

 private:
  Context const& context_;
  std::byte* data_ = nullptr;
};

// Lays out one buffer as several aligned arrays. With a null base it only measures.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::size_t count) {
    std::size_t const at = used_;
    used_ +=
        (count * sizeof(T) + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  std::size_t bytes() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace sparsek::cuda
