// What lies between reduce and apply, per channel: simple loops that the compiler vectorises. In
// the files of each instruction set, since without FMA every fused multiply-add is a call.
#pragma once

#include "kernels.h"

namespace bnext {
namespace CPU_CAPABILITY {
namespace {

inline void merge(const MergeArgs args, std::int64_t n_channel) {
  double* __restrict mean = args.mean;
  double* __restrict m2 = args.m2;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    merge_moments(
        mean[c], m2[c], args.other_mean[c], args.other_m2[c], args.b_over_n, args.ab_over_n);
  }
}

template <typename scalar_t>
void statistics(const StatisticsArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
  acc_t* __restrict mean = args.save_mean;
  acc_t* __restrict mean_lo = args.save_mean_lo;
  acc_t* __restrict invstd = args.save_invstd;
  const double one_over_count = 1.0 / args.count;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    const auto stats = channel_stats<acc_t>(args.mean[c], args.m2[c] * one_over_count, args.eps);
    mean[c] = stats.mean;
    mean_lo[c] = stats.mean_lo;
    invstd[c] = stats.invstd;
  }
}

template <typename scalar_t>
void constants(const ConstantsArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
  acc_t* __restrict scale = args.scale;
  acc_t* __restrict shift = args.shift;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    const ChannelStats<acc_t> stats{args.mean[c], args.mean_lo[c], args.invstd[c]};
    const auto out = forward_constants<acc_t>(
        stats, args.weight != nullptr ? args.weight[c] : acc_t(1),
        args.bias != nullptr ? args.bias[c] : acc_t(0));
    scale[c] = out.scale;
    shift[c] = out.shift;
  }
}

template <typename scalar_t>
void grad_fold(const GradFoldArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  GradSums* __restrict sums = args.sums;
  GradSums* __restrict group = args.group;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    sums[c].subtract_mean_lo(args.mean_lo[c]);
    group[c].add({sums[c].sum_dy, sums[c].sum_dy_xmu * args.invstd[c]});
  }
}

template <typename scalar_t>
void coefficients(const CoefficientsArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
  acc_t* __restrict coef_x = args.coef_x;
  acc_t* __restrict coef_0 = args.coef_0;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    const ChannelStats<acc_t> stats{acc_t(0), args.mean_lo[c], args.invstd[c]};
    const auto out = backward_constants(stats, args.scale[c], args.count, args.sums[c]);
    coef_x[c] = out.coef_x;
    coef_0[c] = out.coef_0;
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext
