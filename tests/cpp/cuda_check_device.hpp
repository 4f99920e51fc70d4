// Device memory that notices who strays: every buffer lies between two guards.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sparsek::testing {

// A failed call of the CUDA runtime. Most such errors are sticky: nothing runs after one.
class CudaFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void cuda_check(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    throw CudaFailure(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Bytes of an input's guards and of memory that nobody wrote: NaN in every floating-point dtype.
inline constexpr int kPoisonInput = 0xFF;
// Bytes of outputs before the call. NaN or below -4e37 in every floating-point dtype, and no
// position.
inline constexpr int kPoisonOutput = 0xFD;

class DeviceBuffer {
 public:
  DeviceBuffer(std::size_t bytes, int poison, std::size_t guard_bytes)
      : bytes_(bytes), guard_bytes_(guard_bytes), poison_(poison) {
    cuda_check(cudaMalloc(reinterpret_cast<void**>(&memory_),
                          std::max<std::size_t>(1, bytes + 2 * guard_bytes)),
               "cudaMalloc");
    fill(poison);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() {
    if (memory_) cudaFree(memory_);
  }

  void* data() const { return memory_ + guard_bytes_; }
  std::size_t bytes() const { return bytes_; }

  // Guards and contents.
  void fill(int byte) {
    cuda_check(cudaMemset(memory_, byte, bytes_ + 2 * guard_bytes_), "cudaMemset");
    settle();
    poison_ = byte;
  }
  void upload(void const* host) {
    if (bytes_) cuda_check(cudaMemcpy(data(), host, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
    settle();
  }
  void download(void* host) const {
    if (bytes_) cuda_check(cudaMemcpy(host, data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  bool guards_intact() const {
    std::vector<unsigned char> guards(2 * guard_bytes_);
    if (guards.empty()) return true;
    cuda_check(cudaMemcpy(guards.data(), memory_, guard_bytes_, cudaMemcpyDeviceToHost), "guard");
    cuda_check(cudaMemcpy(guards.data() + guard_bytes_, memory_ + guard_bytes_ + bytes_,
                          guard_bytes_, cudaMemcpyDeviceToHost),
               "guard");
    return std::all_of(guards.begin(), guards.end(), [&](unsigned char c) { return c == poison_; });
  }

 private:
  // Neither a fill nor an upload has ended when its call returns, and the streams that the library
  // runs on do not wait for the default one.
  static void settle() { cuda_check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"); }
  void swap(DeviceBuffer& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    std::swap(guard_bytes_, other.guard_bytes_);
    std::swap(poison_, other.poison_);
  }

  std::byte* memory_ = nullptr;
  std::size_t bytes_ = 0, guard_bytes_ = 0;
  int poison_ = 0;
};

}  // namespace sparsek::testing
