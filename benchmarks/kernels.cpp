// Calls of bnext's raw ops through the dispatcher in a C++ loop, registered as
// torch.ops.bnext_bench: a call costs 1 us, where one from Python costs 15. (TorchScript would loop
// in C++ too, but unrolls the loop and merges the equal calls in it.)
//
// Each loop keeps a result of C values only, so that the output of a call is freed before the next
// one, which gets the same memory (benchmarks/worker.py).

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Name = std::optional<std::string_view>;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&,
    const Optional&,
    const Optional&,
    const Optional&,
    const Optional&,
    const Optional&,
    const Optional&,
    bool,
    std::optional<double>,
    double,
    Name,
    std::optional<c10::SymInt>);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&,
    const Tensor&,
    const Optional&,
    const Optional&,
    const Optional&,
    const Optional&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    bool,
    Name,
    std::array<bool, 2>);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor forward(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    std::optional<c10::SymInt> ghost,
    double eps,
    std::int64_t times) {
  static const auto op = find<Forward>("bnext::batch_norm");
  const at::AutoDispatchBelowADInplaceOrView kernels_only;
  Tensor save_mean;
  for (std::int64_t i = 0; i < times; ++i) {
    save_mean =
        std::get<1>(op.call(x, weight, bias, {}, {}, {}, {}, true, 0.1, eps, Name("relu"), ghost));
  }
  return save_mean;
}

Tensor backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& mean_lo,
    const Tensor& invstd,
    std::int64_t times) {
  static const auto op = find<Backward>("bnext::batch_norm_backward");
  const at::AutoDispatchBelowADInplaceOrView kernels_only;
  Tensor grad_weight;
  for (std::int64_t i = 0; i < times; ++i) {
    grad_weight = std::get<1>(op.call(
        grad, x, weight, bias, {}, {}, mean, mean_lo, invstd, true, Name("relu"), {true, false}));
  }
  return grad_weight;
}

void copy(const Tensor& x, Tensor y, std::int64_t times) {
  for (std::int64_t i = 0; i < times; ++i) {
    y.copy_(x);
  }
}

}  // namespace

TORCH_LIBRARY(bnext_bench, library) {
  library.def(
      "forward(Tensor x, Tensor weight, Tensor bias, SymInt? ghost, float eps, int times) -> "
      "Tensor",
      &forward);
  library.def(
      "backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor mean_lo, "
      "Tensor invstd, int times) -> Tensor",
      &backward);
  library.def("copy(Tensor x, Tensor(a!) y, int times) -> ()", &copy);
}
