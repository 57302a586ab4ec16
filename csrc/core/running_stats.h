// The running statistics of a layer, as torch.nn.BatchNorm keeps them.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "welford.h"

namespace bnext {

// momentum, or the cumulative average's 1 / n with n the number of batches including this one.
BNEXT_HD inline double average_factor(bool cumulative, double momentum, std::int64_t num_batches) {
  return cumulative ? 1.0 / static_cast<double>(num_batches) : momentum;
}

BNEXT_HD inline double update_average(double running, double value, double factor) {
  return factor * value + (1.0 - factor) * running;
}

// The biased variance normalises; the unbiased one is what running_var averages. In double, since
// (1 - factor) * running + factor * value in float loses digits over many steps.
template <typename stat_t>
BNEXT_HD inline void update_running_stats(
    const Welford<double>& welford, double factor, stat_t& running_mean, stat_t& running_var) {
  running_mean =
      static_cast<stat_t>(update_average(static_cast<double>(running_mean), welford.mean, factor));
  running_var = static_cast<stat_t>(
      update_average(static_cast<double>(running_var), welford.unbiased_variance(), factor));
}

}  // namespace bnext
