// Tensors to what the kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "../tensors.h"
#include "device_cuda.h"
#include "launch.h"
#include "workspace.h"

namespace bnext::cuda {

// Calls f with a value of the CUDA type of a checked input dtype.
template <typename F>
void dispatch_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(__half{});
    case at::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Half and bfloat16 of c10 and of CUDA are the same bits.
template <typename T>
T* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}
template <typename T>
const T* const_data_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

inline ChannelArray channel_array(const OptionalTensor& tensor, at::ScalarType dtype) {
  if (!is_given(tensor)) {
    return {};
  }
  return {
      const_cast<void*>(tensor->const_data_ptr()), tensor->stride(0),
      tensor->scalar_type() == acc_type(dtype)};
}

inline RunningStats running_stats(
    const RunningStatsArgs& args, std::optional<double> momentum, at::ScalarType dtype) {
  RunningStats running;
  running.mean = channel_array(args.running_mean, dtype);
  running.var = channel_array(args.running_var, dtype);
  if (is_given(args.num_batches_tracked)) {
    running.num_batches = args.num_batches_tracked->mutable_data_ptr<std::int64_t>();
  }
  running.momentum = momentum.value_or(0);
  running.cumulative = !momentum.has_value();
  return running;
}

// Bytes past a multiple of 16 where they are the same for all given tensors, else -1.
inline int common_phase(std::initializer_list<at::Tensor> tensors) {
  int phase = -2;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined()) {
      const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
      const int own = static_cast<int>(address % kVectorAlignment);
      phase = phase == -2 || phase == own ? own : -1;
    }
  }
  return phase;
}

template <typename scalar_t>
SavedStats<scalar_t> saved_stats(const StatsTensors& stats) {
  using acc_t = AccType<scalar_t>;
  return {data_of<acc_t>(stats.mean), data_of<acc_t>(stats.mean_lo), data_of<acc_t>(stats.invstd)};
}

// `tensors`: all that a kernel reads and writes, the first of them given.
inline Operands operands(
    const Layout& layout, std::int64_t num_ghosts, std::initializer_list<at::Tensor> tensors) {
  const at::Tensor& input = *tensors.begin();
  Operands out;
  out.layout = layout;
  out.num_ghosts = num_ghosts;
  out.element_bytes = static_cast<int>(input.element_size());
  out.acc_bytes = input.scalar_type() == at::kDouble ? 8 : 4;
  out.phase_bytes = common_phase(tensors);
  return out;
}

// The memory between the blocks of a launch; lives until the launch is in the stream.
template <typename Sets>
struct LaunchMemory {
  at::Tensor doubles;
  CounterMemory counters;
  Workspace<Sets> workspace;
  unsigned* barriers = nullptr;

  LaunchMemory(
      const DeviceScope& device,
      const at::Tensor& input,
      const Launch& launch,
      bool on_chip,
      bool merges_ghosts) {
    const WorkspaceSize size = workspace_size(launch, on_chip, merges_ghosts);
    doubles = input.new_empty({size.doubles}, at::kDouble);
    counters = device.counters(size.counters);
    const WorkspacePointers pointers{doubles.mutable_data_ptr<double>(), counters.counters};
    workspace = make_workspace<Sets>(launch, size, on_chip, pointers, &barriers);
  }
};

// The on-chip launch of a kernel whose occupancy `query(launch, &blocks_per_sm)` tells; no blocks
// where two passes are the way.
template <typename Query>
Launch plan_on_chip(
    const Operands& operands, int tensors, const DeviceProperties& device, Query&& query) {
  std::int64_t resident = detail::resident_blocks(device);
  Launch launch = on_chip_launch(operands, tensors, device, resident);
  // A second try with what the kernel's registers and shared memory really allow.
  for (int tries = 0; launch.cooperative && launch.blocks > 0; ++tries) {
    int blocks_per_sm = 0;
    check_launch(query(launch, &blocks_per_sm), "the occupancy query");
    resident = static_cast<std::int64_t>(blocks_per_sm) * device.num_sms;
    if (launch.blocks <= resident) {
      break;
    }
    launch.blocks = 0;
    if (tries == 0) {
      launch = on_chip_launch(operands, tensors, device, resident);
    }
  }
  return launch;
}

}  // namespace bnext::cuda
