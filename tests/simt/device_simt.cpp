// What the launchers ask about their device, where it is the executor: see csrc/cuda/device_cuda.h.
#include "../../csrc/cuda/device_cuda.h"
#include "../../csrc/cuda/launch_state.h"
#include "executor.h"

namespace bnext::cuda {
namespace {

std::int64_t narrow_elements = DeviceProperties{}.narrow_elements;

}  // namespace

// Asked for before every launch.
cudaStream_t DeviceScope::stream() const {
  stream_counters().each([](const unsigned* counters, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) {
      TORCH_CHECK(counters[i] == 0, "a launch has left its counters at other values than zero");
    }
  });
  return nullptr;
}

DeviceProperties DeviceScope::properties() const {
  const simt::Device& device = simt::device();
  return {
      device.sm_count,
      device.max_threads_per_sm,
      device.max_blocks_per_sm,
      static_cast<int>(device.shared_per_sm),
      static_cast<int>(device.shared_per_block_optin),
      narrow_elements};
}

// The executor is a GPU of that size.
void limit_device(const DeviceProperties& most) {
  simt::Device device;
  device.sm_count = most.num_sms;
  device.shared_per_sm = static_cast<std::size_t>(most.shared_per_sm);
  device.shared_per_block_optin = static_cast<std::size_t>(most.shared_per_block);
  simt::set_device(device);
  narrow_elements = most.narrow_elements;
}

}  // namespace bnext::cuda
