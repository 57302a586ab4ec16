// csrc/core/math.h, activation.h and normalize.h against their formulas in long double. u is the
// unit roundoff of T.
#include "core/activation.h"
#include "core/math.h"
#include "core/normalize.h"

#include "core_cases.h"

namespace core_cases {
namespace {

using bnext::ChannelStats;
using bnext::GradSums;
using bnext::LeakyRelu;
using bnext::Math;
using bnext::NoActivation;
using bnext::Relu;
using bnext::Relu6;
using bnext::Silu;
using bnext::Welford;

template <typename T>
void math() {
  const T e = std::numeric_limits<T>::epsilon();
  check_equal(Math<T>::fmadd(1 + e, 1 - e, -1), -e * e, "fused (1 + e) (1 - e) - 1");
  check_equal(Math<T>::constant(0.1), T(0.1), "constant");
  check_close(Math<T>::exp(T(2.5)), std::exp(2.5L), 2 * kUnit<T> * std::exp(2.5L), "exp");
  struct {
    T x;
    bool le_zero, gt_zero, nan;
  } const rows[] = {{T(-2), true, false, false},   {T(-0.0), true, false, false},
                    {T(0), true, false, false},    {T(2), false, true, false},
                    {kInf<T>, false, true, false}, {kNaN<T>, false, false, true}};
  for (const auto& [x, le_zero, gt_zero, nan] : rows) {
    check_equal(Math<T>::where_le_zero(x, 1, 0), T(le_zero), "where_le_zero");
    check_equal(Math<T>::where_gt_zero(x, 1, 0), T(gt_zero), "where_gt_zero");
    check_equal(Math<T>::where_nan(x, 1, 0), T(nan), "where_nan");
  }
}

// Equal, where NaN equals NaN.
template <typename T>
void check_same(T actual, T expected, const std::string& what, Where where = Where::current()) {
  if (std::isnan(expected)) {
    check_nan(actual, what, where);
  } else {
    check_equal(actual, expected, what, where);
  }
}

// At 0 the derivatives are PyTorch's, as are those at infinities and NaN (torch 2.14.1).
template <typename T>
void piecewise_activations() {
  const T inf = kInf<T>, nan = kNaN<T>, a = T(0.01), max = std::numeric_limits<T>::max();
  const T below_6 = std::nextafter(T(6), T(0)), above_6 = std::nextafter(T(6), T(7));
  struct {
    T z, relu, relu_grad, leaky, leaky_grad, relu6, relu6_grad;
  } const rows[] = {
      {0, 0, 0, 0, a, 0, 0},         {T(-0.0), 0, 0, 0, a, 0, 0},
      {3, 3, 1, 3, 1, 3, 1},         {below_6, below_6, 1, below_6, 1, below_6, 1},
      {6, 6, 1, 6, 1, 6, 0},         {above_6, above_6, 1, above_6, 1, 6, 0},
      {-3, 0, 0, -3 * a, a, 0, 0},   {inf, inf, 1, inf, 1, 6, 0},
      {-inf, 0, 0, -inf, a, 0, 0},   {max, max, 1, max, 1, 6, 0},
      {nan, nan, 1, nan, a, nan, 1},
  };
  const T grad = 8;
  for (const auto& row : rows) {
    const std::string at = " at " + std::to_string(row.z);
    check_same(NoActivation::forward(row.z), row.z, "identity" + at);
    check_equal(NoActivation::backward(grad, row.z), grad, "identity'" + at);
    check_same(Relu::forward(row.z), row.relu, "relu" + at);
    check_equal(Relu::backward(grad, row.z), grad * row.relu_grad, "relu'" + at);
    check_same(Relu6::forward(row.z), row.relu6, "relu6" + at);
    check_equal(Relu6::backward(grad, row.z), grad * row.relu6_grad, "relu6'" + at);
    check_same(LeakyRelu::forward(row.z), row.leaky, "leaky_relu" + at);
    check_equal(LeakyRelu::backward(grad, row.z), grad * row.leaky_grad, "leaky_relu'" + at);
    // The output may stand for z.
    check_equal(Relu::backward(grad, row.relu), grad * row.relu_grad, "relu'(y)" + at);
    check_equal(LeakyRelu::backward(grad, row.leaky), grad * row.leaky_grad, "leaky'(y)" + at);
  }
  check_nan(Relu::backward(nan, T(1)), "relu' of a NaN gradient");
  check_nan(LeakyRelu::backward(nan, T(-1)), "leaky_relu' of a NaN gradient");
}

// exp, 1 + exp and the division: 4 roundings of z s(z). Backward: 4 of the sigmoid s, of which 1 -
// s makes 4 u s z, and 4 more of s (1 + |z| (1 - s)). Results below the normal numbers are lost
// where exp overflows.
template <typename T>
void silu_matches_its_formula() {
  const Exact u = kUnit<T>, tiny = std::numeric_limits<T>::min();
  for (Exact exact :
       {-100.L, -88.L, -20.L, -1.2784645L, -1.L, -1e-3L, -0.L, 1e-8L, 0.5L, 1.L, 17.L, 30.L,
        100.L}) {
    const T z = static_cast<T>(exact);
    const Exact s = 1 / (1 + std::exp(-static_cast<Exact>(z)));
    const std::string at = " at " + std::to_string(z);
    check_close(Silu::forward(z), z * s, 4 * u * std::fabs(z * s) + tiny, "silu" + at);
    check_close(
        Silu::backward(T(3), z), 3 * s * (1 + z * (1 - s)),
        3 * 8 * u * s * (1 + std::fabs(z)) + tiny * 100, "silu'" + at);
  }
  check_equal(Silu::forward(T(100)), T(100), "silu(100)");
  check_equal(Silu::backward(T(3), T(100)), T(3), "silu'(100)");
  check_equal(Silu::backward(T(3), T(0)), T(1.5), "silu'(0)");
  // As in PyTorch (2.14.1).
  check_equal(Silu::forward(kInf<T>), kInf<T>, "silu(inf)");
  check_nan(Silu::forward(-kInf<T>), "silu(-inf)");
  for (T z : {kInf<T>, -kInf<T>, kNaN<T>}) {
    check_nan(Silu::backward(T(3), z), "silu' of " + std::to_string(z));
  }
  check_nan(Silu::forward(kNaN<T>), "silu(NaN)");
}

// Central differences: h^2/6 max|f'''| and a rounding of each f over h. |silu'''| < 1 everywhere.
template <typename Act>
void check_derivative(const std::string& name) {
  const Exact h = std::ldexp(1.0L, -20), u = kUnit<Exact>;
  for (int i = -80; i <= 80; ++i) {
    if (i == 0 || i == 24) {
      continue;  // relu, leaky_relu and relu6 have corners there
    }
    const Exact z = i * 0.25L;
    const Exact slope = (Act::forward(z + h) - Act::forward(z - h)) / (2 * h);
    check_close(
        Act::backward(1.0L, z), slope, h * h / 6 + 8 * u * (std::fabs(z) + 1) / h,
        name + "' at " + std::to_string(z));
  }
}

void derivatives() {
  check_derivative<NoActivation>("identity");
  check_derivative<Relu>("relu");
  check_derivative<Relu6>("relu6");
  check_derivative<LeakyRelu>("leaky_relu");
  check_derivative<Silu>("silu");
}

void dispatch_activation() {
  using bnext::Activation;
  const struct {
    Activation activation;
    double at_minus_2;
  } rows[] = {
      {Activation::kNone, -2},
      {Activation::kRelu, 0},
      {Activation::kRelu6, 0},
      {Activation::kLeakyRelu, -0.02},
      {Activation::kSilu, -2 / (1 + std::exp(2.0))}};
  for (const auto& row : rows) {
    double found = kNaN<double>;
    bnext::dispatch_activation(row.activation, [&](auto act) { found = act.forward(-2.0); });
    check_equal(found, row.at_minus_2, "activation " + std::to_string(int(row.activation)));
  }
}

// mean_lo is below u |mean|, and its own rounding below u^2 |mean|.
void channel_stats_keep_the_mean() {
  for (int exponent = -60; exponent <= 60; exponent += 5) {
    for (double x : normal_values<double>(100, 0, std::ldexp(1, exponent), exponent + 60)) {
      const auto stats = bnext::channel_stats<float>({10, x, 40}, 1e-5);
      check_equal(stats.mean, static_cast<float>(x), "mean");
      const Exact both = Exact(stats.mean) + stats.mean_lo;
      check_close(both, x, std::ldexp(std::fabs(x), -48), "mean + mean_lo");
      check_close(stats.invstd, 1 / std::sqrt(4.00001L), kUnit<float>, "invstd");
      const auto in_double = bnext::channel_stats<double>({10, x, 40}, 1e-5);
      check_equal(in_double.mean, x, "mean in double");
      check_equal(in_double.mean_lo, 0.0, "mean_lo in double");
      check_close(in_double.invstd, 1 / std::sqrt(4.00001L), 2 * kUnit<double>, "invstd in double");
    }
  }
}

// The outputs are then those of (x - mean) * invstd, with no NaN of our own.
template <typename T>
void channel_stats_not_finite() {
  for (double mean : {kInf<double>, -kInf<double>}) {
    const auto stats = bnext::channel_stats<T>({3, mean, kNaN<double>}, 1e-5);
    check_equal(stats.mean, static_cast<T>(mean), "mean");
    check_equal(stats.mean_lo, T(0), "mean_lo");
    check_nan(stats.invstd, "invstd");
  }
  const auto stats = bnext::channel_stats<T>({3, kNaN<double>, kNaN<double>}, 1e-5);
  check_nan(stats.mean, "mean");
  check_equal(stats.mean_lo, T(0), "mean_lo");
  check_close(bnext::inverse_std<T>(0, 1e-4), 100, 300 * kUnit<T>, "invstd of variance 0");
  check_equal(bnext::inverse_std<T>(kInf<double>, 1e-5), T(0), "invstd of variance inf");
}

// A mean between two floats, values around it, and the gradients that meet them.
template <typename T>
struct Channel {
  static constexpr double kEps = 1e-5;
  static constexpr int kSize = 500;

