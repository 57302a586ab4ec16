// Forward on the CPU: all of it, and reduce and apply on their own.
#include <vector>

#include "backend_cpu.h"
#include "reduce_cpu.h"
#include "running_stats_cpu.h"
#include "steps.h"
#include "tensors.h"

namespace bnext::cpu {
namespace {

// Where the statistics of each ghost and channel go to (training) or come from (eval): (G, C).
template <typename acc_t>
struct SavedStats {
  acc_t* mean;
  acc_t* mean_lo;
  acc_t* invstd;

  explicit SavedStats(const StatsTensors& stats)
      : mean(stats.mean.mutable_data_ptr<acc_t>()),
        mean_lo(stats.mean_lo.mutable_data_ptr<acc_t>()),
        invstd(stats.invstd.mutable_data_ptr<acc_t>()) {}

  void set(std::int64_t i, const ChannelStats<acc_t>& stats) const {
    mean[i] = stats.mean;
    mean_lo[i] = stats.mean_lo;
    invstd[i] = stats.invstd;
  }
};

// The steps of batch_norm_reduce: moments of every ghost, in double.
template <typename scalar_t>
class ReduceSteps {
 public:
  using Scratch = Partials;

  ReduceSteps(const Schedule& schedule, const at::Tensor& input, double* mean, double* m2)
      : reduce_(schedule, input), n_channel_(schedule.n_channel()), mean_(mean), m2_(m2) {}

  Scratch make_scratch() const { return reduce_.make_partials(); }
  void prepare(std::int64_t ghost, Scratch& scratch) const { reduce_.prepare(ghost, scratch); }
  void reduce(const Piece& piece, Scratch& scratch) const { reduce_.reduce(piece, scratch); }
  void fold(std::int64_t ghost, std::int64_t, Range channels, Scratch& scratch) {
    reduce_.merge(ghost, channels, scratch);
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      const std::int64_t at = ghost * n_channel_ + c;
      mean_[at] = scratch.moments.mean(0)[c] + (kHasBase<scalar_t> ? scratch.base[c] : 0.0);
      m2_[at] = scratch.moments.m2(0)[c];
    }
  }
  void apply(const Piece&, Scratch&) const {}

 private:
  Reduce<scalar_t> reduce_;
  std::int64_t n_channel_;
  double* mean_;
  double* m2_;
};

// The steps of batch_norm, and of batch_norm_apply and eval, which have no reduction: the
// statistics are given.
template <typename scalar_t>
class ForwardSteps {
 public:
  using acc_t = AccType<scalar_t>;
  struct Scratch {
    Partials partials;
    std::vector<acc_t> scale;
    std::vector<acc_t> shift;
    const acc_t* mean;
  };

  ForwardSteps(
      const Schedule& schedule,
      const ForwardTensors& tensors,
      const SavedStats<acc_t>& saved,
      double eps)
      : schedule_(schedule),
        reduce_(schedule, tensors.input),
        input_(tensors.input.const_data_ptr<scalar_t>()),
        residual_(optional_data<scalar_t>(tensors.residual)),
        output_(tensors.output.mutable_data_ptr<scalar_t>()),
        weight_(tensors.weight),
        bias_(tensors.bias),
        activation_(tensors.activation),
        saved_(saved),
        eps_(eps) {
    advise_huge_pages(tensors.output);
  }

  Scratch make_scratch() const {
    const std::int64_t n_channel = schedule_.n_channel();
    return {
        schedule_.phases().reduce ? reduce_.make_partials() : Partials{MomentRows(0, 0), {}},
        std::vector<acc_t>(n_channel), std::vector<acc_t>(n_channel), nullptr};
  }

  void prepare(std::int64_t ghost, Scratch& scratch) const {
    scratch.mean = saved_.mean + ghost * schedule_.n_channel();
    if (schedule_.phases().reduce) {
      reduce_.prepare(ghost, scratch.partials);
    } else {
      set_constants(ghost, Range{0, schedule_.n_channel()}, scratch);
    }
  }

  void reduce(const Piece& piece, Scratch& scratch) const {
    reduce_.reduce(piece, scratch.partials);
  }

  void fold(std::int64_t ghost, std::int64_t group, Range channels, Scratch& scratch) {
    reduce_.merge(ghost, channels, scratch.partials);
    const std::int64_t first = channels.begin;
    const MomentRows& moments = scratch.partials.moments;
    const std::int64_t i = ghost * schedule_.n_channel() + first;
    kernel_table().of<scalar_t>().statistics(
        {Reduce<scalar_t>::base_at(scratch.partials, first), moments.mean(0) + first,
         moments.m2(0) + first, schedule_.count(ghost), eps_, saved_.mean + i, saved_.mean_lo + i,
         saved_.invstd + i},
        channels.size());
    reduce_.add_to_group(ghost, group, channels, scratch.partials);
    set_constants(ghost, channels, scratch);
  }

