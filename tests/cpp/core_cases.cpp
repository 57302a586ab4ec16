// The C++ cases of csrc/core/ as a Python module: names() and run(name). Here are those of
// running_stats.h and layout.h; tests/project/test_core.py builds the module and runs them all.
#include "core_cases.h"

#include <pybind11/pybind11.h>

#include "core/layout.h"
#include "core/running_stats.h"

namespace core_cases {
namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

// Of n = 4 values with M2 = 6: biased 1.5, unbiased 2.
constexpr bnext::Welford<double> kBatch{4, 5, 6};

template <typename T>
void running_stats_one_step() {
  for (double factor : {0.0, 0.1, 0.5, 1.0, -0.1, 1.5}) {
    for (T running : {T(0), T(0.7), T(-1e6)}) {
      T mean = running, var = running;
      bnext::update_running_stats(kBatch, factor, mean, var);
      const Exact f = factor, r = running, u = kUnit<T>;
      // Three roundings in double, and one to the type of the buffer.
      const auto bound = [&](Exact value, Exact result) {
        return u * std::fabs(result) +
               3 * kUnit<double> * (std::fabs(f * value) + std::fabs((1 - f) * r));
      };
      const Exact mean_truth = f * 5 + (1 - f) * r, var_truth = f * 2 + (1 - f) * r;
      check_close(mean, mean_truth, bound(5, mean_truth), "running_mean");
      check_close(var, var_truth, bound(2, var_truth), "running_var");
    }
  }
  for (T running : {T(0.7), T(-1e6), std::numeric_limits<T>::max()}) {
    T mean = running, var = running;
    bnext::update_running_stats(kBatch, 0, mean, var);
    check_equal(mean, running, "running_mean at factor 0");
    check_equal(var, running, "running_var at factor 0");
    bnext::update_running_stats(kBatch, 1, mean, var);
    check_equal(mean, T(5), "running_mean at factor 1");
    check_equal(var, T(2), "running_var at factor 1");
  }
}

// In float the product and the sum would round too: a tenth of the steps would end beside the
// nearest float.
void running_stats_round_once() {
  float running = 0.3f, var = 1;
  for (double value : normal_values<double>(1000, 3, 1, 1)) {
    const Exact exact = 0.1 * Exact(value) + (1.0 - 0.1) * Exact(running);
    bnext::update_running_stats(bnext::Welford<double>{2, value, 1}, 0.1, running, var);
    check_equal(running, static_cast<float>(exact), "running_mean");
  }
}

// A factor of 1 / t makes the plain average: each step adds at most 3 u of the largest value.
void running_stats_cumulative() {
  const auto values = normal_values<double>(1000, 1e4, 1, 1);
  double mean = -77, var = 33;  // the first batch replaces what was there
  for (std::size_t t = 1; t <= values.size(); ++t) {
    const double factor = bnext::average_factor(true, 0.1, t);
    check_equal(factor, 1.0 / static_cast<double>(t), "cumulative factor");
    const auto m2 = static_cast<double>(t);
    bnext::update_running_stats(bnext::Welford<double>{2, values[t - 1], m2}, factor, mean, var);
  }
  const Exact bound = 3 * kUnit<double> * 1000;
  check_close(mean, exact_moments(values).mean, bound * max_abs(values), "average of means");
  check_close(var, 500.5L, bound * 1000, "average of variances");
  for (double momentum : {0.1, 0.0, 1.0, -0.3}) {
    check_equal(bnext::average_factor(false, momentum, 7), momentum, "factor with a momentum");
  }
}

void split_range_is_tensor_split() {
  for (std::int64_t total = 0; total <= 40; ++total) {
    for (std::int64_t pieces = 1; pieces <= 40; ++pieces) {
      std::vector<std::int64_t> sizes(pieces, 0);
      for (std::int64_t item = 0; item < total; ++item) {
        ++sizes[item % pieces];  // dealt out one by one
      }
      std::int64_t begin = 0;
      for (std::int64_t i = 0; i < pieces; ++i) {
        const auto range = bnext::split_range(total, pieces, i);
        check_equal(range.begin, begin, "begin");
        check_equal(range.size(), sizes[i], "size");
        begin += sizes[i];
      }
      check_equal(begin, total, "the end of the last piece");
    }
  }
}

// The ranges around a few places meet, are as long as each other up to 1, and stay within 0..total.
void split_range_does_not_overflow() {
  for (std::int64_t total : {kMax, kMax - 1, std::int64_t(1) << 62, (std::int64_t(1) << 40) + 3}) {
    for (std::int64_t pieces :
         {std::int64_t(1), std::int64_t(2), std::int64_t(7), std::int64_t(1) << 31,
          (std::int64_t(1) << 62) + 1, kMax}) {
      const auto piece = [&](std::int64_t i) { return bnext::split_range(total, pieces, i); };
      check_equal<std::int64_t>(piece(0).begin, 0, "the first begin");
      check_equal(piece(pieces - 1).end, total, "the last end");
      const std::int64_t longer = total % pieces;
      for (std::int64_t i : {std::int64_t(0), longer - 1, longer, pieces / 2, pieces - 2}) {
        if (i < 0 || i + 1 >= pieces) {
          continue;
        }
        check_equal(piece(i).end, piece(i + 1).begin, "the end of a piece, beside the next begin");
        check_equal(piece(i).size(), total / pieces + (i < longer), "size");
        check(piece(i).begin >= 0 && piece(i).begin <= total, "a begin within 0..total");
      }
    }
  }
}

void ceil_div() {
  for (std::int64_t a = 0; a <= 60; ++a) {
    for (std::int64_t b = 1; b <= 60; ++b) {
      std::int64_t expected = 0;
      while (expected * b < a) {
        ++expected;
      }
      check_equal(bnext::ceil_div(a, b), expected, "ceil_div");
    }
  }
  check_equal(bnext::ceil_div(kMax, 1), kMax, "max / 1");
  check_equal(bnext::ceil_div(kMax, 2), std::int64_t(1) << 62, "max / 2");
  check_equal<std::int64_t>(bnext::ceil_div(kMax, kMax), 1, "max / max");
  check_equal<std::int64_t>(bnext::ceil_div(kMax, kMax - 1), 2, "max / (max - 1)");
  check_equal<std::int64_t>(bnext::ceil_div(1, kMax), 1, "1 / max");
}

void layout_sizes() {
  const bnext::Layout layout{bnext::Order::kPlanes, 1 << 20, 1 << 10, 3 << 10};
  check_equal(layout.numel(), std::int64_t(3) << 40, "numel");
}

std::vector<Case> all_cases() {
  std::vector<Case> cases = {
      {"running_stats_one_step_float", running_stats_one_step<float>},
      {"running_stats_one_step_double", running_stats_one_step<double>},
      {"running_stats_round_once", running_stats_round_once},
      {"running_stats_cumulative", running_stats_cumulative},
      {"split_range_is_tensor_split", split_range_is_tensor_split},
      {"split_range_does_not_overflow", split_range_does_not_overflow},
      {"ceil_div", ceil_div},
      {"layout_sizes", layout_sizes},
  };
  for (const auto& more :
       {welford_cases(), element_cases(), launch_cases(), launch_choice_cases()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  return cases;
}

pybind11::list names() {
  pybind11::list result;
  for (const Case& item : all_cases()) {
    result.append(item.name);
  }
  return result;
}

void run(const std::string& name) {
  for (const Case& item : all_cases()) {
    if (item.name == name) {
      return item.run();
    }
  }
  throw std::invalid_argument("no case is called " + name);
}

}  // namespace
}  // namespace core_cases

PYBIND11_MODULE(core_cases, module) {
  module.def("names", &core_cases::names);
  module.def("run", &core_cases::run);
}
