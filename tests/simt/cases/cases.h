// What the executor's own cases share: their list, the checks, and launches.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "../executor.h"

extern __shared__ __align__(16) unsigned char bnext_shared[];

namespace executor_cases {

// Throws std::runtime_error with what was wrong.
struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case> primitive_cases();
std::vector<Case> error_cases();
std::vector<Case> launch_state_cases();

using Where = std::source_location;

inline void check(bool right, const std::string& what, const Where& where = Where::current()) {
  if (right) return;
  throw std::runtime_error(
      std::string(where.file_name()) + ":" + std::to_string(where.line()) + ": " + what);
}

template <typename T>
void check_equal(T found, T expected, const char* what, const Where& where = Where::current()) {
  check(
      found == expected,
      std::string(what) + " is " + std::to_string(found) + ", not " + std::to_string(expected),
      where);
}

struct Shape {
  dim3 grid;
  dim3 block;
  std::size_t shared = 0;
  bool cooperative = false;
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(Shape shape, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = shape.cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// In order, and in a few drawn orders.
inline void for_seeds(const std::function<void()>& body) {
  for (unsigned seed = 0; seed < 6; ++seed) {
    simt::set_seed(seed);
    body();
  }
  simt::set_seed(0);
}

}  // namespace executor_cases
