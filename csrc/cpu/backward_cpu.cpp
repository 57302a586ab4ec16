// Backward on the CPU: all of it, and grad_reduce and grad_apply on their own.
#include <algorithm>
#include <vector>

#include "backend_cpu.h"
#include "steps.h"
#include "tensors.h"

namespace bnext::cpu {
namespace {

// (G, C): the sums of each ghost and channel, null where not asked for, and the counts they are of.
struct SumsOut {
  double* sum_dy = nullptr;
  double* sum_dy_xmu = nullptr;
};
struct SumsIn {
  const double* sum_dy = nullptr;
  const double* sum_dy_xmu = nullptr;
  const std::int64_t* count = nullptr;
};

template <typename scalar_t>
class BackwardSteps {
 public:
  using acc_t = AccType<scalar_t>;
  struct Scratch {
    std::vector<double> sum_dy, sum_dy_xmu;  // [num_partials, C]
    std::vector<acc_t> scale, shift, coef_x, coef_0;
    const acc_t* mean;
  };

  // Where the schedule has no reduction, apply uses the sums `given`.
  BackwardSteps(
      const Schedule& schedule,
      const BackwardTensors& tensors,
      bool frozen,
      const SumsIn& given,
      const SumsOut& found)
      : schedule_(schedule),
        weight_(tensors.weight),
        bias_(tensors.bias),
        mean_(tensors.saved.mean.const_data_ptr<acc_t>()),
        mean_lo_(tensors.saved.mean_lo.const_data_ptr<acc_t>()),
        invstd_(tensors.saved.invstd.const_data_ptr<acc_t>()),
        frozen_(frozen),
        given_(given),
        found_(found),
        group_dy_(schedule.phases().reduce ? schedule.num_groups() * schedule.n_channel() : 0),
        group_dy_xmu_(group_dy_),
        grad_input_(optional_mutable_data<scalar_t>(tensors.grad_input)),
        grad_residual_(optional_mutable_data<scalar_t>(tensors.grad_residual)) {
    advise_huge_pages(tensors.grad_input);
    advise_huge_pages(tensors.grad_residual);
    args_.grad_output = tensors.grad_output.const_data_ptr<scalar_t>();
    args_.input = tensors.input.const_data_ptr<scalar_t>();
    args_.extra = optional_data<scalar_t>(tensors.extra);
    args_.activation = tensors.activation;
    args_.derivative = tensors.derivative;
  }

  Scratch make_scratch() const {
    const std::int64_t n_channel = schedule_.n_channel();
    const std::vector<double> partials(schedule_.num_partials() * n_channel);
    const std::vector<acc_t> channels(n_channel);
    return {partials, partials, channels, channels, channels, channels, nullptr};
  }

  void prepare(std::int64_t ghost, Scratch& scratch) const {
    const std::int64_t n_channel = schedule_.n_channel();
    scratch.mean = mean_ + ghost * n_channel;
    const std::int64_t first = ghost * n_channel;
    kernel_table().of<scalar_t>().constants(
        {scratch.mean, mean_lo_ + first, invstd_ + first, weight_.data(), bias_.data(),
         scratch.scale.data(), scratch.shift.data()},
        n_channel);
    if (!schedule_.phases().reduce && !frozen_) {
      set_coefficients(
          ghost, Range{0, n_channel}, given_.sum_dy + first, given_.sum_dy_xmu + first,
          static_cast<double>(given_.count[ghost]), scratch);
    }
  }

  void reduce(const Piece& piece, Scratch& scratch) const {
    GradReduceArgs<scalar_t> args;
    set_args(piece, scratch, args);
    const std::int64_t first = piece.partial * schedule_.n_channel() + piece.channel;
    args.sum_dy = scratch.sum_dy.data() + first;
    args.sum_dy_xmu = scratch.sum_dy_xmu.data() + first;
    kernel_table().of<scalar_t>().grad_reduce(args, piece.slab);
  }

  void fold(std::int64_t ghost, std::int64_t group, Range channels, Scratch& scratch) {
    const std::int64_t n_channel = schedule_.n_channel();
    double* const sum_dy = scratch.sum_dy.data();
    double* const sum_dy_xmu = scratch.sum_dy_xmu.data();
    for (std::int64_t p = 1; p < schedule_.num_partials(); ++p) {
      for (std::int64_t c = channels.begin; c < channels.end; ++c) {
        sum_dy[c] += sum_dy[p * n_channel + c];
        sum_dy_xmu[c] += sum_dy_xmu[p * n_channel + c];
      }
    }
    const std::int64_t first = channels.begin;
    const std::int64_t of_ghost = ghost * n_channel + first;
    const std::int64_t of_group = group * n_channel + first;
    kernel_table().of<scalar_t>().grad_fold(
        {sum_dy + first, sum_dy_xmu + first, group_dy_.data() + of_group,
         group_dy_xmu_.data() + of_group, mean_lo_ + of_ghost, invstd_ + of_ghost},
        channels.size());
    set_coefficients(ghost, channels, sum_dy, sum_dy_xmu, schedule_.count(ghost), scratch);
    if (found_.sum_dy != nullptr) {
      std::copy_n(sum_dy + first, channels.size(), found_.sum_dy + of_ghost);
      std::copy_n(sum_dy_xmu + first, channels.size(), found_.sum_dy_xmu + of_ghost);
    }
  }

