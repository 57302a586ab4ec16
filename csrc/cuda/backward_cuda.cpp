// Backward on CUDA: all of it, and grad_reduce and grad_apply on their own.
#include <ATen/ops/empty_like.h>

#include "backend_cuda.h"
#include "tensors_cuda.h"

namespace bnext::cuda {
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
  elements.mean = const_data_of<acc_t>(t.saved.mean);
  elements.mean_lo = const_data_of<acc_t>(t.saved.mean_lo);
  elements.invstd = const_data_of<acc_t>(t.saved.invstd);
  elements.activation = t.activation;
  elements.derivative = t.derivative;
  elements.frozen = frozen;
  return elements;
}

Operands backward_operands(const BackwardTensors& t) {
  return operands(
      t.layout, t.saved.num_ghosts(),
      {t.grad_output, t.input, t.extra, t.grad_input, t.grad_residual});
}

template <typename scalar_t>
void grad_reduce(
    const DeviceScope& device,
    const BackwardTensors& tensors,
    const BackwardElements<scalar_t>& elements,
    const GradOutputs<scalar_t>& outputs) {
  const Operands reads = operands(
      tensors.layout, tensors.saved.num_ghosts(),
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
  const bool applies = tensors.applies();
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
        needs_coefficients ? at::empty_like(tensors.saved.mean) : at::Tensor();
    const at::Tensor coef_0 =
        needs_coefficients ? at::empty_like(tensors.saved.mean) : at::Tensor();
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

void CudaBackend::backward(
    const BackwardTensors& tensors,
    bool frozen,
    const at::Tensor& grad_weight,
    const at::Tensor& grad_bias) const {
  const DeviceScope device(tensors.input);
  dispatch_dtype(tensors.input.scalar_type(), [&](auto tag) {
    cuda::backward<decltype(tag)>(device, tensors, frozen, grad_weight, grad_bias);
  });
}

void CudaBackend::grad_reduce(const BackwardTensors& tensors, const GradSumTensors& sums) const {
  const DeviceScope device(tensors.input);
  dispatch_dtype(tensors.input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    GradOutputs<scalar_t> outputs;
    outputs.sum_dy = sums.sum_dy.mutable_data_ptr<double>();
    outputs.sum_dy_xmu = sums.sum_dy_xmu.mutable_data_ptr<double>();
    cuda::grad_reduce<scalar_t>(
        device, tensors, backward_elements<scalar_t>(tensors, /*frozen=*/false), outputs);
  });
}

void CudaBackend::grad_apply(
    const BackwardTensors& tensors, const std::optional<GradSumTensors>& sums) const {
  const DeviceScope device(tensors.input);
  const at::ScalarType dtype = tensors.input.scalar_type();
  dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = AccType<scalar_t>;
    at::Tensor coef_x, coef_0;
    if (sums.has_value()) {
      coef_x = at::empty_like(tensors.saved.mean);
      coef_0 = at::empty_like(tensors.saved.mean);
      const GradFoldArgs<scalar_t> args{
          sums->count.const_data_ptr<std::int64_t>(),
          sums->sum_dy.const_data_ptr<double>(),
          sums->sum_dy_xmu.const_data_ptr<double>(),
          const_data_of<acc_t>(tensors.saved.mean_lo),
          const_data_of<acc_t>(tensors.saved.invstd),
          channel_array(tensors.weight, dtype),
          data_of<acc_t>(coef_x),
          data_of<acc_t>(coef_0),
          tensors.saved.num_ghosts(),
          tensors.layout.n_channel};
      check_launch(FoldLaunches<scalar_t>::grad_fold(args, device.stream()), "grad_fold");
    }
    cuda::grad_apply<scalar_t>(
        device, tensors, backward_elements<scalar_t>(tensors, !sums.has_value()), coef_x, coef_0);
  });
}

}  // namespace bnext::cuda
