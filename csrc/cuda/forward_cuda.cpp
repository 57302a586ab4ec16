// Forward on CUDA: all of it, and reduce and apply on their own.
#include "backend_cuda.h"
#include "tensors_cuda.h"

namespace bnext::cuda {
namespace {

template <typename scalar_t>
ForwardElements<scalar_t> forward_elements(const ForwardTensors& tensors) {
  const at::ScalarType dtype = tensors.input.scalar_type();
  ForwardElements<scalar_t> elements;
  elements.input = const_data_of<scalar_t>(tensors.input);
  elements.residual = const_data_of<scalar_t>(tensors.residual);
  elements.output = data_of<scalar_t>(tensors.output);
  elements.weight = channel_array(tensors.weight, dtype);
  elements.bias = channel_array(tensors.bias, dtype);
  elements.activation = tensors.activation;
  return elements;
}

Operands forward_operands(const ForwardTensors& tensors, std::int64_t num_ghosts) {
  return operands(tensors.layout, num_ghosts, {tensors.input, tensors.residual, tensors.output});
}

template <typename scalar_t>
void reduce(
    const DeviceScope& device,
    const at::Tensor& input,
    const Layout& layout,
    std::int64_t num_ghosts,
    const StatsOutputs<scalar_t>& outputs) {
  const Launch launch =
      two_pass_launch(operands(layout, num_ghosts, {input}), Pass::kReduce, device.properties());
  const LaunchMemory<TripleSets> memory(
      device, input, launch, /*on_chip=*/false, outputs.running.given());
  const ReduceArgs<scalar_t> args{
      launch.tiling, const_data_of<scalar_t>(input), outputs, memory.workspace};
  check_launch(ForwardLaunches<scalar_t>::reduce(launch, args, device.stream()), "reduce");
}

// `running`: in eval, whose statistics these are.
template <typename scalar_t>
void apply(
    const DeviceScope& device,
    const ForwardTensors& tensors,
    const StatsTensors& saved,
    const RunningStats* running,
    double eps) {
  const Launch launch = two_pass_launch(
      forward_operands(tensors, saved.num_ghosts()), Pass::kApply, device.properties());
  const ApplyArgs<scalar_t> args{
      launch.tiling,
      forward_elements<scalar_t>(tensors),
      saved_stats<scalar_t>(saved),
      running != nullptr,
      eps,
      running != nullptr ? *running : RunningStats{}};
  check_launch(ForwardLaunches<scalar_t>::apply(launch, args, device.stream()), "apply");
}

template <typename scalar_t>
void train(
    const DeviceScope& device,
    const ForwardTensors& tensors,
    const StatsTensors& saved,
    const StatsOutputs<scalar_t>& outputs) {
  const std::int64_t num_ghosts = saved.num_ghosts();
  const auto elements = forward_elements<scalar_t>(tensors);
  const Launch launch = plan_on_chip(
      forward_operands(tensors, num_ghosts), /*tensors=*/1, device.properties(),
      [&](const Launch& candidate, int* blocks_per_sm) {
    return ForwardLaunches<scalar_t>::on_chip_occupancy(candidate, elements, blocks_per_sm);
  });
  if (launch.blocks == 0) {
    reduce<scalar_t>(device, tensors.input, tensors.layout, num_ghosts, outputs);
    apply<scalar_t>(device, tensors, saved, nullptr, 0);
    return;
  }
  const LaunchMemory<TripleSets> memory(
      device, tensors.input, launch, /*on_chip=*/true, outputs.running.given());
  const ForwardOnChipArgs<scalar_t> args{
      launch.tiling,
      {launch.tile_teams, launch.ghost_teams, launch.cache_elements, memory.barriers},
      elements,
      outputs,
      memory.workspace};
  check_launch(ForwardLaunches<scalar_t>::on_chip(launch, args, device.stream()), "forward");
}

}  // namespace

void CudaBackend::forward(
    const ForwardCall& call, const ForwardTensors& tensors, const StatsTensors& saved) const {
  const DeviceScope device(tensors.input);
  const at::ScalarType dtype = tensors.input.scalar_type();
  const RunningStats running = running_stats(call.running, call.momentum, dtype);
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = decltype(tag);
    if (!call.training) {
      cuda::apply<scalar_t>(device, tensors, saved, &running, call.eps);
      return;
    }
    StatsOutputs<scalar_t> outputs;
    outputs.saved = saved_stats<scalar_t>(saved);
    outputs.eps = call.eps;
    outputs.running = running;
    train<scalar_t>(device, tensors, saved, outputs);
  });
}

void CudaBackend::apply(const ForwardTensors& tensors, const StatsTensors& saved) const {
  const DeviceScope device(tensors.input);
  dispatch_dtype(tensors.input.scalar_type(), [&](auto tag) {
    cuda::apply<decltype(tag)>(device, tensors, saved, nullptr, 0);
  });
}

void CudaBackend::reduce(
    const at::Tensor& input, const Layout& layout, const MomentTensors& moments) const {
  const DeviceScope device(input);
  dispatch_dtype(input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    StatsOutputs<scalar_t> outputs;
    outputs.count = moments.count.mutable_data_ptr<std::int64_t>();
    outputs.mean = moments.mean.mutable_data_ptr<double>();
    outputs.m2 = moments.m2.mutable_data_ptr<double>();
    outputs.eps = 1;  // of the saved statistics, which nobody asks for
    cuda::reduce<scalar_t>(device, input, layout, moments.mean.size(0), outputs);
  });
}

}  // namespace bnext::cuda

const bnext::Backend* bnext::cuda_backend() {
  static const cuda::CudaBackend backend;
  return &backend;
}
