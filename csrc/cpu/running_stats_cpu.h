// The update of a layer's buffers, once per forward, after everything that can fail.
#pragma once

#include <optional>
#include <vector>

#include "../core/running_stats.h"
#include "tensors.h"

namespace bnext {

struct RunningStats {
  OptionalTensor mean;
  OptionalTensor var;
  OptionalTensor num_batches_tracked;
  std::optional<double> momentum;

  // moments: of the whole batch, one per channel; empty for an empty batch, which only counts.
  void update(const std::vector<Welford<double>>& moments) const;
};

}  // namespace bnext
