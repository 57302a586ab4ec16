#include "device_cuda.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace bnext::cuda {
namespace {

DeviceProperties query(at::DeviceIndex index) {
  const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(index);
  return {
      properties.multiProcessorCount, properties.maxThreadsPerMultiProcessor,
      properties.maxBlocksPerMultiProcessor,
      static_cast<int>(properties.sharedMemPerMultiprocessor),
      static_cast<int>(properties.sharedMemPerBlockOptin)};
}

}  // namespace

DeviceScope::DeviceScope(const at::Tensor& tensor)
    : guard_(tensor.device()), device_(tensor.device()) {}

cudaStream_t DeviceScope::stream() const {
  return c10::cuda::getCurrentCUDAStream(device_.index()).stream();
}

const DeviceProperties& DeviceScope::properties() const {
  static std::mutex mutex;
  static std::map<at::DeviceIndex, DeviceProperties> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device_.index());
  if (found == known.end()) {
    found = known.emplace(device_.index(), query(device_.index())).first;
  }
  return found->second;
}

at::Tensor DeviceScope::counters(std::int64_t n) const {
  const auto options = at::TensorOptions(device_).dtype(at::kInt);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(stream(), &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) {
    // A graph has its own: two graphs captured on one stream may be replayed on two at once.
    const at::Tensor own = at::empty({n}, options);
    check_launch(
        cudaMemsetAsync(own.mutable_data_ptr(), 0, own.nbytes(), stream()), "cudaMemsetAsync");
    return own;
  }
  // Launches of one stream follow each other: one set of counters serves all of them, and no launch
  // is spent on zeroing it. Never freed: the CUDA context may be gone when statics are.
  static std::mutex mutex;
  static auto* const kept = new std::map<std::pair<at::DeviceIndex, cudaStream_t>, at::Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& counters = (*kept)[{device_.index(), stream()}];
  if (!counters.defined() || counters.numel() < n) {
    constexpr std::int64_t kLeast = 4096;
    counters = at::zeros({std::max(kLeast, 2 * n)}, options);
  }
  return counters;
}

void check_launch(cudaError_t error, const char* op) {
  TORCH_CHECK(
      error == cudaSuccess, "bnext: ", op, " failed on the device: ", cudaGetErrorName(error), ": ",
      cudaGetErrorString(error));
}

}  // namespace bnext::cuda
