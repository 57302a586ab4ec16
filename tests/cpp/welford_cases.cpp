// csrc/core/welford.h against two passes in long double. u is the unit roundoff of T; the bounds
// are to first order in u.
#include "core/welford.h"

#include <array>
#include <numeric>

#include "core_cases.h"

namespace core_cases {
namespace {

using bnext::Welford;

// Offsets in standard deviations.
template <typename T>
std::vector<double> offsets() {
  return sizeof(T) == 4 ? std::vector{0.0, 1e2, -1e4} : std::vector{0.0, 1e4, -1e8};
}

template <typename T>
Welford<T> pushed(const std::vector<T>& values) {
  Welford<T> result;
  for (T x : values) {
    result.push(x);
  }
  return result;
}

template <typename T>
Welford<T> merged(Welford<T> a, const Welford<T>& b) {
  a.merge(b);
  return a;
}

template <typename T>
Moments exact_merge(const std::vector<Welford<T>>& parts) {
  Moments total;
  Exact sum = 0;
  for (const auto& part : parts) {
    total.count += part.count;
    sum += static_cast<Exact>(part.count) * part.mean;
  }
  total.mean = sum / total.count;
  Exact rest = 0;  // of the mean, as in exact_moments
  for (const auto& part : parts) {
    const Exact d = part.mean - total.mean;
    rest += part.count * d;
    total.m2 += part.m2 + part.count * d * d;
  }
  total.mean += rest / total.count;
  total.m2 -= rest * rest / total.count;
  return total;
}

// Each push adds u max|x| to the error e of the mean and takes 1/k of it away, so that
// e <= (n + 1)/2 u max|x|, and a few u for the last delta. M2 gets |delta| e twice per push, and
// sum |delta| <= sqrt(2 n M2), since sum delta^2 (k - 1)/k = M2.
template <typename T>
void push_matches_truth() {
  for (double offset : offsets<T>()) {
    for (std::size_t n : {2, 3, 16, 200}) {
      const auto values = normal_values<T>(n, offset, 1, 1 + n);
      const Moments truth = exact_moments(values);
      const auto found = pushed(values);
      const Exact u = kUnit<T>, largest = max_abs(values);
      check_equal<T>(found.count, n, "count");
      check_close(found.mean, truth.mean, ((n + 1) / 2.0L + 4) * u * largest, "mean");
      check_close(
          found.m2 / truth.m2, 1, u * (1.5L * (n + 1) * largest / truth.std() + n + 4),
          "M2 / truth");
      check_equal(found.biased_variance(), found.m2 / static_cast<T>(n), "biased variance");
      check_equal(found.unbiased_variance(), found.m2 / static_cast<T>(n - 1), "unbiased variance");
    }
  }
}

template <typename T>
void one_value() {
  for (T x : {T(0), T(-3.7), T(1e8), std::numeric_limits<T>::max()}) {
    const auto found = pushed<T>({x});
    check_equal(found.count, T(1), "count");
    check_equal(found.mean, x, "mean");
    check_equal(found.m2, T(0), "M2");
  }
}

template <typename T>
void constants_have_no_variance() {
  for (T c : {T(0.1), T(-1) / 3, T(1e8), T(-1e-30)}) {
    const auto a = pushed(std::vector<T>(1000, c)), b = pushed(std::vector<T>(7, c));
    for (const auto& found : {a, merged(a, b), merged(b, a)}) {
      check_equal(found.mean, c, "mean");
      check_equal(found.m2, T(0), "M2");
    }
    // The pivot of merge_equal may miss c by n u c. Then d is exact, and M2 = sum d^2 - (sum d)^2/n
    // is 0 up to the rounding of n d^2.
    const std::vector<T> means(10, c), m2(10, T(0));
    const auto equal = bnext::merge_equal(means.data(), m2.data(), 10, T(3));
    check_close(equal.mean, c, kUnit<T> * std::fabs(c), "merge_equal: mean");
    const Exact d = 10 * kUnit<T> * c;
    check_close(equal.m2, 0, 3 * 10 * d * d * 4 * kUnit<T>, "merge_equal: M2");
  }
}

// b_over_n, delta and the fused multiply-add each add a rounding to the mean: e <= k u (M + 2R)
// after k merges, with M the largest mean and R their range. With w = n_a n_b / n, M2 gets
// 2 e |delta| w per merge; sum |delta| w <= sqrt(sum delta^2 w * sum w) <= n std. Five roundings of
// a term and two of the sum come on top. The same holds for a tree: its errors add up to k merges.
template <typename T>
void check_merged(
    const Welford<T>& found,
    const std::vector<Welford<T>>& parts,
    const Where& where = Where::current()) {
  const Moments truth = exact_merge(parts);
  Exact largest = 0, low = kInf<Exact>, high = -kInf<Exact>;
  for (const auto& part : parts) {
    largest = std::max<Exact>(largest, std::fabs(part.mean));
    low = std::min<Exact>(low, part.mean);
    high = std::max<Exact>(high, part.mean);
  }
  const Exact k = parts.size() - 1, error = k * kUnit<T> * (largest + 2 * (high - low));
  check_equal(found.count, static_cast<T>(truth.count), "count", where);
  check_close(found.mean, truth.mean, error, "mean", where);
  check_close(
      found.m2 / truth.m2, 1, 2 * error / truth.std() + (2 * k + 5) * kUnit<T>, "M2 / truth",
      where);
}

template <typename T>
void merge_in_any_order() {
  for (double offset : offsets<T>()) {
    std::vector<Welford<T>> parts;
    for (unsigned n : {1, 2, 7, 64, 1000}) {
      parts.push_back(pushed(normal_values<T>(n, offset + n % 3, 1, n)));
    }
    std::array<int, 5> order{};
    std::iota(order.begin(), order.end(), 0);
    do {
      const auto part = [&](int i) { return parts[order[i]]; };
      Welford<T> chain;
      for (int i = 0; i < 5; ++i) {
        chain.merge(part(i));
      }
      check_merged(chain, parts);
      check_merged(
          merged(merged(part(0), part(1)), merged(part(2), merged(part(3), part(4)))), parts);
    } while (std::next_permutation(order.begin(), order.end()));
  }
}

template <typename T>
void merge_with_nothing() {
  const auto some = pushed<T>({T(1.5), T(-2), T(7)});
  for (const auto& found : {merged(some, {}), merged({}, some)}) {
    check_equal(found.count, some.count, "count");
    check_equal(found.mean, some.mean, "mean");
    check_equal(found.m2, some.m2, "M2");
  }
  // The square of this mean overflows: it must not be taken.
  const auto large = pushed<T>({std::numeric_limits<T>::max() / 2});
  check_equal(merged({}, large).m2, T(0), "M2 of one large value");
  check_equal(merged<T>({}, {}).count, T(0), "count of nothing");
  // An empty part may hold anything.
  check_equal(merged(some, {T(0), kNaN<T>, kNaN<T>}).mean, some.mean, "mean");
}

// Closed forms, up to 2^41 values. All of them are powers of two or exact by another way.
void large_counts() {
  const double n = std::ldexp(1, 40);
  const auto halves = merged<double>({n, 0, n}, {n, 2, n});
  check_equal(halves.count, 2 * n, "count");
  check_equal(halves.mean, 1.0, "mean");
  check_equal(halves.m2, 4 * n, "M2");  // 2 n + 2^2 n / 2

  const auto doubled = [](Welford<double> part) {
    for (int i = 0; i < 40; ++i) {
      part = merged(part, part);
    }
    return part;
  };
  const auto same = doubled({3, 0.1, 5});
  check_equal(same.count, 3 * n, "count of doublings");
  check_equal(same.mean, 0.1, "mean of doublings");
  check_equal(same.m2, 5 * n, "M2 of doublings");

  // One value beside many, on either side: count 2^40 + 1 is kept, and M2 is n/(n + 1) delta^2.
  const double far = 1e8 + 1e6;
  for (const auto& found :
       {merged<double>({n, 1e8, 0}, {1, far, 0}), merged<double>({1, far, 0}, {n, 1e8, 0})}) {
    const Exact total = n + 1.0L, u = kUnit<double>;
    check_equal(found.count, n + 1, "count beside one");
    check_close(found.mean, 1e8L + 1e6L / total, 1.1e8L * u, "mean beside one");
    check_close(found.m2, 1e12L * n / total, 6 * u * 1e12L, "M2 beside one");
  }
  auto pushed_on = Welford<double>{n, 0, 0};
  pushed_on.push(n + 1);
  check_equal(pushed_on.mean, 1.0, "mean after a push");
  check_close(pushed_on.m2 / (Exact(n) * (n + 1)), 1, 3 * kUnit<double>, "M2 after a push");
}

// Two passes over the means: unlike a chain of merges, no term holds the offset but the pivot's
// error p <= (n + 1) u max|mean|, squared. With sum d^2 = M2 + n p^2, sum d^2 has n + 2 roundings,
// (sum d)^2 / n has 2 n + 3, and 3 are left.
template <typename T>
void merge_equal_matches_truth() {
  const Exact u = kUnit<T>;
  for (double offset : offsets<T>()) {
    for (std::size_t n : {1, 2, 3, 8, 16, 100}) {
      for (T count : {T(1), T(7), T(1 << 20)}) {
        const auto means = normal_values<T>(n, offset, 1, n);
        auto m2 = normal_values<T>(n, 0, static_cast<double>(count) / 3, n + 1);
        std::vector<Welford<T>> parts;
        Welford<T> chain;
        Exact within = 0;
        for (std::size_t i = 0; i < n; ++i) {
          m2[i] = std::fabs(m2[i]);
          within += m2[i];
          parts.push_back({count, means[i], m2[i]});
          chain.merge(parts.back());
        }
        const auto found = bnext::merge_equal<T>(means.data(), m2.data(), n, count);
        const Moments truth = exact_merge(parts), of_means = exact_moments(means);
        const Exact pivot = (n + 1) * u * max_abs(means), sum_dd = of_means.m2 + n * pivot * pivot;
        check_equal(found.count, count * static_cast<T>(n), "count");
        check_close(
            found.mean, truth.mean, u * (std::fabs(truth.mean) + (n + 3) * std::sqrt(sum_dd / n)),
            "mean");
        check_close(
            found.m2, truth.m2, u * (count * (3 * n + 8) * sum_dd + (n + 1) * within), "M2");
        check_merged(chain, parts);
      }
    }
  }
}

// The pivot is the mean of the first k of n values. By the lemma of docs/math.md, with its rounding
// e <= k u max|x|: sum d^2 <= (1 + 2 n/k) M2 + 2 n e^2, with an outlier anywhere. What is tested
// adds 7 roundings of at most sum d^2; the sums come rounded from long double.
template <typename T>
void shifted_moments_with_the_blocks_own_pivot() {
  const Exact u = kUnit<T>;
  for (double offset : offsets<T>()) {
    for (std::size_t k : {1, 4, 8}) {
      for (double outlier : {0.0, 1e3, 1e6}) {
        for (std::size_t at : {std::size_t(0), k, std::size_t(63)}) {
          const std::size_t n = 64;
          auto values = normal_values<T>(n, offset, 1, 3);
          values[at] += static_cast<T>(outlier);
          T pivot = 0;
          for (std::size_t i = 0; i < k; ++i) {
            pivot += values[i];
          }
          pivot /= static_cast<T>(k);
          Exact sum_d = 0, sum_dd = 0;
          for (T x : values) {
            const Exact d = static_cast<Exact>(x) - pivot;
            sum_d += d;
            sum_dd += d * d;
          }
          const Moments truth = exact_moments(values);
          const Exact e = k * u * max_abs(values);
          const Exact lemma = (1 + 2.0L * n / k) * truth.m2 + 2 * n * e * e;
          T mean, m2;
          bnext::shifted_moments(
              bnext::finite_pivot(pivot), static_cast<T>(sum_d), static_cast<T>(sum_dd),
              T(1) / T(n), mean, m2);
          check_close(
              mean, truth.mean, u * (std::fabs(truth.mean) + 4 * std::sqrt(sum_dd / n)), "mean");
          check_close(m2, truth.m2, 7 * u * lemma, "M2");
        }
      }
    }
  }
}

template <typename T>
void shifted_moments_is_never_negative() {
  T mean, m2;
  const T above = 1 + std::numeric_limits<T>::epsilon();
  bnext::shifted_moments<T>(5, above, 1, 1, mean, m2);  // 1 - above^2 < 0
  check_equal(m2, T(0), "M2");
  check_equal(mean, 5 + above, "mean");
  bnext::shifted_moments<T>(0, 2, kNaN<T>, 1, mean, m2);
  check_nan(m2, "M2 of a NaN");
}

template <typename T>
void finite_pivot_is_finite() {
  using Limits = std::numeric_limits<T>;
  for (T x : {T(0), T(1e-3), T(-1e8), Limits::max(), Limits::lowest(), Limits::denorm_min()}) {
    check_equal(bnext::finite_pivot(x), x, "pivot");
  }
  for (T x : {kInf<T>, -kInf<T>, kNaN<T>}) {
    check_equal(bnext::finite_pivot(x), T(0), "pivot");
  }
}

template <typename T>
void check_not_finite(const Welford<T>& found, T mean, const Where& where = Where::current()) {
  if (std::isnan(mean)) {
    check_nan(found.mean, "mean", where);
  } else {
    check_equal(found.mean, mean, "mean", where);
  }
  check_nan(found.m2, "M2", where);
}

// As the mean of all the values would be, in any order and cut into any two parts.
template <typename T>
void not_finite_values() {
  struct Example {
    std::array<T, 4> values;
    T mean;
  };
  const T inf = kInf<T>, nan = kNaN<T>;
  for (const Example& example :
       {Example{{inf, 1, 2, -3}, inf}, Example{{-inf, 1, 2, -3}, -inf},
        Example{{inf, inf, 2, -3}, inf}, Example{{inf, -inf, 1, 2}, nan},
        Example{{nan, 1, 2, 3}, nan}, Example{{nan, inf, 0, 0}, nan}}) {
    std::array<int, 4> order{0, 1, 2, 3};
    do {
      std::vector<T> values;
      for (int i : order) {
        values.push_back(example.values[i]);
      }
      check_not_finite(pushed(values), example.mean);
      for (int cut = 1; cut < 4; ++cut) {
        const auto middle = values.begin() + cut;
        check_not_finite(
            merged(
                pushed(std::vector<T>(values.begin(), middle)),
                pushed(std::vector<T>(middle, values.end()))),
            example.mean);
      }
      const std::vector<T> m2(4, T(0));
      check_not_finite(bnext::merge_equal(values.data(), m2.data(), 4, T(2)), example.mean);
      const T sum = std::accumulate(values.begin(), values.end(), T(0));
      Welford<T> block{4};
      bnext::shifted_moments(
          bnext::finite_pivot(sum), sum, sum * sum, T(0.25), block.mean, block.m2);
      check_not_finite(block, example.mean);
    } while (std::next_permutation(order.begin(), order.end()));
  }
  check_not_finite(pushed<T>({inf}), inf);
  const T means[] = {1, 2}, m2[] = {0, nan};
  check_nan(bnext::merge_equal(means, m2, 2, T(2)).m2, "M2 of parts with a NaN");
}

}  // namespace

std::vector<Case> welford_cases() {
  return {
      {"push_matches_truth_float", push_matches_truth<float>},
      {"push_matches_truth_double", push_matches_truth<double>},
      {"one_value_float", one_value<float>},
      {"one_value_double", one_value<double>},
      {"constants_have_no_variance_float", constants_have_no_variance<float>},
      {"constants_have_no_variance_double", constants_have_no_variance<double>},
      {"merge_in_any_order_float", merge_in_any_order<float>},
      {"merge_in_any_order_double", merge_in_any_order<double>},
      {"merge_with_nothing_float", merge_with_nothing<float>},
      {"merge_with_nothing_double", merge_with_nothing<double>},
      {"large_counts", large_counts},
      {"merge_equal_matches_truth_float", merge_equal_matches_truth<float>},
      {"merge_equal_matches_truth_double", merge_equal_matches_truth<double>},
      {"shifted_moments_float", shifted_moments_with_the_blocks_own_pivot<float>},
      {"shifted_moments_double", shifted_moments_with_the_blocks_own_pivot<double>},
      {"shifted_moments_is_never_negative_float", shifted_moments_is_never_negative<float>},
      {"shifted_moments_is_never_negative_double", shifted_moments_is_never_negative<double>},
      {"finite_pivot_float", finite_pivot_is_finite<float>},
      {"finite_pivot_double", finite_pivot_is_finite<double>},
      {"not_finite_values_float", not_finite_values<float>},
      {"not_finite_values_double", not_finite_values<double>},
  };
}

}  // namespace core_cases
