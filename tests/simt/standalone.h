// A small training step of relu(batch_norm(input)), solved in double by the definition.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../../csrc/core/layout.h"

namespace standalone {

using bnext::Layout;
using bnext::Order;
using bnext::Range;

constexpr double kEps = 1e-3, kMomentum = 0.3;

struct Problem {
  Layout layout;
  std::int64_t num_ghosts;
  std::vector<double> x, dy, weight, bias;  // as rounded to the kernels' types
  std::vector<double> y, mean, invstd, running_mean, running_var, dx, dweight, dbias;

  std::size_t index(std::int64_t n, std::int64_t c, std::int64_t s) const {
    const Layout& l = layout;
    return static_cast<std::size_t>(
        l.order == Order::kRows ? (n * l.spatial + s) * l.n_channel + c
                                : (n * l.n_channel + c) * l.spatial + s);
  }

  template <typename F>
  void each(Range samples, std::int64_t c, F&& f) const {
    for (std::int64_t n = samples.begin; n < samples.end; ++n) {
      for (std::int64_t s = 0; s < layout.spatial; ++s) {
        f(index(n, c, s));
      }
    }
  }

  // Mean and mean square deviation.
  std::pair<double, double> moments(Range samples, std::int64_t c) const {
    const double count = static_cast<double>(samples.size() * layout.spatial);
    double mean = 0, var = 0;
    each(samples, c, [&](std::size_t i) { mean += x[i] / count; });
    each(samples, c, [&](std::size_t i) { var += (x[i] - mean) * (x[i] - mean) / count; });
    return {mean, var};
  }

  template <typename scalar_t>
  static Problem make(const Layout& layout, std::int64_t num_ghosts) {
    Problem p{};
    p.layout = layout;
    p.num_ghosts = num_ghosts;
    unsigned state = 1;
    const auto draw = [&] {  // about normal: three uniform numbers of a linear congruence
      double sum = 0;
      for (int i = 0; i < 3; ++i) {
        state = state * 1664525u + 1013904223u;
        sum += static_cast<double>(state >> 8) / (1 << 24) - 0.5;
      }
      return 2 * sum;
    };
    const auto rounded = [](double value) {
      return static_cast<double>(
          static_cast<float>(static_cast<scalar_t>(static_cast<float>(value))));
    };
    for (std::int64_t i = 0; i < layout.numel(); ++i) {
      p.x.push_back(rounded(5 + 2 * draw()));
      p.dy.push_back(rounded(0.25 + draw()));
    }
    for (std::int64_t c = 0; c < layout.n_channel; ++c) {
      p.weight.push_back(static_cast<float>(1 + 0.5 * draw()));
      p.bias.push_back(static_cast<float>(draw()));
    }
    p.solve();
    return p;
  }

  void solve() {
    y.resize(x.size());
    dx.resize(x.size());
    mean.resize(static_cast<std::size_t>(num_ghosts * layout.n_channel));
    invstd.resize(mean.size());
    const double all = static_cast<double>(layout.n_batch * layout.spatial);
    for (std::int64_t c = 0; c < layout.n_channel; ++c) {
      const auto channel = static_cast<std::size_t>(c);
      const auto [batch_mean, batch_var] = moments({0, layout.n_batch}, c);
      running_mean.push_back(kMomentum * batch_mean);  // from 0 and 1
      running_var.push_back(1 - kMomentum + kMomentum * batch_var * all / (all - 1));
      dweight.push_back(0);
      dbias.push_back(0);
      for (std::int64_t g = 0; g < num_ghosts; ++g) {
        const Range samples = bnext::split_range(layout.n_batch, num_ghosts, g);
        const double count = static_cast<double>(samples.size() * layout.spatial);
        const auto [m, var] = moments(samples, c);
        const double inverse = 1 / std::sqrt(var + kEps);
        const auto at = static_cast<std::size_t>(g * layout.n_channel + c);
        mean[at] = m;
        invstd[at] = inverse;
        double sum = 0, sum_xhat = 0;
        each(samples, c, [&, m = m](std::size_t i) {
          const double xhat = (x[i] - m) * inverse;
          const double z = xhat * weight[channel] + bias[channel];
          y[i] = z > 0 ? z : 0;
          dy[i] = std::abs(z) < 1e-3 ? 0 : dy[i];  // the kernel may be on the other side of 0
          sum += z > 0 ? dy[i] : 0;
          sum_xhat += z > 0 ? dy[i] * xhat : 0;
        });
        each(samples, c, [&, m = m](std::size_t i) {
          const double xhat = (x[i] - m) * inverse;
          const double dz = y[i] > 0 ? dy[i] : 0;
          dx[i] = weight[channel] * inverse * (dz - sum / count - xhat * sum_xhat / count);
        });
        dweight[channel] += sum_xhat;
        dbias[channel] += sum;
      }
    }
  }
};

}  // namespace standalone