  void apply(const Piece& piece, Scratch& scratch) const {
    ApplyArgs<scalar_t> args;
    args.input = input_ + piece.offset;
    args.residual = at_offset(residual_, piece.offset);
    args.output = output_ + piece.offset;
    args.mean = scratch.mean + piece.channel;
    args.scale = scratch.scale.data() + piece.channel;
    args.shift = scratch.shift.data() + piece.channel;
    args.activation = activation_;
    args.stream = schedule_.stream(piece);
    args.ahead = args.stream ? piece.ahead : 0;  // else it is in the cache
    kernel_table().of<scalar_t>().apply(args, piece.slab);
  }

  std::vector<Welford<double>> batch_moments() const { return reduce_.batch_moments(); }

 private:
  void set_constants(std::int64_t ghost, Range channels, Scratch& scratch) const {
    const std::int64_t first = channels.begin;
    const std::int64_t i = ghost * schedule_.n_channel() + first;
    kernel_table().of<scalar_t>().constants(
        {saved_.mean + i, saved_.mean_lo + i, saved_.invstd + i, at_offset(weight_.data(), first),
         at_offset(bias_.data(), first), scratch.scale.data() + first,
         scratch.shift.data() + first},
        channels.size());
  }

  const Schedule& schedule_;
  Reduce<scalar_t> reduce_;
  const scalar_t* input_;
  const scalar_t* residual_;
  scalar_t* output_;
  ChannelValues<acc_t> weight_;
  ChannelValues<acc_t> bias_;
  Activation activation_;
  SavedStats<acc_t> saved_;
  double eps_;
};

// Eval: the statistics are the running ones.
template <typename acc_t>
void save_running_stats(
    const RunningStatsArgs& running,
    double eps,
    std::int64_t n_channel,
    const SavedStats<acc_t>& saved) {
  const ChannelValues<acc_t> mean(running.running_mean), var(running.running_var);
  for (std::int64_t c = 0; c < n_channel; ++c) {
    saved.set(c, {mean.get(c, 0), acc_t(0), inverse_std<acc_t>(var.get(c, 1), eps)});
  }
}

std::int64_t element_size(const at::Tensor& tensor) {
  return static_cast<std::int64_t>(tensor.element_size());
}

}  // namespace

void CpuBackend::forward(
    const ForwardCall& call, const ForwardTensors& tensors, const StatsTensors& stats) const {
  const at::Tensor& input = tensors.input;
  const Schedule schedule(
      tensors.layout, element_size(input), stats.num_ghosts(), {/*reduce=*/call.training, true});
  dispatch_dtype(input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    const SavedStats<AccType<scalar_t>> saved(stats);
    if (!call.training) {
      save_running_stats(call.running, call.eps, tensors.layout.n_channel, saved);
    }
    ForwardSteps<scalar_t> steps(schedule, tensors, saved, call.eps);
    run_steps(schedule, steps);
    if (call.training) {
      update_running_stats(
          call.running, call.momentum,
          is_given(call.running.running_mean) ? steps.batch_moments()
                                              : std::vector<Welford<double>>());
    }
  });
}

void CpuBackend::apply(const ForwardTensors& tensors, const StatsTensors& stats) const {
  const Schedule schedule(
      tensors.layout, element_size(tensors.input), stats.num_ghosts(), {/*reduce=*/false, true});
  dispatch_dtype(tensors.input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    const SavedStats<AccType<scalar_t>> saved(stats);
    ForwardSteps<scalar_t> steps(schedule, tensors, saved, /*eps=*/0);
    run_steps(schedule, steps);
  });
}

void CpuBackend::reduce(
    const at::Tensor& input, const Layout& layout, const MomentTensors& moments) const {
  const std::int64_t num_ghosts = moments.mean.size(0);
  const Schedule schedule(
      layout, element_size(input), num_ghosts, {/*reduce=*/true, /*apply=*/false});
  auto* const count = moments.count.mutable_data_ptr<std::int64_t>();
  for (std::int64_t ghost = 0; ghost < num_ghosts; ++ghost) {
    count[ghost] = static_cast<std::int64_t>(schedule.count(ghost));
  }
  dispatch_dtype(input.scalar_type(), [&](auto tag) {
    ReduceSteps<decltype(tag)> steps(
        schedule, input, moments.mean.mutable_data_ptr<double>(),
        moments.m2.mutable_data_ptr<double>());
    run_steps(schedule, steps);
  });
}

}  // namespace bnext::cpu
