// The executor, for tests: runs CUDA kernels on the host, each CUDA thread as a fiber, and reports
// what a GPU would leave undefined. Kernels include <cuda_runtime.h>, found in include/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#pragma GCC visibility push(hidden)

namespace simt {

// Thrown out of cudaLaunchKernelEx by a kernel that did what it must not, with file and line.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What launches are checked against; by default a GPU of compute capability 8.0 with few
// multiprocessors, so that cooperative launches stay small.
struct Device {
  int sm_count = 4;
  int max_threads_per_block = 1024;
  int max_threads_per_sm = 2048;
  int max_blocks_per_sm = 32;
  std::size_t shared_per_block = 48 << 10;
  std::size_t shared_per_block_optin = 163 << 10;
  std::size_t shared_per_sm = 164 << 10;
  std::size_t shared_reserved_per_block = 1 << 10;
  int registers_per_sm = 65536;
  int registers_per_thread = 32;  // assumed of every kernel
  unsigned max_grid_x = 2147483647;
  unsigned max_grid_y = 65535;
  unsigned max_grid_z = 65535;
  int major = 8;
  int minor = 0;
};
const Device& device();
void set_device(const Device& device);

// Whether a stream is being captured, as another thread would do it in CUDA's global mode: memory
// can be allocated only in relaxed mode then.
void set_capturing(bool capturing);

// The next launch fails with cudaErrorLaunchFailure, and runs nothing.
void fail_next_launch();

// Of dynamic shared memory; no device can have more.
inline constexpr std::size_t kSharedCapacity = 227 << 10;

// 0: threads and blocks in order. Others: order and points of pre-emption drawn from the seed.
// Starts from the environment's BNEXT_SIMT_SEED.
void set_seed(std::uint64_t seed);
std::uint64_t seed();

// Global memory traffic since the last reset, by loads and stores with a cache hint.
struct Counters {
  unsigned long long launches;
  unsigned long long blocks;
  unsigned long long switches;
  unsigned long long bytes_loaded;
  unsigned long long bytes_stored;
  unsigned long long loads_16;  // instructions of 16 bytes
  unsigned long long loads_smaller;
  unsigned long long stores_16;
  unsigned long long stores_smaller;
  unsigned long long atomics;
};
Counters counters();
void reset_counters();

// Once a range is registered, an access to global memory outside of all ranges is an error.
void register_memory(const void* address, std::size_t bytes);
void clear_memory();

// Under ThreadSanitizer: whether shuffles and votes order memory among their lanes as __syncwarp
// does. CUDA's guide says they do not, so the default is false.
void set_shuffles_order_memory(bool value);

}  // namespace simt

#pragma GCC visibility pop
