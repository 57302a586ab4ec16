// Backward on CUDA: the fused op, and grad_reduce and grad_apply on their own.
#include "../ops.h"
#include "tensors_cuda.h"

namespace bnext {
namespace cuda {
namespace {

template <typename scalar_t>
BackwardElements<scalar_t> backward_elements(const BackwardTensors& t, bool frozen) {
  using acc_t = AccType<scalar_t>;
  const at::ScalarType dtype = t.input.scalar_type();
  BackwardElements<scalar_t> elements;
  elements.grad_output = const_data_of<scalar_t>(t.grad_output);
  elements.input = const_data_of<scalar_t>(t.input);
  elements.extra = const_data_of<scalar_t>(t.extra);
  elements.grad_input = data_of<scalar_t>(t.grad_input);
  elements.grad_residual = data_of<scalar_t>(t.grad_residual);
  elements.weight = channel_array(t.weight, dtype);
  elements.bias = channel_array(t.bias, dtype);
  elements.mean = const_data_of<acc_t>(t.save_mean);
  elements.mean_lo = const_data_of<acc_t>(t.save_mean_lo);
  elements.invstd = const_data_of<acc_t>(t.save_invstd);
  elements.activation = t.activation;
  elements.derivative = t.derivative;
  elements.frozen = frozen;
  return elements;
}

Operands backward_operands(const BackwardTensors& t) {
  return operands(
      t.input, t.save_mean.size(0),
      {t.grad_output, t.input, t.extra, t.grad_input, t.grad_residual});
}

template <typename scalar_t>
void grad_reduce(
    const DeviceScope& device,
    const BackwardTensors& tensors,
    const BackwardElements<scalar_t>& elements,
    const GradOutputs<scalar_t>& outputs) {
  const Operands reads = operands(
      tensors.input, tensors.save_mean.size(0),
      {tensors.grad_output, tensors.input, tensors.extra});
  const Launch launch = two_pass_launch(reads, Pass::kReduce, device.properties());
  const LaunchMemory<SumSets> memory(
      device, tensors.input, launch, /*on_chip=*/false, outputs.grad_weight != nullptr);
  const GradReduceArgs<scalar_t> args{launch.tiling, elements, outputs, memory.workspace};
  check_launch(BackwardLaunches<scalar_t>::reduce(launch, args, device.stream()), "grad_reduce");
}

// The coefficients are (num_ghosts, C), undefined for frozen statistics.
template <typename scalar_t>
void grad_apply(
    const DeviceScope& device,
    const BackwardTensors& tensors,
    const BackwardElements<scalar_t>& elements,
    const at::Tensor& coef_x,
    const at::Tensor& coef_0) {
  using acc_t = AccType<scalar_t>;
  const Launch launch =
      two_pass_launch(backward_operands(tensors), Pass::kApply, device.properties());
  const GradApplyArgs<scalar_t> args{
      launch.tiling, elements, const_data_of<acc_t>(coef_x), const_data_of<acc_t>(coef_0)};
  check_launch(BackwardLaunches<scalar_t>::apply(launch, args, device.stream()), "grad_apply");
}

template <typename scalar_t>
void backward(
    const DeviceScope& device,
    const BackwardTensors& tensors,
    bool frozen,
    const at::Tensor& grad_weight,
    const at::Tensor& grad_bias) {
  using acc_t = AccType<scalar_t>;
  const auto elements = backward_elements<scalar_t>(tensors, frozen);
  GradOutputs<scalar_t> outputs;
  outputs.grad_weight = data_of<acc_t>(grad_weight);
  outputs.grad_bias = data_of<acc_t>(grad_bias);
  const bool applies = tensors.grad_input.defined() || tensors.grad_residual.defined();
  Launch launch{};
  if (applies) {
    launch = plan_on_chip(
        backward_operands(tensors), tensors.extra.defined() ? 3 : 2, device.properties(),
        [&](const Launch& candidate, int* blocks_per_sm) {
      return BackwardLaunches<scalar_t>::on_chip_occupancy(candidate, elements, blocks_per_sm);
    });
  }
  if (launch.blocks == 0) {
    const bool needs_coefficients = applies && !frozen;
    const at::Tensor coef_x =
        needs_coefficients ? tensors.save_mean.new_empty(tensors.save_mean.sizes()) : at::Tensor();
    const at::Tensor coef_0 =
        needs_coefficients ? tensors.save_mean.new_empty(tensors.save_mean.sizes()) : at::Tensor();
    outputs.coef_x = data_of<acc_t>(coef_x);
    outputs.coef_0 = data_of<acc_t>(coef_0);
    grad_reduce<scalar_t>(device, tensors, elements, outputs);
    if (applies) {
      grad_apply<scalar_t>(device, tensors, elements, coef_x, coef_0);
    }
    return;
  }
  const LaunchMemory<SumSets> memory(
      device, tensors.input, launch, /*on_chip=*/true, /*merges_ghosts=*/true);
  const BackwardOnChipArgs<scalar_t> args{
      launch.tiling,
      {launch.tile_teams, launch.ghost_teams, launch.cache_elements, memory.barriers},
      elements,
      outputs,
      memory.workspace};
  check_launch(BackwardLaunches<scalar_t>::on_chip(launch, args, device.stream()), "backward");
}

}  // namespace
}  // namespace cuda

Tensor4 batch_norm_backward_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    bool training,
    OptionalString activation,
    std::array<bool, 2> output_mask) {
  const BatchNormCall call = check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  const cuda::DeviceScope device(input);
  const BackwardTensors tensors = backward_tensors(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      call.activation, output_mask);
  const at::Tensor grad_weight = empty_acc(input, {input.size(1)});
  const at::Tensor grad_bias = empty_acc(input, {input.size(1)});
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
  } else {
    cuda::dispatch_dtype(input.scalar_type(), [&](auto tag) {
      cuda::backward<decltype(tag)>(device, tensors, !training, grad_weight, grad_bias);
    });
  }
  return {
      or_empty(tensors.grad_input, input), grad_weight, grad_bias,
      or_empty(tensors.grad_residual, input)};
}

