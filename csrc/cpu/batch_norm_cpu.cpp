// Forward on the CPU: the fused op, and reduce and apply on their own.
#include <algorithm>
#include <memory>
#include <vector>

#include "../ops.h"
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

// Moments in double of `rows` sets of the same channels, which have one count per row.
class MomentRows {
 public:
  MomentRows(std::int64_t rows, std::int64_t n_channel)
      : n_channel_(n_channel), values_(new double[2 * rows * n_channel]) {}

  double* mean(std::int64_t row) const { return values_.get() + 2 * row * n_channel_; }
  double* m2(std::int64_t row) const { return mean(row) + n_channel_; }

  // Merges a row of `other`, of `count` values, into one of this, of `before` values: one division
  // for all the channels.
  void merge(
      Range channels,
      std::int64_t row,
      double before,
      const MomentRows& other,
      std::int64_t other_row,
      double count) const {
    const std::int64_t first = channels.begin;
    const double* const from_mean = other.mean(other_row) + first;
    const double* const from_m2 = other.m2(other_row) + first;
    if (before == 0) {
      std::copy_n(from_mean, channels.size(), mean(row) + first);
      std::copy_n(from_m2, channels.size(), m2(row) + first);
      return;
    }
    const double b_over_n = count / (before + count);
    kernel_table().float64.merge(
        {mean(row) + first, m2(row) + first, from_mean, from_m2, b_over_n, before * b_over_n},
        channels.size());
  }

 private:
  std::int64_t n_channel_;
  std::unique_ptr<double[]> values_;
};

template <typename scalar_t>
class Reduce {
 public:
  using Scratch = MomentRows;  // a row per partial result

  Reduce(const Schedule& schedule, const at::Tensor& input)
      : schedule_(schedule),
        input_(input.const_data_ptr<scalar_t>()),
        groups_(schedule.num_groups(), schedule.n_channel()) {}

  Scratch make_partials() const { return Scratch(schedule_.num_partials(), schedule_.n_channel()); }

  void reduce(const Piece& piece, Scratch& partials) const {
    double* const mean = partials.mean(piece.partial) + piece.channel;
    double* const m2 = partials.m2(piece.partial) + piece.channel;
    kernel_table().of<scalar_t>().reduce({input_ + piece.offset, mean, m2}, piece.slab);
  }

  // Merges the partials into the first.
  void fold(std::int64_t ghost, std::int64_t group, Range channels, Scratch& partials) const {
    double before = schedule_.partial_count(ghost, 0);
    for (std::int64_t p = 1; p < schedule_.num_partials(); ++p) {
      const double count = schedule_.partial_count(ghost, p);
      partials.merge(channels, 0, before, partials, p, count);
      before += count;
    }
    const std::int64_t first = schedule_.first_ghost(group);
    groups_.merge(
        channels, group, ghost == first ? 0 : schedule_.count(first, ghost), partials, 0, before);
  }

  // Those of the whole batch, for the running statistics.
  std::vector<Welford<double>> batch_moments() const {
    const Range channels{0, schedule_.n_channel()};
    double total = schedule_.count(0, schedule_.first_of_next(0));
    for (std::int64_t group = 1; group < schedule_.num_groups(); ++group) {
      const double count =
          schedule_.count(schedule_.first_ghost(group), schedule_.first_of_next(group));
      groups_.merge(channels, 0, total, groups_, group, count);
      total += count;
    }
    std::vector<Welford<double>> batch(channels.end);
    for (std::int64_t c = 0; c < channels.end; ++c) {
      batch[c] = {total, groups_.mean(0)[c], groups_.m2(0)[c]};
    }
    return batch;
  }

 private:
  const Schedule& schedule_;
  const scalar_t* input_;
  MomentRows groups_;
};

// The steps of batch_norm_reduce: moments of every ghost, in double.
template <typename scalar_t>
class ReduceSteps {
 public:
  using Scratch = typename Reduce<scalar_t>::Scratch;

  ReduceSteps(const Schedule& schedule, const at::Tensor& input, double* mean, double* m2)
      : reduce_(schedule, input), n_channel_(schedule.n_channel()), mean_(mean), m2_(m2) {}

  Scratch make_scratch() const { return reduce_.make_partials(); }
  void prepare(std::int64_t, Scratch&) const {}
  void reduce(const Piece& piece, Scratch& scratch) const { reduce_.reduce(piece, scratch); }
  void fold(std::int64_t ghost, std::int64_t group, Range channels, Scratch& scratch) {
    reduce_.fold(ghost, group, channels, scratch);
    const std::int64_t first = ghost * n_channel_ + channels.begin;
    std::copy_n(scratch.mean(0) + channels.begin, channels.size(), mean_ + first);
    std::copy_n(scratch.m2(0) + channels.begin, channels.size(), m2_ + first);
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
    MomentRows partials;
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
        given_stats_ ? MomentRows(0, 0) : reduce_.make_partials(), std::vector<acc_t>(n_channel),
        std::vector<acc_t>(n_channel), nullptr};
  }

  void prepare(std::int64_t ghost, Scratch& scratch) const {
    scratch.mean = saved_.mean + ghost * schedule_.n_channel();
    if (given_stats_) {
      set_constants(ghost, Range{0, schedule_.n_channel()}, scratch);
    }
  }

  void reduce(const Piece& piece, Scratch& scratch) const {
    reduce_.reduce(piece, scratch.partials);
  }

  void fold(std::int64_t ghost, std::int64_t group, Range channels, Scratch& scratch) {
    reduce_.fold(ghost, group, channels, scratch.partials);
    const std::int64_t first = channels.begin;
    const SavedStats<acc_t> saved = saved_.at(ghost * schedule_.n_channel() + first);
    kernel_table().of<scalar_t>().statistics(
        {scratch.partials.mean(0) + first, scratch.partials.m2(0) + first, schedule_.count(ghost),
         eps_, saved.mean, saved.mean_lo, saved.invstd},
        channels.size());
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
