// The reduction of the forward on the CPU: partial results, and how those of ghosts are merged.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "schedule.h"
#include "tensors.h"

namespace bnext::cpu {

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

// What the means of a reduction are relative to, one value per channel, where they are (kHasBase).
using Base = std::vector<double>;

// The partial results of one ghost: rows of moments, and what their means are relative to.
struct Partials {
  MomentRows moments;
  Base base;
};

template <typename scalar_t>
class Reduce {
 public:
  Reduce(const Schedule& schedule, const at::Tensor& input)
      : schedule_(schedule),
        input_(input.const_data_ptr<scalar_t>()),
        groups_(schedule.phases().reduce ? schedule.num_groups() : 0, schedule.n_channel()),
        batch_base_(schedule.phases().reduce ? base_of(0) : Base()) {}

  Partials make_partials() const {
    return {MomentRows(schedule_.num_partials(), schedule_.n_channel()), {}};
  }

  void prepare(std::int64_t ghost, Partials& partials) const { partials.base = base_of(ghost); }

  void reduce(const Piece& piece, Partials& partials) const {
    const MomentRows& moments = partials.moments;
    kernel_table().of<scalar_t>().reduce(
        {input_ + piece.offset, base_at(partials, piece.channel),
         moments.mean(piece.partial) + piece.channel, moments.m2(piece.partial) + piece.channel},
        piece.slab);
  }

  // Merges the partials of a ghost into the first.
  void merge(std::int64_t ghost, Range channels, Partials& partials) const {
    double before = schedule_.partial_count(ghost, 0);
    for (std::int64_t p = 1; p < schedule_.num_partials(); ++p) {
      const double count = schedule_.partial_count(ghost, p);
      partials.moments.merge(channels, 0, before, partials.moments, p, count);
      before += count;
    }
  }

  // Adds a merged ghost to those of its group before it; the partials are used up.
  void add_to_group(
      std::int64_t ghost, std::int64_t group, Range channels, Partials& partials) const {
    if constexpr (kHasBase<scalar_t>) {
      for (std::int64_t c = channels.begin; c < channels.end; ++c) {
        partials.moments.mean(0)[c] += partials.base[c] - batch_base_[c];
      }
    }
    const std::int64_t first = schedule_.first_ghost(group);
    groups_.merge(
        channels, group, ghost == first ? 0 : schedule_.count(first, ghost), partials.moments, 0,
        schedule_.count(ghost));
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
      const double base = kHasBase<scalar_t> ? batch_base_[c] : 0.0;
      batch[c] = {total, base + groups_.mean(0)[c], groups_.m2(0)[c]};
    }
    return batch;
  }

  static const double* base_at(const Partials& partials, std::int64_t channel) {
    return kHasBase<scalar_t> ? partials.base.data() + channel : nullptr;
  }

 private:
  // The first value of each channel in a ghost.
  Base base_of(std::int64_t ghost) const {
    Base base;
    if constexpr (kHasBase<scalar_t>) {
      base.resize(schedule_.n_channel());
      const scalar_t* const first = input_ + schedule_.first_offset(ghost);
      for (std::int64_t c = 0; c < schedule_.n_channel(); ++c) {
        base[c] = finite_pivot(first[c * schedule_.channel_stride()]);
      }
    }
    return base;
  }

  const Schedule& schedule_;
  const scalar_t* input_;
  MomentRows groups_;  // relative to batch_base_
  Base batch_base_;
};

}  // namespace bnext::cpu
