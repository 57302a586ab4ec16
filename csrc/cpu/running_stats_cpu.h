// The update of a layer's buffers, once per forward, after everything that can fail.
#pragma once

#include <optional>
#include <vector>

#include "../core/running_stats.h"
#include "tensors.h"

namespace bnext::cpu {

// `moments`: of the whole batch, one per channel; empty for an empty batch, which only counts.
void update_running_stats(
    const RunningStatsArgs& running,
    std::optional<double> momentum,
    const std::vector<Welford<double>>& moments);

}  // namespace bnext::cpu
