// What the launchers ask about a device, answered by torch's CUDA.
#include "device_cuda.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <mutex>

namespace bnext::cuda {
namespace {

std::mutex limit_mutex;
DeviceProperties limit = kNoLimits;

}  // namespace

cudaStream_t DeviceScope::stream() const {
  return c10::cuda::getCurrentCUDAStream(tensor_.device().index()).stream();
}

DeviceProperties DeviceScope::properties() const {
  // Asked of the driver once a device, by torch.
  const cudaDeviceProp& device = *at::cuda::getDeviceProperties(tensor_.device().index());
  const std::lock_guard<std::mutex> lock(limit_mutex);
  return {
      std::min(limit.num_sms, device.multiProcessorCount),
      std::min(limit.max_threads_per_sm, device.maxThreadsPerMultiProcessor),
      std::min(limit.max_blocks_per_sm, device.maxBlocksPerMultiProcessor),
      std::min(limit.shared_per_sm, static_cast<int>(device.sharedMemPerMultiprocessor)),
      std::min(limit.shared_per_block, static_cast<int>(device.sharedMemPerBlockOptin)),
      limit.narrow_elements};
}

void limit_device(const DeviceProperties& most) {
  const std::lock_guard<std::mutex> lock(limit_mutex);
  limit = most;
}

}  // namespace bnext::cuda
