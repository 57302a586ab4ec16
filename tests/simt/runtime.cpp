// The runtime API: settings, checks of a launch, and the plain functions.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "scheduler.h"
#include "settings.h"

namespace simt {

Settings settings;

Settings::Settings() {
  const char* value = std::getenv("BNEXT_SIMT_SEED");
  seed = value == nullptr ? 0 : std::strtoull(value, nullptr, 0);
  random = Random(seed);
}

namespace {

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) settings.last_error = error;
  return error;
}

std::size_t dynamic_shared_limit(const void* kernel) {
  auto found = settings.max_dynamic_shared.find(kernel);
  std::size_t limit = settings.device.shared_per_block;
  return found == settings.max_dynamic_shared.end() ? limit
                                                    : std::max(limit, std::size_t(found->second));
}

std::size_t round_up(std::size_t value, std::size_t step) {
  return (value + step - 1) / step * step;
}

int occupancy(std::size_t threads, std::size_t shared) {
  const Device& device = settings.device;
  if (threads == 0 || threads > std::size_t(device.max_threads_per_block)) return 0;
  std::size_t warps = round_up(threads, 32);
  std::size_t blocks = std::size_t(device.max_threads_per_sm) / warps;
  blocks = std::min(blocks, std::size_t(device.max_blocks_per_sm));
  blocks = std::min(blocks, device.shared_per_sm / (shared + device.shared_reserved_per_block));
  std::size_t registers = warps * std::size_t(device.registers_per_thread);
  if (registers != 0) blocks = std::min(blocks, std::size_t(device.registers_per_sm) / registers);
  return int(blocks);
}

cudaError_t check(const dim3& grid, const dim3& block) {
  const Device& device = settings.device;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > device.max_grid_x || grid.y > device.max_grid_y || grid.z > device.max_grid_z) {
    return cudaErrorInvalidConfiguration;
  }
  if (block.x == 0 || block.y == 0 || block.z == 0) return cudaErrorInvalidConfiguration;
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  std::size_t threads = std::size_t(block.x) * block.y * block.z;
  if (threads > std::size_t(device.max_threads_per_block)) return cudaErrorInvalidConfiguration;
  return cudaSuccess;
}

}  // namespace

const Device& device() {
  return settings.device;
}
void set_device(const Device& device) {
  settings.device = device;
}

void set_seed(std::uint64_t seed) {
  std::lock_guard lock(settings.launching);
  settings.seed = seed;
  settings.random = Random(seed);
}
std::uint64_t seed() {
  return settings.seed;
}

void fail_next_launch() {
  settings.failing = true;
}
void set_capturing(bool capturing) {
  settings.capturing = capturing;
}

Counters counters() {
  std::lock_guard lock(settings.launching);
  Counters result{};
  result.launches = settings.launches;
  result.blocks = settings.blocks;
  result.switches = settings.switches;
  result.atomics = settings.atomics;
  const AccessCounts& counts = access_counts;
  for (int size = 0; size < 5; ++size) {
    result.bytes_loaded += counts.loads[size] << size;
    result.bytes_stored += counts.stores[size] << size;
    (size == 4 ? result.loads_16 : result.loads_smaller) += counts.loads[size];
    (size == 4 ? result.stores_16 : result.stores_smaller) += counts.stores[size];
  }
  return result;
}

void reset_counters() {
  std::lock_guard lock(settings.launching);
  settings.launches = settings.blocks = settings.switches = settings.atomics = 0;
  access_counts = {{}, {}, access_counts.slow};
}

void register_memory(const void* address, std::size_t bytes) {
  std::lock_guard lock(settings.launching);
  auto begin = reinterpret_cast<std::uintptr_t>(address);
  auto& end = settings.memory[begin];
  end = std::max(end, begin + bytes);
  access_counts.slow = true;
}

void clear_memory() {
  std::lock_guard lock(settings.launching);
  settings.memory.clear();
  access_counts.slow = false;
}

void set_shuffles_order_memory(bool value) {
  settings.shuffles_order_memory = value;
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  std::lock_guard lock(settings.launching);
  if (kernel == nullptr) return record(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  std::size_t limit = std::min(settings.device.shared_per_block_optin, kSharedCapacity);
  if (value < 0 || std::size_t(value) > limit) return record(cudaErrorInvalidValue);
  settings.max_dynamic_shared[kernel] = value;
  return cudaSuccess;
}

cudaError_t get_function_attributes(cudaFuncAttributes* attributes, const void* kernel) {
  std::lock_guard lock(settings.launching);
  if (kernel == nullptr) return record(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->maxThreadsPerBlock = settings.device.max_threads_per_block;
  attributes->numRegs = settings.device.registers_per_thread;
  attributes->maxDynamicSharedSizeBytes = int(dynamic_shared_limit(kernel));
  return cudaSuccess;
}

cudaError_t max_active_blocks(int* count, const void* kernel, int threads, std::size_t shared) {
  std::lock_guard lock(settings.launching);
  if (threads <= 0) return record(cudaErrorInvalidValue);
  *count = shared > dynamic_shared_limit(kernel) ? 0 : occupancy(std::size_t(threads), shared);
  return cudaSuccess;
}

cudaError_t launch(
    const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* arguments) {
  std::lock_guard lock(settings.launching);
  if (std::exchange(settings.failing, false)) return record(cudaErrorLaunchFailure);
  if (cudaError_t error = check(config.gridDim, config.blockDim)) return record(error);
  std::size_t shared = config.dynamicSmemBytes;
  if (shared > dynamic_shared_limit(kernel)) return record(cudaErrorInvalidValue);
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeCooperative) continue;
    cooperative = attribute.val.cooperative != 0;
  }
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  std::size_t threads = std::size_t(block.x) * block.y * block.z;
  std::size_t at_once = std::size_t(settings.device.sm_count) * occupancy(threads, shared);
  if (cooperative && std::size_t(grid.x) * grid.y * grid.z > at_once) {
    return record(cudaErrorCooperativeLaunchTooLarge);
  }
  ++settings.launches;
  Launch(grid, block, shared, cooperative).run(body, arguments);
  return cudaSuccess;
}

}  // namespace simt
