#include "running_stats_cpu.h"

namespace bnext::cpu {
namespace {

template <typename acc_t>
void update_channels(
    const std::vector<Welford<double>>& moments, double factor, acc_t* mean, acc_t* var) {
  for (std::size_t c = 0; c < moments.size(); ++c) {
    update_running_stats(moments[c], factor, mean[c], var[c]);
  }
}

}  // namespace

void update_running_stats(
    const RunningStatsArgs& running,
    std::optional<double> momentum,
    const std::vector<Welford<double>>& moments) {
  const auto& [mean, var, num_batches_tracked] = running;
  std::int64_t num_batches = 0;
  if (is_given(num_batches_tracked)) {
    num_batches = ++*num_batches_tracked->mutable_data_ptr<std::int64_t>();
  }
  if (!is_given(mean) || moments.empty()) {
    return;
  }
  const double factor = average_factor(!momentum.has_value(), momentum.value_or(0), num_batches);
  const at::ScalarType acc = acc_type(mean->scalar_type());
  const at::Tensor acc_mean = to_contiguous(*mean, acc);
  const at::Tensor acc_var = to_contiguous(*var, acc);
  if (acc == at::kDouble) {
    update_channels(
        moments, factor, acc_mean.mutable_data_ptr<double>(), acc_var.mutable_data_ptr<double>());
  } else {
    update_channels(
        moments, factor, acc_mean.mutable_data_ptr<float>(), acc_var.mutable_data_ptr<float>());
  }
  // Buffers of half precision or of a stride were updated in a copy.
  if (!acc_mean.is_same(*mean)) {
    mean->copy_(acc_mean);
  }
  if (!acc_var.is_same(*var)) {
    var->copy_(acc_var);
  }
}

}  // namespace bnext::cpu
