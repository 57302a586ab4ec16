// The kernels between reduce and apply, compared with sums in double.
#include <cuda/fold.cu>

#include "checks.h"

namespace kernel_checks {
namespace {

// Every ghost is a set; more channels than a block has threads, so that there are two blocks.
Bits fold(const Problem& p) {
  const Data data = Data::make<float>(p);
  std::vector<double> counts, means, m2s, invstds, sums, scales, coef_x, coef_0;
  for (std::int64_t g = 0; g < p.ghosts; ++g) {
    counts.push_back(p.count(g));
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const Moments m = moments(p, data.input, g, c);
      means.push_back(m.mean);
      m2s.push_back(m.variance * m.count);
      invstds.push_back(1 / std::sqrt(m.variance + kEps));
      sums.push_back(data.grad_output[p.at(g, c, 0)]);
      const double scale = invstds.back() * data.weight_of(p, c);
      coef_x.push_back(-scale * invstds.back() * invstds.back() * (sums.back() + 1) / m.count);
      coef_0.push_back(-scale * sums.back() / m.count);
    }
  }
  Buffer<std::int64_t> count(counts), merged_count(1), num_batches(1);
  Buffer<double> mean(means), m2(m2s), merged_mean(p.channels), merged_m2(p.channels), sum_dy(sums),
      sum_dy_xmu(sums);
  const std::int64_t stats = p.ghosts * p.channels;
  Buffer<float> saved_mean(stats), saved_mean_lo(stats), saved_invstd(stats),
      running_mean(data.running_mean), running_var(data.running_var), weight(data.weight),
      no_mean_lo(stats), invstd(invstds), found_x(stats), found_0(stats);
  no_mean_lo.clear(0);
  for (std::int64_t i = 0; i < stats; ++i) {
    sum_dy_xmu.data()[i] += 1;
  }
  Buffer<unsigned> blocks_done(1);
  blocks_done.clear(0);

  const MergeArgs sets{count.data(),       mean.data(),      m2.data(), merged_count.data(),
                       merged_mean.data(), merged_m2.data(), p.ghosts,  p.channels};
  check_launch(launch_merge(sets, nullptr));
  FoldArgs<float> args{};
  args.sets = sets;
  args.saved = {saved_mean.data(), saved_mean_lo.data(), saved_invstd.data()};
  args.eps = kEps;
  args.running = {
      {running_mean.data()}, {running_var.data()}, num_batches.data(), 0.1, p.cumulative};
  args.blocks_done = blocks_done.data();
  std::vector<double> wanted_mean, wanted_m2, wanted_running_mean, wanted_running_var;
  const double factor = p.cumulative ? 0.25 : 0.1;
  for (std::int64_t c = 0; c < p.channels; ++c) {
    const Moments m = moments(p, data.input, -1, c);
    wanted_mean.push_back(m.mean);
    wanted_m2.push_back(m.variance * m.count);
    const double before = data.running_mean[c], var_before = data.running_var[c];
    wanted_running_mean.push_back(before + factor * (m.mean - before));
    wanted_running_var.push_back(
        var_before + factor * (m.variance * m.count / (m.count - 1) - var_before));
  }
  Bits bits[2];
  for (Bits& each : bits) {
    num_batches.set(std::vector<int>{3});
    running_mean.set(data.running_mean);
    running_var.set(data.running_var);
    check_launch(FoldLaunches<float>::fold(args, nullptr));
    compare("merged mean", merged_mean, wanted_mean, 1e-12);
    compare("merged m2", merged_m2, wanted_m2, 1e-9);
    compare("merged count", merged_count, {static_cast<double>(p.batch * p.spatial)}, 0);
    std::vector<double> found;
    for (std::int64_t i = 0; i < stats; ++i) {
      found.push_back(saved_mean[i] + saved_mean_lo[i]);
    }
    compare("saved mean", found, means, 1e-12);
    compare("saved invstd", saved_invstd, invstds, 1e-7);
    compare("running mean", running_mean, wanted_running_mean, 1e-7);
    compare("running var", running_var, wanted_running_var, 1e-7);
    compare("num batches", num_batches, {4}, 0);
    require(blocks_done[0] == 0, "counters: blocks_done is left at another value than zero");
    for (auto* values : {&saved_mean, &saved_mean_lo, &saved_invstd, &running_mean}) {
      values->append_to(each);
    }
  }
  require(bits[0] == bits[1], "bits: others in a second launch");
  check_launch(
      FoldLaunches<float>::grad_fold(
          {count.data(),
           sum_dy.data(),
           sum_dy_xmu.data(),
           no_mean_lo.data(),
           invstd.data(),
           {weight.data()},
           found_x.data(),
           found_0.data(),
           p.ghosts,
           p.channels},
          nullptr));
  compare("coef_x", found_x, coef_x, 1e-6);
  compare("coef_0", found_0, coef_0, 1e-6);
  return bits[0];
}

const std::vector<Case>& cases() {
  static const std::vector<Case> list = {
      {"fold",
       &fold,
       {.name = "fold",
        .order = Order::kRows,
        .batch = 20,
        .channels = 300,
        .spatial = 1,
        .ghosts = 3}},
      {"fold_cumulative",
       &fold,
       {.name = "fold_cumulative",
        .order = Order::kRows,
        .batch = 7,
        .channels = 520,
        .spatial = 2,
        .ghosts = 2,
        .cumulative = true}},
  };
  return list;
}

}  // namespace
}  // namespace kernel_checks

int main(int count, char** arguments) {
  return kernel_checks::run_cases(kernel_checks::cases(), count, arguments);
}
