// The kernels of backward on small problems, compared with sums in double.
#include <cuda/launch_backward.cuh>

#include "problems.h"

namespace kernel_checks {
namespace {

template <typename scalar_t>
struct Launches : BackwardLaunches<scalar_t> {};

#ifdef BNEXT_FEW_KERNELS
template <>
struct Launches<float> {
  static cudaError_t reduce(
      const Launch& launch, const GradReduceArgs<float>& args, cudaStream_t s) {
    return start(
        launch.rows ? &grad_reduce_kernel<float, true, 4, int, Fusion::kAny>
                    : &grad_reduce_kernel<float, false, 4, int, Fusion::kAny>,
        args, launch, s);
  }
  static cudaError_t apply(const Launch& launch, const GradApplyArgs<float>& args, cudaStream_t s) {
    return start(
        launch.rows ? &grad_apply_kernel<float, true, 4, int, Fusion::kAny>
                    : &grad_apply_kernel<float, false, 4, int, Fusion::kAny>,
        args, launch, s);
  }
  static cudaError_t on_chip(
      const Launch& launch, const BackwardOnChipArgs<float>& args, cudaStream_t s) {
    return start(
        launch.rows ? &backward_on_chip_kernel<float, true, 4, Fusion::kAny>
                    : &backward_on_chip_kernel<float, false, 4, Fusion::kAny>,
        args, launch, s);
  }
};
#endif

struct Wanted {
  std::vector<double> mean, invstd, output, sum_dy, sum_dy_xmu, size_of_sums;
  std::vector<double> grad_input, grad_residual, grad_weight, grad_bias;