  void apply(const Piece& piece, Scratch& scratch) const {
    GradApplyArgs<scalar_t> args;
    set_args(piece, scratch, args);
    args.coef_x = frozen_ ? nullptr : scratch.coef_x.data() + piece.channel;
    args.coef_0 = frozen_ ? nullptr : scratch.coef_0.data() + piece.channel;
    args.grad_input = at_offset(grad_input_, piece.offset);
    args.grad_residual = at_offset(grad_residual_, piece.offset);
    args.stream = schedule_.stream(piece);
    args.ahead = args.stream ? piece.ahead : 0;  // else it is in the cache
    kernel_table().of<scalar_t>().grad_apply(args, piece.slab);
  }

  // (C,) in acc_t: sums over the ghosts.
  void parameter_grads(acc_t* grad_weight, acc_t* grad_bias) {
    const std::int64_t n_channel = schedule_.n_channel();
    at::parallel_for(0, n_channel, kGrainElements, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t group = 1; group < schedule_.num_groups(); ++group) {
        for (std::int64_t c = begin; c < end; ++c) {
          group_dy_[c] += group_dy_[group * n_channel + c];
          group_dy_xmu_[c] += group_dy_xmu_[group * n_channel + c];
        }
      }
      for (std::int64_t c = begin; c < end; ++c) {
        grad_weight[c] = static_cast<acc_t>(group_dy_xmu_[c]);
        grad_bias[c] = static_cast<acc_t>(group_dy_[c]);
      }
    });
  }

 private:
  void set_coefficients(
      std::int64_t ghost,
      Range channels,
      const double* sum_dy,
      const double* sum_dy_xmu,
      double count,
      Scratch& scratch) const {
    const std::int64_t first = channels.begin;
    const std::int64_t i = ghost * schedule_.n_channel() + first;
    kernel_table().of<scalar_t>().coefficients(
        {sum_dy + first, sum_dy_xmu + first, count, mean_lo_ + i, invstd_ + i,
         scratch.scale.data() + first, scratch.coef_x.data() + first,
         scratch.coef_0.data() + first},
        channels.size());
  }

  void set_args(const Piece& piece, const Scratch& scratch, GradArgs<scalar_t>& args) const {
    args = args_;
    args.grad_output += piece.offset;
    args.input += piece.offset;
    args.extra = at_offset(args_.extra, piece.offset);
    args.mean = scratch.mean + piece.channel;
    args.scale = scratch.scale.data() + piece.channel;
    args.shift = scratch.shift.data() + piece.channel;
  }

  const Schedule& schedule_;
  GradArgs<scalar_t> args_{};
  ChannelValues<acc_t> weight_;
  ChannelValues<acc_t> bias_;
  const acc_t* mean_;
  const acc_t* mean_lo_;
  const acc_t* invstd_;
  bool frozen_;
  SumsIn given_;
  SumsOut found_;
  std::vector<double> group_dy_, group_dy_xmu_;  // [num_groups, C], the latter times invstd
  scalar_t* grad_input_;
  scalar_t* grad_residual_;
};

Schedule schedule_of(const BackwardTensors& tensors, Phases phases) {
  return {
      tensors.layout, static_cast<std::int64_t>(tensors.input.element_size()),
      tensors.saved.num_ghosts(), phases};
}

}  // namespace

void CpuBackend::backward(
    const BackwardTensors& tensors,
    bool frozen,
    const at::Tensor& grad_weight,
    const at::Tensor& grad_bias) const {
  const Schedule schedule = schedule_of(tensors, {/*reduce=*/true, tensors.applies()});
  dispatch_dtype(tensors.input.scalar_type(), [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = AccType<scalar_t>;
    BackwardSteps<scalar_t> steps(schedule, tensors, frozen, SumsIn{}, SumsOut{});
    run_steps(schedule, steps);
    steps.parameter_grads(
        grad_weight.mutable_data_ptr<acc_t>(), grad_bias.mutable_data_ptr<acc_t>());
  });
}

void CpuBackend::grad_reduce(const BackwardTensors& tensors, const GradSumTensors& sums) const {
  const Schedule schedule = schedule_of(tensors, {/*reduce=*/true, /*apply=*/false});
  const SumsOut found{
      sums.sum_dy.mutable_data_ptr<double>(), sums.sum_dy_xmu.mutable_data_ptr<double>()};
  dispatch_dtype(tensors.input.scalar_type(), [&](auto tag) {
    BackwardSteps<decltype(tag)> steps(schedule, tensors, /*frozen=*/false, SumsIn{}, found);
    run_steps(schedule, steps);
  });
}

void CpuBackend::grad_apply(
    const BackwardTensors& tensors, const std::optional<GradSumTensors>& sums) const {
  const Schedule schedule = schedule_of(tensors, {/*reduce=*/false, /*apply=*/true});
  SumsIn given;
  if (sums.has_value()) {
    given = {
        sums->sum_dy.const_data_ptr<double>(), sums->sum_dy_xmu.const_data_ptr<double>(),
        sums->count.const_data_ptr<std::int64_t>()};
  }
  dispatch_dtype(tensors.input.scalar_type(), [&](auto tag) {
    BackwardSteps<decltype(tag)> steps(
        schedule, tensors, /*frozen=*/!sums.has_value(), given, SumsOut{});
    run_steps(schedule, steps);
  });
}

}  // namespace bnext::cpu
