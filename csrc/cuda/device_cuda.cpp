// The device of a call: what does not depend on who answers for it, torch (device_torch_cuda.cpp)
// or the executor (tests/simt).
#include "device_cuda.h"

#include <algorithm>
#include <limits>

#include "../ops/backend.h"
#include "launch_state.h"

namespace bnext::cuda {

CounterMemory DeviceScope::counters(std::int64_t n) const {
  CounterMemory memory;
  if (n == 0) {
    return memory;
  }
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(stream(), &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusNone) {
    check_launch(
        stream_counters().get(tensor_.device().index(), stream(), n, &memory.counters), "counters");
    return memory;
  }
  // A graph has its own: two graphs captured on one stream may be replayed on two at once.
  memory.owner = tensor_.new_empty({n}, at::kInt);
  memory.counters = reinterpret_cast<unsigned*>(memory.owner.mutable_data_ptr<std::int32_t>());
  check_launch(
      cudaMemsetAsync(memory.counters, 0, memory.owner.nbytes(), stream()), "cudaMemsetAsync");
  return memory;
}

void check_launch(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    cudaGetLastError();
  }
  TORCH_CHECK(
      error == cudaSuccess, "bnext: ", op, " failed on the device: ", cudaGetErrorName(error), ": ",
      cudaGetErrorString(error));
}

}  // namespace bnext::cuda

namespace bnext {

void limit_cuda_device(
    std::int64_t num_sms,
    std::int64_t shared_per_sm,
    std::int64_t shared_per_block,
    std::int64_t narrow_elements) {
  TORCH_CHECK(
      num_sms > 0 && shared_per_sm > 0 && shared_per_block > 0,
      "num_sms, shared_per_sm and shared_per_block must be positive, got ", num_sms, ", ",
      shared_per_sm, " and ", shared_per_block);
  constexpr std::int64_t kMost = std::numeric_limits<int>::max();
  cuda::DeviceProperties most = cuda::kNoLimits;
  most.num_sms = static_cast<int>(std::min(num_sms, kMost));
  most.shared_per_sm = static_cast<int>(std::min(shared_per_sm, kMost));
  most.shared_per_block = static_cast<int>(std::min(shared_per_block, kMost));
  most.narrow_elements = std::clamp<std::int64_t>(narrow_elements, 0, most.narrow_elements);
  cuda::limit_device(most);
}

}  // namespace bnext
