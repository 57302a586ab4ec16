// What the launchers ask of torch about the device of a call. Defined in device_cuda.cpp; the
// executor of tests/simt defines it for itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <cuda_runtime_api.h>

#include <limits>

#include "launch_config.h"

namespace bnext::cuda {

// Counters (unsigned) that are zero before the next kernel of the stream, which leaves them so.
struct CounterMemory {
  unsigned* counters = nullptr;
  at::Tensor owner;  // of a graph's own
};

// The device of a tensor, current while this lives.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& tensor) : guard_(tensor.device()), tensor_(tensor) {}

  cudaStream_t stream() const;
  // As limited by limit_device.
  DeviceProperties properties() const;
  CounterMemory counters(std::int64_t n) const;

 private:
  c10::DeviceGuard guard_;
  const at::Tensor& tensor_;
};

// Launches are planned as for a GPU that has no more than this of anything, in all threads: so that
// small tensors take every path on any GPU. For tests; torch.ops.bnext.limit_cuda_device.
void limit_device(const DeviceProperties& most);
constexpr int kNoLimit = std::numeric_limits<int>::max();
constexpr DeviceProperties kNoLimits{kNoLimit, kNoLimit, kNoLimit, kNoLimit, kNoLimit};

// Raises for the error code of a CUDA call for `op`, and takes the error away: it would come up
// again in the next check that torch makes.
void check_launch(cudaError_t error, const char* op);

}  // namespace bnext::cuda
