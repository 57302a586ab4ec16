// Forward on the CPU: the fused op, and reduce and apply on their own.
#include <algorithm>
#include <vector>

#include "../ops.h"
#include "reduce_cpu.h"
#include "running_stats_cpu.h"
#include "steps.h"
#include "tensors.h"

namespace bnext {
namespace {

// Where the statistics of each ghost and channel go to (training) or come from (eval): (G, C).
template <typename acc_t>
struct SavedStats {
  acc_t* mean;
  acc_t* mean_lo;
  acc_t* invstd;

  SavedStats at(std::int64_t i) const { return {mean + i, mean_lo + i, invstd + i}; }
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

// The steps of batch_norm and of batch_norm_apply, which only applies given statistics.
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
      double eps,
      bool given_stats)
      : schedule_(schedule),
        reduce_(schedule, tensors.input),
        input_(tensors.input.const_data_ptr<scalar_t>()),
        residual_(optional_data<scalar_t>(tensors.residual)),
        output_(tensors.output.mutable_data_ptr<scalar_t>()),
        weight_(tensors.weight),
        bias_(tensors.bias),
        activation_(tensors.activation),
        saved_(saved),
        eps_(eps),
        given_stats_(given_stats) {
    advise_huge_pages(tensors.output);
  }

  Scratch make_scratch() const {
    const std::int64_t n_channel = schedule_.n_channel();
    return {
        given_stats_ ? Partials{MomentRows(0, 0), {}} : reduce_.make_partials(),
        std::vector<acc_t>(n_channel), std::vector<acc_t>(n_channel), nullptr};
  }

  void prepare(std::int64_t ghost, Scratch& scratch) const {
    scratch.mean = saved_.mean + ghost * schedule_.n_channel();
    if (given_stats_) {
      set_constants(ghost, Range{0, schedule_.n_channel()}, scratch);
    } else {
      reduce_.prepare(ghost, scratch.partials);
    }
  }

  void reduce(const Piece& piece, Scratch& scratch) const {
    reduce_.reduce(piece, scratch.partials);
  }

