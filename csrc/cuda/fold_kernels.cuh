// The middle step as kernels of their own, for synchronised statistics: one thread per channel.
#pragma once

#include "forward_kernels.cuh"
#include "grad_sums.cuh"

namespace bnext::cuda {

__device__ __forceinline__ std::int64_t thread_in_grid() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ Welford<double> set_of_channel(
    const MergeArgs& args, std::int64_t set, std::int64_t channel) {
  const std::int64_t at = set * args.n_channel + channel;
  return {static_cast<double>(__ldg(args.count + set)), __ldg(args.mean + at), __ldg(args.m2 + at)};
}

// In the order of the sets, so that every process gets the same bits.
__device__ __forceinline__ Welford<double> merge_sets(const MergeArgs& args, std::int64_t channel) {
  Welford<double> total;
  for (std::int64_t set = 0; set < args.num_sets; ++set) {
    total.merge(set_of_channel(args, set, channel));
  }
  return total;
}

__device__ __forceinline__ std::int64_t total_count(const MergeArgs& args) {
  std::int64_t total = 0;
  for (std::int64_t set = 0; set < args.num_sets; ++set) {
    total += __ldg(args.count + set);
  }
  return total;
}

static __global__ void merge_kernel(const __grid_constant__ MergeArgs args) {
  const std::int64_t channel = thread_in_grid();
  if (channel == 0) {
    __stwb(args.merged_count, total_count(args));
  }
  if (channel < args.n_channel) {
    const Welford<double> total = merge_sets(args, channel);
    __stwb(args.merged_mean + channel, total.mean);
    __stwb(args.merged_m2 + channel, total.m2);
  }
}

template <typename scalar_t>
__global__ void fold_kernel(const __grid_constant__ FoldArgs<scalar_t> args) {
  using acc_t = AccType<scalar_t>;
  const std::int64_t channel = thread_in_grid();
  const MergeArgs& sets = args.sets;
  if (channel < sets.n_channel) {
    for (std::int64_t set = 0; set < sets.num_sets; ++set) {
      const Welford<double> welford = set_of_channel(sets, set, channel);
      const ChannelStats<acc_t> stats = welford.count == 0
                                            ? ChannelStats<acc_t>{0, 0, 0}
                                            : channel_stats<acc_t>(welford, args.eps);
      const std::int64_t at = set * sets.n_channel + channel;
      __stwb(args.saved.mean + at, stats.mean);
      __stwb(args.saved.mean_lo + at, stats.mean_lo);
      __stwb(args.saved.invstd + at, stats.invstd);
    }
    // An empty batch counts, and leaves the running statistics as they are.
    const Welford<double> batch = merge_sets(sets, channel);
    if (batch.count > 0) {
      update_running<scalar_t>(args.running, channel, batch, /*base=*/0);
    }
  }
  count_batch(args.running, args.blocks_done, gridDim.x, Shared<scalar_t>{1}.flag());
}

// The constants of grad_apply from given sums: one thread per ghost and channel.
template <typename scalar_t>
__global__ void grad_fold_kernel(const __grid_constant__ GradFoldArgs<scalar_t> args) {
  using acc_t = AccType<scalar_t>;
  const std::int64_t at = thread_in_grid();
  if (at >= args.num_ghosts * args.n_channel) {
    return;
  }
  const std::int64_t ghost = at / args.n_channel, channel = at % args.n_channel;
  const ChannelStats<acc_t> stats{acc_t(0), __ldg(args.mean_lo + at), __ldg(args.invstd + at)};
  const acc_t scale = stats.invstd * get<scalar_t>(args.weight, channel, 1);
  const auto constants = backward_constants(
      stats, scale, static_cast<double>(__ldg(args.count + ghost)),
      GradSums{__ldg(args.sum_dy + at), __ldg(args.sum_dy_xmu + at)});
  __stwb(args.coef_x + at, constants.coef_x);
  __stwb(args.coef_0 + at, constants.coef_0);
}

}  // namespace bnext::cuda
