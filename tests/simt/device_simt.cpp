// What the launchers ask about their device, where it is the executor: see csrc/cuda/device_cuda.h.
#include "../../csrc/cuda/device_cuda.h"

#include <ATen/ops/zeros.h>

#include "executor.h"

namespace bnext::cuda {

DeviceScope::DeviceScope(const at::Tensor& tensor)
    : guard_(tensor.device()), device_(tensor.device()) {}

cudaStream_t DeviceScope::stream() const {
  return nullptr;
}

const DeviceProperties& DeviceScope::properties() const {
  static DeviceProperties properties;
  const simt::Device& device = simt::device();
  properties = {
      device.sm_count, device.max_threads_per_sm, device.max_blocks_per_sm,
      static_cast<int>(device.shared_per_sm), static_cast<int>(device.shared_per_block_optin)};
  return properties;
}

// One set of counters for all launches, as on a stream: what a launch leaves in it, the next one
// meets.
at::Tensor DeviceScope::counters(std::int64_t n) const {
  // Not thread_local: the executor takes this module's TLS segment for shared memory.
  static at::Tensor& counters = *new at::Tensor;
  if (!counters.defined() || counters.numel() < n) {
    counters = at::zeros({2 * n}, at::kInt);
  }
  TORCH_CHECK(
      counters.count_nonzero().item<std::int64_t>() == 0,
      "a launch has left its counters at other values than zero");
  return counters;
}

void check_launch(cudaError_t error, const char* op) {
  TORCH_CHECK(
      error == cudaSuccess, "bnext: ", op, " failed on the executor: ", cudaGetErrorName(error),
      ": ", cudaGetErrorString(error));
}

}  // namespace bnext::cuda
