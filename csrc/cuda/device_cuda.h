// What the launchers ask of torch about the device of a call. Defined in device_cuda.cpp; the
// executor of tests/simt defines it for itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <cuda_runtime_api.h>

#include "launch_config.h"

namespace bnext::cuda {

// The device of a tensor, current while this lives.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& tensor);

  cudaStream_t stream() const;
  const DeviceProperties& properties() const;

  // n counters (int32) that are zero before the next kernel of the stream, which leaves them so.
  at::Tensor counters(std::int64_t n) const;

 private:
  c10::DeviceGuard guard_;
  at::Device device_;
};

// Raises for the error code of a launch of `op`.
void check_launch(cudaError_t error, const char* op);

}  // namespace bnext::cuda
