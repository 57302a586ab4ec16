#include "launch_state.h"

#include <algorithm>
#include <set>

namespace bnext::cuda {

cudaError_t opt_in_to_shared(const void* kernel, int shared_bytes) {
  constexpr int kWithoutOptIn = 48 * 1024;
  if (shared_bytes <= kWithoutOptIn) {
    return cudaSuccess;
  }
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device}) != 0) {
    return cudaSuccess;
  }
  int most = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess) {
    done.insert({kernel, device});
  }
  return error;
}

namespace {

// While this lives, the thread may allocate although a stream is being captured, by itself or by
// another thread: nothing of it goes into a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

cudaError_t StreamCounters::get(
    int device, cudaStream_t stream, std::int64_t n, unsigned** counters) {
  unsigned long long number = 0;
  if (const cudaError_t error = cudaStreamGetId(stream, &number); error != cudaSuccess) {
    return error;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  Block& block = blocks_[{device, number}];
  if (block.size < n) {
    // A block that is outgrown stays: kernels of the stream may still run on it. Each is at least
    // twice the one before, so all of them are less than twice the last.
    constexpr std::int64_t kLeast = 4096;
    const std::int64_t size = std::max(kLeast, 2 * n);
    const auto bytes = static_cast<std::size_t>(size) * sizeof(unsigned);
    const RelaxedCapture relaxed;
    void* memory = nullptr;
    if (const cudaError_t error = cudaMalloc(&memory, bytes); error != cudaSuccess) {
      return error;
    }
    if (const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, stream); error != cudaSuccess) {
      cudaFree(memory);
      return error;
    }
    block = {static_cast<unsigned*>(memory), size};
  }
  *counters = block.counters;
  return cudaSuccess;
}

StreamCounters& stream_counters() {
  // Never destroyed: the CUDA context may be gone when statics are.
  static auto* const counters = new StreamCounters;
  return *counters;
}

}  // namespace bnext::cuda
