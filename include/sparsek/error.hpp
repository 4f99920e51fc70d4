// Errors of the library. The core never prints, exits or aborts: it throws.
#pragma once
#include <stdexcept>
#include <string>

namespace sparsek {

// Base of everything that the library throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A wrong shape, dtype, device or value, or arguments that contradict each other. The message names
// the tensor or option, what was expected and what came. Python sees a ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A valid request that this backend, build or device does not serve. The message names the missing
// feature and what is supported. Python sees a NotImplementedError.
class Unsupported : public Error {
 public:
  using Error::Error;
};

// A call into the CUDA runtime or driver failed. Python sees a RuntimeError.
class DeviceError : public Error {
 public:
  using Error::Error;
};

}  // namespace sparsek
