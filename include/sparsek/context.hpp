// Where and how a call runs: device, backend, stream, threads, workspace.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace sparsek {

enum class DeviceType : std::uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;  // CUDA ordinal; ignored on the CPU

  friend bool operator==(Device const&, Device const&) = default;
};

// Which implementation runs.
//   kAuto       the fastest one for the device and the problem
//   kReference  the fp64 specification (host memory, slow, any float dtype)
//   kCpu        the threaded, vectorised CPU kernels
//   kPortable   the CUDA kernels that run on every architecture (sm_80 and later), also where a
//               faster one exists
//   kSm90       the Hopper kernels; Unsupported where they do not apply
enum class Backend : std::uint8_t { kAuto, kReference, kCpu, kPortable, kSm90 };

// Scratch memory of one call, on the context's device. `allocate` returns at least `bytes` bytes
// aligned to 256, or throws. What was allocated is given back with `deallocate` before the call
// returns, in stream order on CUDA.
class WorkspaceAllocator {
 public:
  virtual ~WorkspaceAllocator() = default;
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void deallocate(void* pointer) noexcept = 0;
};

// Hands out pieces of one buffer that the caller owns, one after another, and never more:
// `allocate` throws InvalidArgument when the buffer is too small. The stages' *_workspace_bytes
// functions give its size.
class BufferAllocator final : public WorkspaceAllocator {
 public:
  BufferAllocator(void* data, std::size_t bytes)
      : data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  void* allocate(std::size_t bytes) override;
  void deallocate(void*) noexcept override {}

 private:
  std::byte* data_;
  std::size_t bytes_;
  std::size_t used_ = 0;
};

// Alignment of everything that a WorkspaceAllocator returns, in bytes.
inline constexpr std::size_t kWorkspaceAlignment = 256;

struct Context {
  Device device{};
  Backend backend = Backend::kAuto;
  // The CUDA stream (a cudaStream_t) that work is enqueued on; null is the default stream. No call
  // waits for it.
  void* stream = nullptr;
  // Threads of the CPU backend; 0: as many as the process may use.
  int num_threads = 0;
  // Null: the heap on the CPU, the stream-ordered pool on CUDA.
  WorkspaceAllocator* allocator = nullptr;
};

}  // namespace sparsek
