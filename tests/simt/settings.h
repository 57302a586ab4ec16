// What outlives a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "executor.h"
#include "random.h"

#pragma GCC visibility push(hidden)

namespace simt {

struct Settings {
  std::mutex launching;  // one launch at a time
  Device device;
  std::uint64_t seed = 0;
  Random random;
  bool shuffles_order_memory = false;
  std::map<std::uintptr_t, std::uintptr_t> memory;  // end of each registered range, by begin
  unsigned long long launches = 0;
  unsigned long long blocks = 0;
  unsigned long long switches = 0;
  unsigned long long atomics = 0;
  std::map<const void*, int> max_dynamic_shared;  // by kernel
  cudaError_t last_error = cudaSuccess;
  bool capturing = false;
  bool failing = false;

  Settings();
};
extern Settings settings;

}  // namespace simt

#pragma GCC visibility pop