  // Clears grad_output where an activation is not smooth and z close to zero.
  Wanted(const Problem& p, Data& data)
      : output(p.numel()),
        grad_input(p.numel()),
        grad_residual(p.numel()),
        grad_weight(p.channels),
        grad_bias(p.channels) {
    const bool smooth = p.activation == Activation::kNone || p.activation == Activation::kSilu;
    for (std::int64_t g = 0; g < p.ghosts; ++g) {
      for (std::int64_t c = 0; c < p.channels; ++c) {
        const Moments m = moments(p, data.input, g, c);
        const double invstd_c = 1 / std::sqrt(m.variance + kEps),
                     scale = invstd_c * data.weight_of(p, c);
        double a = 0, b = 0;
        p.for_values(g, c, [&](std::int64_t i) {
          const double xmu = data.input[i] - m.mean;
          const double z = xmu * scale + data.bias_of(p, c) + (p.residual ? data.residual[i] : 0);
          if (!smooth && std::abs(z) < 1e-2) {
            data.grad_output[i] = 0;
          }
          dispatch_activation(p.activation, [&](auto f) {
            output[i] = f.forward(z);
            grad_residual[i] = f.backward(data.grad_output[i], z);
          });
          a += grad_residual[i];
          b += grad_residual[i] * xmu;
        });
        p.for_values(g, c, [&](std::int64_t i) {
          const double xmu = data.input[i] - m.mean;
          grad_input[i] = scale * grad_residual[i];
          if (!p.constant) {
            grad_input[i] -= scale * (a + xmu * invstd_c * invstd_c * b) / m.count;
          }
        });
        mean.push_back(m.mean);
        invstd.push_back(invstd_c);
        sum_dy.push_back(a);
        sum_dy_xmu.push_back(b);
        grad_bias[c] += a;
        grad_weight[c] += b * invstd_c;
      }
    }
  }
};

template <typename scalar_t>
Bits backward(const Problem& p) {
  using acc_t = AccType<scalar_t>;
  Data data = Data::make<scalar_t>(p);
  const Wanted wanted(p, data);
  Buffer<scalar_t> input(data.input, p.offset), grad_output(data.grad_output, p.offset),
      extra(p.from_output ? wanted.output : data.residual, p.offset),
      grad_input(p.numel(), p.offset), grad_residual(p.numel(), p.offset);
  Buffer<float> weight(data.weight), bias(data.bias);
  const std::int64_t stats = p.ghosts * p.channels;
  Buffer<acc_t> mean(wanted.mean), mean_lo(stats), invstd(wanted.invstd), coef_x(stats),
      coef_0(stats), grad_weight(p.channels), grad_bias(p.channels);
  for (std::int64_t i = 0; i < stats; ++i) {
    mean_lo.data()[i] = static_cast<acc_t>(wanted.mean[i] - mean[i]);
  }
  Buffer<double> sum_dy(stats), sum_dy_xmu(stats);

  BackwardElements<scalar_t> elements{};
  elements.grad_output = grad_output.data();
  elements.input = input.data();
  elements.extra = p.residual ? extra.data() : nullptr;
  elements.grad_input = grad_input.data();
  elements.grad_residual = p.residual ? grad_residual.data() : nullptr;
  if (p.affine) {
    elements.weight.data = weight.data();
    elements.bias.data = bias.data();
  }
  elements.mean = mean.data();
  elements.mean_lo = mean_lo.data();
  elements.invstd = invstd.data();
  elements.activation = p.activation;
  elements.derivative = p.from_output ? Derivative::kFromOutput
                        : p.residual  ? Derivative::kFromResidual
                                      : Derivative::kFromInput;
  elements.frozen = p.constant;
  GradOutputs<scalar_t> outputs{};
  outputs.grad_weight = grad_weight.data();
  outputs.grad_bias = grad_bias.data();
  if (!p.on_chip()) {
    outputs.sum_dy = sum_dy.data();
    outputs.sum_dy_xmu = sum_dy_xmu.data();
    outputs.coef_x = coef_x.data();
    outputs.coef_0 = coef_0.data();
  }
  const int tensors = p.residual ? 3 : 2;
  const Launch launch = plan<scalar_t>(p, tensors, Pass::kReduce);
  const Launch second = p.on_chip() ? launch : plan<scalar_t>(p, tensors, Pass::kApply);
  Memory<SumSets> memory(launch, p.on_chip(), true);

  Bits bits[2];
  for (Bits& each : bits) {
    grad_input.clear();
    grad_residual.clear();
    grad_weight.clear();
    if (p.on_chip()) {
      const Teams teams{
          launch.tile_teams, launch.ghost_teams, launch.cache_elements, memory.barriers};
      check_launch(
          Launches<scalar_t>::on_chip(
              launch, {launch.tiling, teams, elements, outputs, memory.workspace}, nullptr));
    } else {
      check_launch(
          Launches<scalar_t>::reduce(
              launch, {launch.tiling, elements, outputs, memory.workspace}, nullptr));
      check_launch(
          Launches<scalar_t>::apply(
              second,
              {second.tiling, elements, p.constant ? nullptr : coef_x.data(),
               p.constant ? nullptr : coef_0.data()},
              nullptr));
      compare("sum_dy", sum_dy, wanted.sum_dy, 2e-6);
      compare("sum_dy_xmu", sum_dy_xmu, wanted.sum_dy_xmu, 2e-5);
    }
    const double tolerance = sizeof(scalar_t) < 4 ? 2e-3 : 1e-5;
    compare("grad_input", grad_input, wanted.grad_input, tolerance);
    if (p.residual) {
      compare("grad_residual", grad_residual, wanted.grad_residual, tolerance);
    }
    compare("grad_bias", grad_bias, wanted.grad_bias, 2e-6);
    compare("grad_weight", grad_weight, wanted.grad_weight, 2e-5);
    memory.check_counters();
    grad_input.append_to(each);
    grad_residual.append_to(each);
    grad_weight.append_to(each);
    grad_bias.append_to(each);
  }
  require(bits[0] == bits[1], "bits: others in a second launch");
  return bits[0];
}

std::vector<Case> cases() {
  return cases_of(&backward<float>, &backward<__half>, {});
}

}  // namespace
}  // namespace kernel_checks

int main(int count, char** arguments) {
  return kernel_checks::run_cases(kernel_checks::cases(), count, arguments);
}
