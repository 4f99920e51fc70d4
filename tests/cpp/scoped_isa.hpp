// Instruction sets in tests.
#pragma once
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/isa.hpp"

namespace sparsek::testing {

// Names of the instruction sets that this machine has.
inline std::vector<std::string> machine_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i) {
    names.emplace_back(cpu::name_of(static_cast<cpu::Isa>(i)));
  }
  return names;
}

// Runs what follows with that instruction set.
class ScopedIsa {
 public:
  explicit ScopedIsa(std::string const& name) {
    if (char const* const old = std::getenv(kVariable)) old_ = old;
    setenv(kVariable, name.c_str(), 1);
  }
  ~ScopedIsa() {
    if (old_.empty()) {
      unsetenv(kVariable);
    } else {
      setenv(kVariable, old_.c_str(), 1);
    }
  }
  ScopedIsa(ScopedIsa const&) = delete;
  ScopedIsa& operator=(ScopedIsa const&) = delete;

 private:
  static constexpr char const* kVariable = "BLACKWELL_SPARSEK_CPU_ISA";
  std::string old_;
};

}  // namespace sparsek::testing
