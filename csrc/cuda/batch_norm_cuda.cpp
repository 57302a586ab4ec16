// Forward on CUDA: the fused op, and reduce and apply on their own.
#include "../ops.h"
#include "tensors_cuda.h"

namespace bnext {
namespace cuda {
namespace {

struct StatsTensors {
  at::Tensor mean, mean_lo, invstd;  // [num_ghosts, C]

  StatsTensors(const at::Tensor& input, std::int64_t num_ghosts)
      : mean(empty_stats(input, num_ghosts)),
        mean_lo(empty_stats(input, num_ghosts)),
        invstd(empty_stats(input, num_ghosts)) {}
  StatsTensors(const at::Tensor& mean, const at::Tensor& mean_lo, const at::Tensor& invstd)
      : mean(mean.contiguous()), mean_lo(mean_lo.contiguous()), invstd(invstd.contiguous()) {}

  template <typename scalar_t>
  SavedStats<scalar_t> pointers() const {
    using acc_t = AccType<scalar_t>;
    return {data_of<acc_t>(mean), data_of<acc_t>(mean_lo), data_of<acc_t>(invstd)};
  }
};

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
  return operands(tensors.input, num_ghosts, {tensors.input, tensors.residual, tensors.output});
}

template <typename scalar_t>
void reduce(
    const DeviceScope& device,
    const at::Tensor& input,
    std::int64_t num_ghosts,
    const StatsOutputs<scalar_t>& outputs) {
  const Launch launch =
      two_pass_launch(operands(input, num_ghosts, {input}), Pass::kReduce, device.properties());
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
      forward_operands(tensors, saved.mean.size(0)), Pass::kApply, device.properties());
  const ApplyArgs<scalar_t> args{
      launch.tiling,
      forward_elements<scalar_t>(tensors),
      saved.pointers<scalar_t>(),
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
  const std::int64_t num_ghosts = saved.mean.size(0);
  const auto elements = forward_elements<scalar_t>(tensors);
  const Launch launch = plan_on_chip(
      forward_operands(tensors, num_ghosts), /*tensors=*/1, device.properties(),
      [&](const Launch& candidate, int* blocks_per_sm) {
    return ForwardLaunches<scalar_t>::on_chip_occupancy(candidate, elements, blocks_per_sm);
  });
  if (launch.blocks == 0) {
    reduce<scalar_t>(device, tensors.input, num_ghosts, outputs);
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
}  // namespace cuda

Tensor4 batch_norm_cuda(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    const OptionalTensor& residual,
    bool training,
    std::optional<double> momentum,
    double eps,
    OptionalString activation,
    std::optional<std::int64_t> ghost_batch_size) {
  const BatchNormCall call = check_batch_norm(
      input, weight, bias, running_mean, running_var, num_batches_tracked, residual, training,
      momentum, eps, activation, to_symint(ghost_batch_size));
  const cuda::DeviceScope device(input);
  const ForwardTensors tensors = forward_tensors(input, weight, bias, residual, call.activation);
  const cuda::StatsTensors saved(input, call.num_ghosts.expect_int());
  if (input.numel() == 0) {
    // As torch: the running statistics stay, the batch counts.
    saved.mean.zero_();
    saved.mean_lo.zero_();
    saved.invstd.zero_();
    if (training && is_given(num_batches_tracked)) {
      num_batches_tracked->add_(1);
    }
    return {tensors.output, saved.mean, saved.mean_lo, saved.invstd};
  }
  const cuda::RunningStats running = cuda::running_stats(
      running_mean, running_var, num_batches_tracked, momentum, input.scalar_type());
  cuda::dispatch_dtype(input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    if (!training) {
      cuda::apply<scalar_t>(device, tensors, saved, &running, eps);
      return;
    }
    cuda::StatsOutputs<scalar_t> outputs;
    outputs.saved = saved.pointers<scalar_t>();
    outputs.eps = eps;
    outputs.running = running;
    cuda::train<scalar_t>(device, tensors, saved, outputs);
  });
  if (training) {
    for (const OptionalTensor* buffer : {&running_mean, &running_var, &num_batches_tracked}) {
      if (is_given(*buffer)) {
        bump_version(**buffer);
      }
    }
  }
  return {tensors.output, saved.mean, saved.mean_lo, saved.invstd};
}

at::Tensor batch_norm_apply_cuda(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation) {
  const BatchNormCall call =
      check_apply(input, weight, bias, residual, save_mean, save_mean_lo, save_invstd, activation);
  const cuda::DeviceScope device(input);
  const ForwardTensors tensors = forward_tensors(input, weight, bias, residual, call.activation);
  if (input.numel() != 0) {
    const cuda::StatsTensors saved(save_mean, save_mean_lo, save_invstd);
    cuda::dispatch_dtype(input.scalar_type(), [&](auto tag) {
      cuda::apply<decltype(tag)>(device, tensors, saved, nullptr, 0);
    });
  }
  return tensors.output;
}

Tensor3 batch_norm_reduce_cuda(
    const at::Tensor& input, std::optional<std::int64_t> ghost_batch_size) {
  check_input(input);
  const std::int64_t num_ghosts = check_num_ghosts(input, to_symint(ghost_batch_size)).expect_int();
  const cuda::DeviceScope device(input);
  const at::Tensor count = input.new_empty({num_ghosts}, at::kLong);
  const at::Tensor mean = input.new_empty({num_ghosts, input.size(1)}, at::kDouble);
  const at::Tensor m2 = mean.new_empty(mean.sizes());
  if (input.numel() == 0) {
    return {count.zero_(), mean.zero_(), m2.zero_()};
  }
  const at::Tensor dense = to_dense(input, dense_format(input));
  cuda::dispatch_dtype(input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    cuda::StatsOutputs<scalar_t> outputs;
    outputs.count = count.mutable_data_ptr<std::int64_t>();
    outputs.mean = mean.mutable_data_ptr<double>();
    outputs.m2 = m2.mutable_data_ptr<double>();
    outputs.eps = 1;  // of the saved statistics, which nobody asks for
    cuda::reduce<scalar_t>(device, dense, num_ghosts, outputs);
  });
  return {count, mean, m2};
}

}  // namespace bnext