  void fold(std::int64_t ghost, std::int64_t group, Range channels, Scratch& scratch) {
    reduce_.merge(ghost, channels, scratch.partials);
    const std::int64_t first = channels.begin;
    const MomentRows& moments = scratch.partials.moments;
    const SavedStats<acc_t> saved = saved_.at(ghost * schedule_.n_channel() + first);
    kernel_table().of<scalar_t>().statistics(
        {Reduce<scalar_t>::base_at(scratch.partials, first), moments.mean(0) + first,
         moments.m2(0) + first, schedule_.count(ghost), eps_, saved.mean, saved.mean_lo,
         saved.invstd},
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
    const SavedStats<acc_t> saved = saved_.at(ghost * schedule_.n_channel() + first);
    kernel_table().of<scalar_t>().constants(
        {saved.mean, saved.mean_lo, saved.invstd, at_offset(weight_.data(), first),
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
  bool given_stats_;
};

template <typename acc_t>
SavedStats<acc_t> saved_stats(
    const at::Tensor& mean, const at::Tensor& mean_lo, const at::Tensor& invstd) {
  return {
      mean.mutable_data_ptr<acc_t>(), mean_lo.mutable_data_ptr<acc_t>(),
      invstd.mutable_data_ptr<acc_t>()};
}

// Eval: the statistics are the running ones.
template <typename acc_t>
void save_running_stats(
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    double eps,
    std::int64_t n_channel,
    const SavedStats<acc_t>& saved) {
  const ChannelValues<acc_t> mean(running_mean), var(running_var);
  for (std::int64_t c = 0; c < n_channel; ++c) {
    saved.set(c, {mean.get(c, 0), acc_t(0), inverse_std<acc_t>(var.get(c, 1), eps)});
  }
}

}  // namespace

Tensor4 batch_norm_cpu(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    const OptionalTensor& residual,
    bool training,
    std::optional<double> momentum,
    double eps,
    OptionalString activation,
    std::optional<std::int64_t> ghost_batch_size) {
  const BatchNormCall call = check_batch_norm(
      input, weight, bias, running_mean, running_var, num_batches_tracked, residual, training,
      momentum, eps, activation, to_symint(ghost_batch_size));
  const std::int64_t num_ghosts = call.num_ghosts.expect_int();
  const ForwardTensors tensors = forward_tensors(input, weight, bias, residual, call.activation);
  const at::Tensor save_mean = empty_stats(input, num_ghosts);
  const at::Tensor save_mean_lo = empty_stats(input, num_ghosts);
  const at::Tensor save_invstd = empty_stats(input, num_ghosts);
  const RunningStats running{running_mean, running_var, num_batches_tracked, momentum};
  if (input.numel() == 0) {
    // As torch: the running statistics stay, the batch counts.
    save_mean.zero_();
    save_mean_lo.zero_();
    save_invstd.zero_();
    if (training) {
      running.update({});
    }
    return {tensors.output, save_mean, save_mean_lo, save_invstd};
  }
  const Schedule schedule = schedule_of(input, num_ghosts, {/*reduce=*/training, /*apply=*/true});
  dispatch_dtype(input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = AccType<scalar_t>;
    const auto saved = saved_stats<acc_t>(save_mean, save_mean_lo, save_invstd);
    if (!training) {
      save_running_stats<acc_t>(running_mean, running_var, eps, input.size(1), saved);
    }
    ForwardSteps<scalar_t> steps(schedule, tensors, saved, eps, /*given_stats=*/!training);
    run_steps(schedule, steps);
    if (training) {
      running.update(
          is_given(running_mean) ? steps.batch_moments() : std::vector<Welford<double>>());
    }
  });
  return {tensors.output, save_mean, save_mean_lo, save_invstd};
}

at::Tensor batch_norm_apply_cpu(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation) {
  const BatchNormCall call =
      check_apply(input, weight, bias, residual, save_mean, save_mean_lo, save_invstd, activation);
  const ForwardTensors tensors = forward_tensors(input, weight, bias, residual, call.activation);
  if (input.numel() == 0) {
    return tensors.output;
  }
  const Schedule schedule =
      schedule_of(input, call.num_ghosts.expect_int(), {/*reduce=*/false, /*apply=*/true});
  const at::Tensor mean = save_mean.contiguous();
  const at::Tensor mean_lo = save_mean_lo.contiguous();
  const at::Tensor invstd = save_invstd.contiguous();
  dispatch_dtype(input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    const auto saved = saved_stats<AccType<scalar_t>>(mean, mean_lo, invstd);
    ForwardSteps<scalar_t> steps(schedule, tensors, saved, /*eps=*/0, /*given_stats=*/true);
    run_steps(schedule, steps);
  });
  return tensors.output;
}

Tensor3 batch_norm_reduce_cpu(
    const at::Tensor& input, std::optional<std::int64_t> ghost_batch_size) {
  check_input(input);
  const std::int64_t num_ghosts = check_num_ghosts(input, to_symint(ghost_batch_size)).expect_int();
  const at::Tensor count = input.new_empty({num_ghosts}, at::kLong);
  const at::Tensor mean = input.new_empty({num_ghosts, input.size(1)}, at::kDouble);
  const at::Tensor m2 = mean.new_empty(mean.sizes());
  if (input.numel() == 0) {
    return {count.zero_(), mean.zero_(), m2.zero_()};
  }
  const at::Tensor dense = to_dense(input, dense_format(input));
  const Schedule schedule = schedule_of(input, num_ghosts, {/*reduce=*/true, /*apply=*/false});
  for (std::int64_t ghost = 0; ghost < num_ghosts; ++ghost) {
    count.mutable_data_ptr<std::int64_t>()[ghost] =
        static_cast<std::int64_t>(schedule.count(ghost));
  }
  dispatch_dtype(input.scalar_type(), [&](auto tag) {
    ReduceSteps<decltype(tag)> steps(
        schedule, dense, mean.mutable_data_ptr<double>(), m2.mutable_data_ptr<double>());
    run_steps(schedule, steps);
  });
  return {count, mean, m2};
}

}  // namespace bnext
