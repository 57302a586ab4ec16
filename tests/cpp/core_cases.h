// What the cases of the numeric core share: their list, the checks, and the truth to compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace core_cases {

// Throws std::runtime_error with what was found and what was expected.
struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case> welford_cases();
std::vector<Case> element_cases();
std::vector<Case> launch_cases();
std::vector<Case> launch_choice_cases();

// At least 64 bits of mantissa: its own rounding is 2^-11 of that of a double, or less.
using Exact = long double;
static_assert(std::numeric_limits<Exact>::digits >= 64);

// Unit roundoff.
template <typename T>
constexpr Exact kUnit = std::numeric_limits<T>::epsilon() / 2;

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

using Where = std::source_location;

[[noreturn]] inline void fail(const std::ostringstream& found, const Where& where) {
  std::ostringstream message;
  message << where.file_name() << ":" << where.line() << ": " << found.str();
  throw std::runtime_error(message.str());
}

// |actual - expected| <= bound; false where one of the three is NaN.
inline void check_close(
    Exact actual,
    Exact expected,
    Exact bound,
    const std::string& what,
    const Where& where = Where::current()) {
  if (!(std::fabs(actual - expected) <= bound)) {
    std::ostringstream found;
    found.precision(21);
    found << what << " is " << actual << ", expected " << expected << "; off by ";
    found.precision(4);
    found << actual - expected << ", bound " << bound;
    fail(found, where);
  }
}

template <typename T>
void check_equal(
    T actual, T expected, const std::string& what, const Where& where = Where::current()) {
  if (!(actual == expected)) {
    std::ostringstream found;
    found.precision(21);
    found << what << " is " << actual << ", expected " << expected;
    fail(found, where);
  }
}

inline void check_nan(
    Exact actual, const std::string& what, const Where& where = Where::current()) {
  if (!std::isnan(actual)) {
    std::ostringstream found;
    found << what << " is " << actual << ", expected NaN";
    fail(found, where);
  }
}

inline void check(bool holds, const std::string& what, const Where& where = Where::current()) {
  if (!holds) {
    fail(std::ostringstream() << "expected " << what, where);
  }
}

// Normal values around `offset`, rounded to T: what is compared is then exact for both sides.
template <typename T>
std::vector<T> normal_values(std::size_t size, double offset, double std, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution(offset, std);
  std::vector<T> values(size);
  for (T& value : values) {
    value = static_cast<T>(distribution(generator));
  }
  return values;
}

struct Moments {
  Exact count = 0;
  Exact mean = 0;
  Exact m2 = 0;

  Exact variance() const { return m2 / count; }
  Exact std() const { return std::sqrt(variance()); }
};

// Two passes, the second corrected by the sum of its deviations.
template <typename T>
Moments exact_moments(const std::vector<T>& values) {
  const Exact n = values.size();
  Exact sum = 0;
  for (T x : values) {
    sum += x;
  }
  const Exact pivot = sum / n;
  Exact sum_d = 0, sum_dd = 0;
  for (T x : values) {
    sum_d += x - pivot;
    sum_dd += (x - pivot) * (x - pivot);
  }
  return {n, pivot + sum_d / n, sum_dd - sum_d * sum_d / n};
}

template <typename T>
Exact max_abs(const std::vector<T>& values) {
  Exact result = 0;
  for (T x : values) {
    result = std::max(result, std::fabs(static_cast<Exact>(x)));
  }
  return result;
}

}  // namespace core_cases
