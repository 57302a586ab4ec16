// The arithmetic of one element, forward and backward, and of the C-sized constants it needs.
// docs/math.md derives the formulas.
#pragma once

#include <cmath>

#include "host_device.h"
#include "math.h"
#include "welford.h"

namespace bnext {

// The statistics that normalise one channel. The mean is carried as hi + lo: at mean 1e4 a single
// float is off by up to 5e-4, as much as the output may be.
template <typename acc_t>
struct ChannelStats {
  acc_t mean;
  acc_t mean_lo;
  acc_t invstd;
};

template <typename acc_t>
BNEXT_HD inline acc_t inverse_std(double variance, double eps) {
  return static_cast<acc_t>(1.0 / std::sqrt(variance + eps));
}

// Whether the means of a reduction are kept relative to a base, the first value of the channel in
// the ghost. A double near 1e12 has four digits after the point, which the differences of two means
// would lose; the means of all other types are doubles, which have digits to spare.
template <typename scalar_t>
constexpr bool kHasBase = std::is_same_v<scalar_t, double>;

// base + mean as hi + lo; the base counts for doubles only.
template <typename acc_t>
BNEXT_HD inline void split_mean(double base, double mean, acc_t& high, acc_t& low) {
  acc_t rest;
  if constexpr (kHasBase<acc_t>) {
    // The error of a sum is a double: D. E. Knuth, The Art of Computer Programming 2, 4.2.2,
    // theorem B.
    high = base + mean;
    const double added = high - base;
    rest = (base - (high - added)) + (mean - added);
  } else {
    high = static_cast<acc_t>(mean);
    rest = static_cast<acc_t>(mean - static_cast<double>(high));
  }
  low = Math<acc_t>::where_nan(rest, acc_t(0), rest);  // inf - inf
}

template <typename acc_t>
BNEXT_HD inline ChannelStats<acc_t> channel_stats(
    const Welford<double>& welford, double eps, double base = 0) {
  ChannelStats<acc_t> stats;
  split_mean(base, welford.mean, stats.mean, stats.mean_lo);
  stats.invstd = inverse_std<acc_t>(welford.biased_variance(), eps);
  return stats;
}

// output = activation((x - mean) * scale + shift + residual). Never x * scale + shift', which
// cancels at large means.
template <typename acc_t>
struct ForwardConstants {
  acc_t mean;
  acc_t scale;
  acc_t shift;
};

template <typename acc_t>
BNEXT_HD inline ForwardConstants<acc_t> forward_constants(
    const ChannelStats<acc_t>& stats, acc_t weight, acc_t bias) {
  const acc_t scale = stats.invstd * weight;
  return {stats.mean, scale, Math<acc_t>::fmadd(-stats.mean_lo, scale, bias)};
}

// xmu = x - mean.
template <typename T>
BNEXT_HD inline T normalize_centred(T xmu, T scale, T shift) {
  return Math<T>::fmadd(xmu, scale, shift);
}

template <typename T>
BNEXT_HD inline T normalize(T x, T mean, T scale, T shift) {
  return normalize_centred(x - mean, scale, shift);
}

// What backward needs of all the values of a channel.
struct GradSums {
  double sum_dy = 0;
  double sum_dy_xmu = 0;

  // The kernels sum dy * (x - mean_hi), since x - mean_hi is exact or nearly so; the low part of
  // the mean follows once per channel.
  BNEXT_HD void subtract_mean_lo(double mean_lo) {
    const double low = mean_lo * sum_dy;
    sum_dy_xmu -= Math<double>::where_nan(low - low, 0.0, low);  // 0 * inf would be NaN
  }
};

// grad_input = scale * dy + (x - mean) * coef_x + coef_0, dy the gradient after the activation.
template <typename acc_t>
struct BackwardConstants {
  acc_t coef_x;
  acc_t coef_0;
};

// From the means of dy and of dy * (x - mean), about the exact mean (hi + lo).
template <typename acc_t>
BNEXT_HD inline BackwardConstants<acc_t> backward_constants(
    const ChannelStats<acc_t>& stats, acc_t scale, double mean_dy, double mean_dy_xmu) {
  const double invstd = stats.invstd;
  const double coef_x = -double(scale) * invstd * invstd * mean_dy_xmu;
  const double coef_0 = -double(scale) * mean_dy - double(stats.mean_lo) * coef_x;
  return {static_cast<acc_t>(coef_x), static_cast<acc_t>(coef_0)};
}

template <typename acc_t>
BNEXT_HD inline BackwardConstants<acc_t> backward_constants(
    const ChannelStats<acc_t>& stats, acc_t scale, double count, const GradSums& sums) {
  return backward_constants(stats, scale, sums.sum_dy / count, sums.sum_dy_xmu / count);
}

template <typename T>
BNEXT_HD inline T grad_input_centred(T dy, T xmu, T scale, T coef_x, T coef_0) {
  return Math<T>::fmadd(dy, scale, Math<T>::fmadd(xmu, coef_x, coef_0));
}

template <typename T>
BNEXT_HD inline T grad_input(T dy, T x, T mean, T scale, T coef_x, T coef_0) {
  return grad_input_centred(dy, x - mean, scale, coef_x, coef_0);
}

}  // namespace bnext
