// The schemas of torch.ops.bnext, their kernels, and the refusal to differentiate what has no
// derivative. docs/ops.md documents each op; bnext/autograd.py differentiates batch_norm.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/ops.h"

namespace bnext {
namespace {

bool is_differentiated(const c10::IValue& value) {
  if (!value.isTensor() || !value.toTensor().defined()) {
    return false;
  }
  const at::Tensor& tensor = value.toTensor();
  return (at::GradMode::is_enabled() && tensor.requires_grad()) ||
         tensor._fw_grad(/*level=*/0).defined();
}

// An op without an autograd kernel would drop the gradient with no more than a warning.
void refuse_to_differentiate(
    const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    TORCH_CHECK(
        !is_differentiated(value), op.operator_name(),
        " is not differentiable, and one of its arguments requires grad or carries a "
        "tangent: call bnext.batch_norm, or detach the arguments");
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.callBoxed(stack);
}

// Whatever has no backend: a sparse tensor, or a device this build has no kernels for.
void refuse_backend(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (!values[i].isTensor() || !values[i].toTensor().defined()) {
      continue;
    }
    const at::Tensor& tensor = values[i].toTensor();
    TORCH_CHECK(
        tensor.layout() == at::kStrided, arguments[i].name(),
        " must be a dense (strided) tensor, got layout ", tensor.layout());
    TORCH_CHECK(
        tensor.device().is_cpu() || tensor.device().is_meta(), arguments[i].name(),
        " is on device ", tensor.device(),
        ", for which this build of bnext has no kernels: "
        "see bnext.show_config()");
  }
  TORCH_CHECK(false, op.operator_name(), " has no kernel for these arguments");
}

}  // namespace

TORCH_LIBRARY(bnext, m) {
  // The ops take every dense layout, and their meta kernels tell the outputs'. Without the tag
  // inductor copies into the layout that was traced, and out of it again.
  const std::vector<at::Tag> tags{at::Tag::flexible_layout, at::Tag::pt2_compliant_tag};
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, bool training, "
      "float? momentum, float eps, str? activation, SymInt? ghost_batch_size) "
      "-> (Tensor output, Tensor save_mean, Tensor save_mean_lo, Tensor save_invstd)",
      tags);
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? output, Tensor? residual, Tensor save_mean, Tensor save_mean_lo, "
      "Tensor save_invstd, bool training, str? activation, bool[2] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      tags);
  m.def(
      "batch_norm_reduce(Tensor input, SymInt? ghost_batch_size=None) "
      "-> (Tensor count, Tensor mean, Tensor m2)",
      tags);
  m.def(
      "batch_norm_merge(Tensor count, Tensor mean, Tensor m2) "
      "-> (Tensor count, Tensor mean, Tensor m2)",
      tags);
  m.def(
      "batch_norm_fold(Tensor count, Tensor mean, Tensor m2, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "ScalarType dtype) -> (Tensor save_mean, Tensor save_mean_lo, Tensor save_invstd)",
      tags);
  m.def(
      "batch_norm_apply(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor save_mean, Tensor save_mean_lo, Tensor save_invstd, str? activation) -> Tensor",
      tags);
  m.def(
      "batch_norm_grad_reduce(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? output, Tensor? residual, Tensor save_mean, Tensor save_mean_lo, "
      "Tensor save_invstd, str? activation) -> (Tensor sum_dy, Tensor sum_dy_xmu)",
      tags);
  m.def(
      "batch_norm_grad_apply(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? output, Tensor? residual, Tensor save_mean, Tensor save_mean_lo, "
      "Tensor save_invstd, Tensor? count, Tensor? sum_dy, Tensor? sum_dy_xmu, str? activation, "
      "bool[2] output_mask) -> (Tensor grad_input, Tensor grad_residual)",
      tags);
  m.def("cpu_isa() -> str", &cpu_isa);
  m.def("cpu_isas() -> str[]", &cpu_isas);
#ifdef BNEXT_WITH_CUDA
  m.def("cuda_plan(Tensor input, int? ghost_batch_size=None, int tensors=1) -> str");
  m.def(
      "limit_cuda_device(int num_sms, int shared_per_sm, int shared_per_block, "
      "int narrow_elements) -> ()",
      &limit_cuda_device);
#endif
}

TORCH_LIBRARY_IMPL(bnext, CPU, m) {
  implement<cpu_backend>(m);
}

TORCH_LIBRARY_IMPL(bnext, Meta, m) {
  implement<no_backend>(m);
}

#ifdef BNEXT_WITH_CUDA
TORCH_LIBRARY_IMPL(bnext, CUDA, m) {
  implement<cuda_backend>(m);
  m.impl("cuda_plan", &cuda_plan);
}
#endif

TORCH_LIBRARY_IMPL(bnext, CompositeExplicitAutograd, m) {
  for (const char* op : kOps) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_backend>());
  }
}

TORCH_LIBRARY_IMPL(bnext, Autograd, m) {
  for (const char* op : kOps) {
    if (std::string_view(op) != "batch_norm") {
      m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_to_differentiate>());
    }
  }
}

}  // namespace bnext