Tensor2 batch_norm_grad_reduce_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation) {
  const BatchNormCall call = check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  const cuda::DeviceScope device(input);
  const at::Tensor sum_dy = save_mean.new_empty(save_mean.sizes(), at::kDouble);
  const at::Tensor sum_dy_xmu = sum_dy.new_empty(sum_dy.sizes());
  if (input.numel() == 0) {
    return {sum_dy.zero_(), sum_dy_xmu.zero_()};
  }
  const BackwardTensors tensors = backward_tensors(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      call.activation, {false, false});
  cuda::dispatch_dtype(input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    cuda::GradOutputs<scalar_t> outputs;
    outputs.sum_dy = sum_dy.mutable_data_ptr<double>();
    outputs.sum_dy_xmu = sum_dy_xmu.mutable_data_ptr<double>();
    cuda::grad_reduce<scalar_t>(
        device, tensors, cuda::backward_elements<scalar_t>(tensors, /*frozen=*/false), outputs);
  });
  return {sum_dy, sum_dy_xmu};
}

Tensor2 batch_norm_grad_apply_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    const OptionalTensor& count,
    const OptionalTensor& sum_dy,
    const OptionalTensor& sum_dy_xmu,
    OptionalString activation,
    std::array<bool, 2> output_mask) {
  const BatchNormCall call = check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  check_grad_sums(input, call.num_ghosts, count, sum_dy, sum_dy_xmu);
  const cuda::DeviceScope device(input);
  const BackwardTensors tensors = backward_tensors(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      call.activation, output_mask);
  if (input.numel() != 0 && (output_mask[0] || output_mask[1])) {
    const bool frozen = !is_given(count);
    cuda::dispatch_dtype(input.scalar_type(), [&](auto tag) {
      using scalar_t = decltype(tag);
      using acc_t = AccType<scalar_t>;
      at::Tensor coef_x, coef_0;
      if (!frozen) {
        const at::Tensor counts = count->contiguous();
        const at::Tensor dy = sum_dy->contiguous();
        const at::Tensor dy_xmu = sum_dy_xmu->contiguous();
        coef_x = tensors.save_mean.new_empty(tensors.save_mean.sizes());
        coef_0 = tensors.save_mean.new_empty(tensors.save_mean.sizes());
        const cuda::GradFoldArgs<scalar_t> args{
            counts.const_data_ptr<std::int64_t>(),
            dy.const_data_ptr<double>(),
            dy_xmu.const_data_ptr<double>(),
            cuda::const_data_of<acc_t>(tensors.save_mean_lo),
            cuda::const_data_of<acc_t>(tensors.save_invstd),
            cuda::channel_array(weight, input.scalar_type()),
            cuda::data_of<acc_t>(coef_x),
            cuda::data_of<acc_t>(coef_0),
            save_mean.size(0),
            input.size(1)};
        cuda::check_launch(
            cuda::FoldLaunches<scalar_t>::grad_fold(args, device.stream()), "grad_fold");
      }
      cuda::grad_apply<scalar_t>(
          device, tensors, cuda::backward_elements<scalar_t>(tensors, frozen), coef_x, coef_0);
    });
  }
  return {or_empty(tensors.grad_input, input), or_empty(tensors.grad_residual, input)};
}

}  // namespace bnext
