// The middle step on the CPU: triples of ghosts or of processes to statistics. All of it is
// C-sized.
#include <vector>

#include "backend_cpu.h"
#include "running_stats_cpu.h"
#include "tensors.h"

namespace bnext::cpu {
namespace {

class Moments {
 public:
  explicit Moments(const MomentTensors& sets)
      : sets_(sets), counts_(sets.count.const_data_ptr<std::int64_t>()) {
    for (std::int64_t i = 0; i < size(); ++i) {
      TORCH_CHECK_VALUE(
          counts_[i] >= 0, "count must not be negative, got ", counts_[i], " at index ", i);
    }
  }

  std::int64_t size() const { return sets_.mean.size(0); }
  std::int64_t n_channel() const { return sets_.mean.size(1); }

  Welford<double> get(std::int64_t i, std::int64_t channel) const {
    const std::int64_t at = i * n_channel() + channel;
    return {
        static_cast<double>(counts_[i]), sets_.mean.const_data_ptr<double>()[at],
        sets_.m2.const_data_ptr<double>()[at]};
  }

  std::int64_t total_count() const {
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < size(); ++i) {
      total += counts_[i];
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
  const MomentTensors& sets_;
  const std::int64_t* counts_;
};

}  // namespace

void CpuBackend::merge(const MomentTensors& sets, const MomentTensors& merged) const {
  const Moments moments(sets);
  merged.count.mutable_data_ptr<std::int64_t>()[0] = moments.total_count();
  const auto totals = moments.merged();
  for (std::int64_t c = 0; c < moments.n_channel(); ++c) {
    merged.mean.mutable_data_ptr<double>()[c] = totals[c].mean;
    merged.m2.mutable_data_ptr<double>()[c] = totals[c].m2;
  }
}

void CpuBackend::fold(
    const FoldCall& call, const MomentTensors& sets, const StatsTensors& saved) const {
  const Moments moments(sets);
  TORCH_CHECK_VALUE(
      moments.total_count() != 1,
      "Expected more than 1 value per channel when training, got a total count of 1");
  dispatch_dtype(saved.mean.scalar_type(), [&](auto tag) {
    using acc_t = AccType<decltype(tag)>;
    for (std::int64_t i = 0; i < moments.size(); ++i) {
      for (std::int64_t c = 0; c < moments.n_channel(); ++c) {
        const Welford<double> welford = moments.get(i, c);
        const ChannelStats<acc_t> stats = welford.count == 0
                                              ? ChannelStats<acc_t>{0, 0, 0}
                                              : channel_stats<acc_t>(welford, call.eps);
        const std::int64_t at = i * moments.n_channel() + c;
        saved.mean.mutable_data_ptr<acc_t>()[at] = stats.mean;
        saved.mean_lo.mutable_data_ptr<acc_t>()[at] = stats.mean_lo;
        saved.invstd.mutable_data_ptr<acc_t>()[at] = stats.invstd;
      }
    }
  });
  update_running_stats(
      call.running, call.momentum,
      moments.total_count() == 0 ? std::vector<Welford<double>>() : moments.merged());
}

}  // namespace bnext::cpu
