// The kernels of forward on small problems, compared with sums in double.
#include <cuda/launch_forward.cuh>

#include "problems.h"

namespace kernel_checks {
namespace {

// BNEXT_FEW_KERNELS: one instance of each kernel and layout, to compile in a few seconds.
template <typename scalar_t>
struct Launches : ForwardLaunches<scalar_t> {};

#ifdef BNEXT_FEW_KERNELS
template <>
struct Launches<float> {
  static cudaError_t reduce(const Launch& launch, const ReduceArgs<float>& args, cudaStream_t s) {
    return start(
        launch.rows ? &reduce_kernel<float, true, 4, int> : &reduce_kernel<float, false, 4, int>,
        args, launch, s);
  }
  static cudaError_t apply(const Launch& launch, const ApplyArgs<float>& args, cudaStream_t s) {
    return start(
        launch.rows ? &apply_kernel<float, true, 4, int, Fusion::kAny>
                    : &apply_kernel<float, false, 4, int, Fusion::kAny>,
        args, launch, s);
  }
  static cudaError_t on_chip(
      const Launch& launch, const ForwardOnChipArgs<float>& args, cudaStream_t s) {
    return start(
        launch.rows ? &forward_on_chip_kernel<float, true, 4, Fusion::kAny>
                    : &forward_on_chip_kernel<float, false, 4, Fusion::kAny>,
        args, launch, s);
  }
};
#endif

template <typename scalar_t>
struct Wanted {
  std::vector<double> output, mean, m2, invstd, running_mean, running_var;