  explicit Channel(double near) : mean(near * (1 + 0.4 * 0x1p-24)) {
    x = normal_values<T>(kSize, mean, 2, 1);
    dy = normal_values<T>(kSize, 0.5, 1, 2);
    stats = bnext::channel_stats<T>(Welford<double>{kSize, mean, 4 * kSize}, kEps);
    for (int i = 0; i < kSize; ++i) {
      dy[i] += static_cast<T>(deviation(i));  // so that the sums below are not near 0
      sum_dy += dy[i];
      sum_dy_xmu += dy[i] * deviation(i);
    }
  }

  Exact deviation(int i) const { return x[i] - static_cast<Exact>(mean); }

  double mean;
  T weight = T(1.7), bias = T(-0.3);
  std::vector<T> x, dy;
  ChannelStats<T> stats;
  Exact invstd = 1 / std::sqrt(4 + static_cast<Exact>(kEps));
  Exact scale = weight * invstd;
  Exact sum_dy = 0, sum_dy_xmu = 0;
};

// The largest error in units of the bound of docs/math.md, section 5 (6 u where it has 4 u: in
// double the square root and the division err by u too), and the largest error.
template <typename T>
std::pair<Exact, Exact> forward_error(const Channel<T>& channel, const ChannelStats<T>& stats) {
  const auto [mean, scale, shift] = bnext::forward_constants(stats, channel.weight, channel.bias);
  const Exact u = kUnit<T>, lo = channel.mean - static_cast<Exact>(channel.stats.mean);
  std::pair<Exact, Exact> worst{0, 0};
  for (int i = 0; i < channel.kSize; ++i) {
    const Exact term = channel.deviation(i) * channel.scale, expected = term + channel.bias;
    const Exact error = std::fabs(bnext::normalize(channel.x[i], mean, scale, shift) - expected);
    const Exact bound = u * (6 * std::fabs(term) + std::fabs(channel.bias) + std::fabs(expected) +
                             (3 * std::fabs(lo) + u * std::fabs(channel.mean)) * channel.scale);
    worst = {std::max(worst.first, error / bound), std::max(worst.second, error)};
  }
  return worst;
}

template <typename T>
void normalize_at_offsets() {
  for (double near : {0.0, -3.0, 1e4, -1e6}) {
    const Channel<T> channel(near);
    check_close(forward_error(channel, channel.stats).first, 0, 1, "error of the output / bound");
  }
}

// One element: 16 roundings of each term are enough for coef_x (4 operations in double, the
// roundings of scale and of invstd twice, its own), two fused multiply-adds and x - mean_hi.
template <typename T>
std::pair<Exact, Exact> backward_error(const Channel<T>& channel, const ChannelStats<T>& stats) {
  const double n = channel.kSize;
  const T scale = bnext::forward_constants(stats, channel.weight, channel.bias).scale;
  const GradSums sums{static_cast<double>(channel.sum_dy), static_cast<double>(channel.sum_dy_xmu)};
  const auto [coef_x, coef_0] = bnext::backward_constants(stats, scale, n, sums);
  const Exact u = kUnit<T>, lo = channel.mean - static_cast<Exact>(channel.stats.mean);
  const Exact by_x = channel.scale * channel.invstd * channel.invstd * channel.sum_dy_xmu / n;
  const Exact by_1 = channel.scale * channel.sum_dy / n;
  std::pair<Exact, Exact> worst{0, 0};
  for (int i = 0; i < channel.kSize; ++i) {
    const Exact d = channel.deviation(i), direct = channel.scale * channel.dy[i];
    const T found =
        bnext::grad_input(channel.dy[i], channel.x[i], stats.mean, scale, coef_x, coef_0);
    const Exact error = std::fabs(found - (direct - by_1 - d * by_x));
    const Exact bound = 16 * u *
                            (std::fabs(direct) + std::fabs(by_1) +
                             (std::fabs(d) + 2 * std::fabs(lo)) * std::fabs(by_x)) +
                        u * u * std::fabs(channel.mean * by_x);
    worst = {std::max(worst.first, error / bound), std::max(worst.second, error)};
  }
  return worst;
}

template <typename T>
void grad_input_at_offsets() {
  for (double near : {0.0, -3.0, 1e4, -1e6}) {
    const Channel<T> channel(near);
    check_close(
        backward_error(channel, channel.stats).first, 0, 1, "error of the gradient / bound");
  }
}

// What the low part is for: without it every element is off by mean_lo, of 0.4 u |mean| here.
void mean_lo_is_needed() {
  for (double near : {1e4, -1e6}) {
    const Channel<float> channel(near);
    ChannelStats<float> hi_only = channel.stats;
    hi_only.mean_lo = 0;
    check(
        forward_error(channel, hi_only).second > 100 * forward_error(channel, channel.stats).second,
        "an output without mean_lo that is 100 times worse");
    check(
        backward_error(channel, hi_only).second >
            100 * backward_error(channel, channel.stats).second,
        "a gradient without mean_lo that is 100 times worse");
  }
}

// The sums about mean_hi, in three parts, and their correction: one rounding per term and sum.
void grad_sums() {
  const Channel<float> channel(1e4);
  const double hi = channel.stats.mean, lo = channel.stats.mean_lo;
  GradSums sums;
  Exact size = 0;
  for (int part = 0; part < 3; ++part) {
    GradSums of_part;
    for (int i = part; i < channel.kSize; i += 3) {
      of_part.sum_dy += channel.dy[i];
      of_part.sum_dy_xmu += channel.dy[i] * (channel.x[i] - hi);
      size += std::fabs(channel.dy[i]) * (1 + std::fabs(channel.x[i] - hi));
    }
    sums.sum_dy += of_part.sum_dy;
    sums.sum_dy_xmu += of_part.sum_dy_xmu;
  }
  const Exact bound = channel.kSize * kUnit<double> * size;
  check_close(sums.sum_dy, channel.sum_dy, bound, "sum_dy");
  sums.subtract_mean_lo(lo);
  check_close(sums.sum_dy, channel.sum_dy, bound, "sum_dy after the correction");
  const Exact missing = std::fabs((channel.mean - (Exact(hi) + lo)) * channel.sum_dy);
  check_close(sums.sum_dy_xmu, channel.sum_dy_xmu, bound + 2 * missing, "sum_dy_xmu");
  check(std::fabs(lo * channel.sum_dy) > 1000 * (bound + missing), "a correction to be seen");
}

}  // namespace

std::vector<Case> element_cases() {
  return {
      {"math_float", math<float>},
      {"math_double", math<double>},
      {"piecewise_activations_float", piecewise_activations<float>},
      {"piecewise_activations_double", piecewise_activations<double>},
      {"silu_float", silu_matches_its_formula<float>},
      {"silu_double", silu_matches_its_formula<double>},
      {"derivatives", derivatives},
      {"dispatch_activation", dispatch_activation},
      {"channel_stats_keep_the_mean", channel_stats_keep_the_mean},
      {"channel_stats_not_finite_float", channel_stats_not_finite<float>},
      {"channel_stats_not_finite_double", channel_stats_not_finite<double>},
      {"normalize_at_offsets_float", normalize_at_offsets<float>},
      {"normalize_at_offsets_double", normalize_at_offsets<double>},
      {"grad_input_at_offsets_float", grad_input_at_offsets<float>},
      {"grad_input_at_offsets_double", grad_input_at_offsets<double>},
      {"mean_lo_is_needed", mean_lo_is_needed},
      {"grad_sums", grad_sums},
  };
}

}  // namespace core_cases
