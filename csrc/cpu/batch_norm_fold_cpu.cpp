// The middle step on the CPU: triples of ghosts or of processes to statistics. All of it is
// C-sized.
#include <vector>

#include "../ops.h"
#include "running_stats_cpu.h"
#include "tensors.h"

namespace bnext {
namespace {

class Moments {
 public:
  Moments(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2)
      : count_(count.contiguous()), mean_(mean.contiguous()), m2_(m2.contiguous()) {
    for (std::int64_t i = 0; i < size(); ++i) {
      TORCH_CHECK_VALUE(
          count_.const_data_ptr<std::int64_t>()[i] >= 0, "count must not be negative, got ",
          count_.const_data_ptr<std::int64_t>()[i], " at index ", i);
    }
  }

  std::int64_t size() const { return mean_.size(0); }
  std::int64_t n_channel() const { return mean_.size(1); }

  Welford<double> get(std::int64_t i, std::int64_t channel) const {
    const std::int64_t at = i * n_channel() + channel;
    return {
        static_cast<double>(count_.const_data_ptr<std::int64_t>()[i]),
        mean_.const_data_ptr<double>()[at], m2_.const_data_ptr<double>()[at]};
  }

  std::int64_t total_count() const {
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < size(); ++i) {
      total += count_.const_data_ptr<std::int64_t>()[i];
    }
    return total;
  }

  // In the order of dim 0, so that every process gets the same bits.
  std::vector<Welford<double>> merged() const {
    std::vector<Welford<double>> totals(n_channel());
    for (std::int64_t i = 0; i < size(); ++i) {
      for (std::int64_t c = 0; c < n_channel(); ++c) {
        totals[c].merge(get(i, c));
      }
    }
    return totals;
  }

 private:
  at::Tensor count_, mean_, m2_;
};

}  // namespace

Tensor3 batch_norm_merge_cpu(
    const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2) {
  check_moments(count, mean, m2);
  const Moments moments(count, mean, m2);
  const at::Tensor merged_count = count.new_empty({1});
  const at::Tensor merged_mean = mean.new_empty({1, moments.n_channel()});
  const at::Tensor merged_m2 = mean.new_empty({1, moments.n_channel()});
  merged_count.mutable_data_ptr<std::int64_t>()[0] = moments.total_count();
  const auto totals = moments.merged();
  for (std::int64_t c = 0; c < moments.n_channel(); ++c) {
    merged_mean.mutable_data_ptr<double>()[c] = totals[c].mean;
    merged_m2.mutable_data_ptr<double>()[c] = totals[c].m2;
  }
  return {merged_count, merged_mean, merged_m2};
}

Tensor3 batch_norm_fold_cpu(
    const at::Tensor& count,
    const at::Tensor& mean,
    const at::Tensor& m2,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    at::ScalarType dtype) {
  check_fold(count, mean, m2, running_mean, running_var, num_batches_tracked, momentum, eps, dtype);
  const Moments moments(count, mean, m2);
  TORCH_CHECK_VALUE(
      moments.total_count() != 1,
      "Expected more than 1 value per channel when training, got a total count of 1");
  const at::ScalarType acc = acc_type(dtype);
  const at::Tensor save_mean = mean.new_empty(mean.sizes(), acc);
  const at::Tensor save_mean_lo = mean.new_empty(mean.sizes(), acc);
  const at::Tensor save_invstd = mean.new_empty(mean.sizes(), acc);
  dispatch_dtype(acc, [&](auto tag) {
    using acc_t = AccType<decltype(tag)>;
    for (std::int64_t i = 0; i < moments.size(); ++i) {
      for (std::int64_t c = 0; c < moments.n_channel(); ++c) {
        const Welford<double> welford = moments.get(i, c);
        const ChannelStats<acc_t> stats =
            welford.count == 0 ? ChannelStats<acc_t>{0, 0, 0} : channel_stats<acc_t>(welford, eps);
        const std::int64_t at = i * moments.n_channel() + c;
        save_mean.mutable_data_ptr<acc_t>()[at] = stats.mean;
        save_mean_lo.mutable_data_ptr<acc_t>()[at] = stats.mean_lo;
        save_invstd.mutable_data_ptr<acc_t>()[at] = stats.invstd;
      }
    }
  });
  RunningStats{running_mean, running_var, num_batches_tracked, momentum}.update(
      moments.total_count() == 0 ? std::vector<Welford<double>>() : moments.merged());
  return {save_mean, save_mean_lo, save_invstd};
}

}  // namespace bnext
