#include "tensors.h"

namespace bnext {

at::Tensor empty_acc(const at::Tensor& input, at::IntArrayRef sizes) {
  const at::ScalarType dtype = acc_type(input.scalar_type());
  return input.is_cpu() ? empty_cpu(sizes, dtype) : input.new_empty(sizes, dtype);
}

void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) {
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

ForwardTensors forward_tensors(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    Activation activation) {
  const DenseFormat format = dense_format(input);
  return {
      to_dense(input, format),
      to_dense(residual, format),
      empty_dense(input, format),
      weight,
      bias,
      activation};
}

BackwardTensors backward_tensors(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    Activation activation,
    std::array<bool, 2> output_mask) {
  const DenseFormat format = dense_format(input);
  BackwardTensors t;
  t.grad_output = to_dense(grad_output, format);
  t.input = to_dense(input, format);
  t.extra = to_dense(is_given(output) ? output : residual, format);
  t.weight = weight;
  t.bias = bias;
  t.save_mean = save_mean.contiguous();
  t.save_mean_lo = save_mean_lo.contiguous();
  t.save_invstd = save_invstd.contiguous();
  t.activation = activation;
  t.derivative = is_given(output)     ? Derivative::kFromOutput
                 : is_given(residual) ? Derivative::kFromResidual
                                      : Derivative::kFromInput;
  t.grad_input = output_mask[0] ? empty_dense(input, format) : at::Tensor();
  t.grad_residual = output_mask[1] ? empty_dense(input, format) : at::Tensor();
  return t;
}

at::Tensor or_empty(const at::Tensor& grad, const at::Tensor& input) {
  if (grad.defined()) {
    return grad;
  }
  return input.is_cpu() ? empty_cpu({0}, input.scalar_type()) : input.new_empty({0});
}

}  // namespace bnext