  Wanted(const Problem& p, const Data& data)
      : output(p.numel()), running_mean(data.running_mean), running_var(data.running_var) {
    for (std::int64_t g = 0; g < p.ghosts; ++g) {
      for (std::int64_t c = 0; c < p.channels; ++c) {
        Moments m = moments(p, data.input, g, c);
        if (p.constant) {
          m = {data.running_mean[c], data.running_var[c], m.count};
        }
        mean.push_back(m.mean);
        m2.push_back(m.variance * m.count);
        invstd.push_back(1 / std::sqrt(m.variance + kEps));
        p.for_values(g, c, [&](std::int64_t i) {
          double z = (data.input[i] - m.mean) * invstd.back() * data.weight_of(p, c) +
                     data.bias_of(p, c) + (p.residual ? data.residual[i] : 0);
          dispatch_activation(p.activation, [&](auto f) { z = f.forward(z); });
          output[i] = z;
        });
      }
    }
    const double factor = p.cumulative ? 1.0 / 4 : 0.1;
    for (std::int64_t c = 0; c < p.channels && !p.constant; ++c) {
      const Moments m = moments(p, data.input, -1, c);
      const double unbiased = m.variance * m.count / (m.count - 1);
      running_mean[c] += factor * (m.mean - running_mean[c]);
      running_var[c] += factor * (unbiased - running_var[c]);
      if (p.infinite && c == 0) {
        running_mean[c] = INFINITY;
      }
    }
  }
};

template <typename scalar_t>
Bits forward(const Problem& p) {
  using acc_t = AccType<scalar_t>;
  const Data data = Data::make<scalar_t>(p);
  const Wanted<scalar_t> wanted(p, data);
  Buffer<scalar_t> input(data.input, p.offset), residual(data.residual, p.offset),
      output(p.numel(), p.offset);
  Buffer<float> weight(data.weight), bias(data.bias), running_mean(data.running_mean),
      running_var(data.running_var);
  const std::int64_t stats = p.ghosts * p.channels;
  Buffer<acc_t> mean(stats), mean_lo(stats), invstd(stats);
  Buffer<double> wide_mean(stats), m2(stats);
  Buffer<std::int64_t> count(p.ghosts), num_batches(1);

  ForwardElements<scalar_t> elements{};
  elements.input = input.data();
  elements.residual = p.residual ? residual.data() : nullptr;
  elements.output = output.data();
  if (p.affine) {
    elements.weight.data = weight.data();
    elements.bias.data = bias.data();
  }
  elements.activation = p.activation;
  const SavedStats<scalar_t> saved{mean.data(), mean_lo.data(), invstd.data()};
  StatsOutputs<scalar_t> outputs{};
  if (!p.on_chip()) {
    outputs.count = count.data();
    outputs.mean = wide_mean.data();
    outputs.m2 = m2.data();
  }
  outputs.saved = saved;
  outputs.eps = kEps;
  outputs.running = {
      {running_mean.data()}, {running_var.data()}, num_batches.data(), 0.1, p.cumulative};
  const Launch launch = plan<scalar_t>(p, 1, Pass::kReduce);
  const Launch second = p.on_chip() ? launch : plan<scalar_t>(p, 1, Pass::kApply);
  Memory<TripleSets> memory(launch, p.on_chip(), true);

  Bits bits[2];
  for (Bits& each : bits) {
    output.clear();
    running_mean.set(data.running_mean);
    running_var.set(data.running_var);
    num_batches.set(std::vector<int>{3});
    if (p.on_chip()) {
      const Teams teams{
          launch.tile_teams, launch.ghost_teams, launch.cache_elements, memory.barriers};
      check_launch(
          Launches<scalar_t>::on_chip(
              launch, {launch.tiling, teams, elements, outputs, memory.workspace}, nullptr));
    } else {
      if (!p.constant) {
        check_launch(
            Launches<scalar_t>::reduce(
                launch, {launch.tiling, elements.input, outputs, memory.workspace}, nullptr));
      }
      check_launch(
          Launches<scalar_t>::apply(
              second, {second.tiling, elements, saved, p.constant, kEps, outputs.running},
              nullptr));
    }
    // Float sums of a few values; the output in units of its type.
    compare("output", output, wanted.output, sizeof(scalar_t) < 4 ? 1e-3 : 1e-5);
    std::vector<double> found_mean;
    for (std::int64_t i = 0; i < stats; ++i) {
      found_mean.push_back(mean[i] + mean_lo[i]);
    }
    compare("saved mean", found_mean, wanted.mean, 2e-6, Error::kAbsolute);
    compare("saved invstd", invstd, wanted.invstd, 2e-6);
    compare("running mean", running_mean, wanted.running_mean, 1e-6);
    compare("running var", running_var, wanted.running_var, 2e-6);
    compare("num batches", num_batches, {p.constant ? 3.0 : 4.0}, 0);
    if (!p.on_chip() && !p.constant) {
      compare("mean", wide_mean, wanted.mean, 2e-6, Error::kAbsolute);
      compare("m2", m2, wanted.m2, 2e-6);
      for (std::int64_t g = 0; g < p.ghosts; ++g) {
        require(count[g] == p.count(g), "wrong: count");
      }
    }
    memory.check_counters();
    output.append_to(each);
    for (auto* values : {&mean, &mean_lo, &invstd, &running_mean, &running_var}) {
      values->append_to(each);
    }
  }
  require(bits[0] == bits[1], "bits: others in a second launch");
  return bits[0];
}

std::vector<Case> cases() {
  std::vector<Problem> more{
      {.name = "infinite",
       .order = kPlanes,
       .batch = 6,
       .channels = 2,
       .spatial = 49,
       .ghosts = 2,
       .splits = 3,
       .infinite = true},
      {.name = "team_infinite",
       .order = kPlanes,
       .batch = 6,
       .channels = 2,
       .spatial = 49,
       .ghosts = 2,
       .splits = 3,
       .tile_teams = 1,
       .infinite = true},
#ifndef BNEXT_FEW_KERNELS
      // Many groups a thread, so that blocks of them are closed.
      {.name = "rows_long",
       .order = kRows,
       .batch = 2600,
       .channels = 16,
       .spatial = 1,
       .ghosts = 1},
      {.name = "planes_long",
       .order = kPlanes,
       .batch = 1,
       .channels = 1,
       .spatial = 40003,
       .ghosts = 1},
#endif
  };
  return cases_of(&forward<float>, &forward<__half>, more);
}

}  // namespace
}  // namespace kernel_checks

int main(int count, char** arguments) {
  return kernel_checks::run_cases(kernel_checks::cases(), count, arguments);
}
