// (count, mean, M2) triples and their merge: the one idea behind every statistic of bnext.
//
// B. P. Welford, "Note on a method for calculating corrected sums of squares and products" (1962);
// T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance" (1983),
// eq. (1.5). docs/math.md derives the error bounds.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "math.h"

namespace bnext {

// Chan's merge of b into a for one mean/M2 pair or a vector of them. The caller passes
// b_over_n = n_b / (n_a + n_b) and ab_over_n = n_a * n_b / (n_a + n_b), which all the channels of
// a block share, so that no lane divides.
template <typename T>
BNEXT_HD inline void merge_moments(T& mean, T& m2, T mean_b, T m2_b, T b_over_n, T ab_over_n) {
  const T delta = mean_b - mean;
  const T merged = Math<T>::fmadd(delta, b_over_n, mean);
  m2 = m2 + Math<T>::fmadd(delta * delta, ab_over_n, m2_b);
  // With an infinite mean delta is infinite or NaN; the sum of the means is then what the mean
  // of all the values is: the infinity, or NaN for two opposite ones.
  mean = Math<T>::where_nan(merged, mean + mean_b, merged);
}

// A pivot that keeps x - pivot meaningful: 0 where the candidate is infinite or NaN, so that the
// sums of d are then the plain sums, with their infinities and NaNs.
template <typename T>
BNEXT_HD inline T finite_pivot(T candidate) {
  return Math<T>::where_nan(candidate - candidate, Math<T>::constant(0), candidate);
}

// Mean and M2 of n values from their sums of d = x - pivot and of d * d (corrected two-pass,
// Chan et al. (1983), eq. (1.7)). The pivot is the mean of some values of the same block, which
// bounds the cancellation in M2.
template <typename T>
BNEXT_HD inline void shifted_moments(T pivot, T sum_d, T sum_dd, T one_over_n, T& mean, T& m2) {
  const T mean_d = sum_d * one_over_n;
  mean = pivot + mean_d;
  const T corrected = sum_dd - sum_d * mean_d;
  m2 = Math<T>::where_le_zero(corrected, Math<T>::constant(0), corrected);  // NaN stays NaN
}

// Squares that overflow make M2 infinite, or NaN after the next merge (inf - inf). The mean tells
// this from an infinity or NaN in the input: it is finite. M2 is then infinite, as torch's.
template <typename T>
BNEXT_HD inline T overflowed_m2(T mean, T m2) {
  return Math<T>::where_nan(m2, Math<T>::constant(INFINITY) + (mean - mean), m2);
}

// The statistics of `count` values. Counts are kept in T: exact up to 2^53 in double.
template <typename T>
struct Welford {
  T count = 0;
  T mean = 0;
  T m2 = 0;

  BNEXT_HD void push(T x) {
    count += 1;
    const T delta = x - mean;
    const T pushed = mean + delta / count;
    m2 = Math<T>::fmadd(delta, x - pushed, m2);
    mean = Math<T>::where_nan(pushed, mean + x, pushed);
  }

  BNEXT_HD void merge(const Welford& other) {
    if (other.count == 0) {
      return;
    }
    if (count == 0) {
      *this = other;
      return;
    }
    const T total = count + other.count;
    const T b_over_n = other.count / total;
    merge_moments(mean, m2, other.mean, other.m2, b_over_n, count * b_over_n);
    count = total;
  }

  BNEXT_HD T biased_variance() const { return overflowed_m2(mean, m2) / count; }
  BNEXT_HD T unbiased_variance() const { return overflowed_m2(mean, m2) / (count - 1); }
};

// Sums of d = x - pivot and of d * d. Accumulators that share a pivot merge by addition, without a
// division: Chan's formula for any number of sets at once, as long as the sums are kept in a type
// that bears the distance of the pivot (docs/math.md, section 4).
template <typename T>
struct ShiftedSums {
  T sum_d = 0;
  T sum_dd = 0;

  // n values whose sums are about pivot + offset:
  //   sum((d + offset)^2) = sum_dd + offset * (2 * sum_d + n * offset)
  BNEXT_HD void add_shifted(T offset, T n, T other_sum_d, T other_sum_dd) {
    const T shifted = Math<T>::fmadd(n, offset, other_sum_d);
    sum_dd = sum_dd + Math<T>::fmadd(offset, other_sum_d + shifted, other_sum_dd);
    sum_d = sum_d + shifted;
  }

  BNEXT_HD Welford<T> moments(T pivot, T count, T one_over_count) const {
    Welford<T> out;
    out.count = count;
    shifted_moments(pivot, sum_d, sum_dd, one_over_count, out.mean, out.m2);
    return out;
  }
};

// The merge of `size` triples that share one count, at `stride` from each other: the lanes of a
// vector, or the columns of a channel. Two passes over the means, no division per triple.
template <typename T>
BNEXT_HD inline Welford<T> merge_equal(const T* mean, const T* m2, std::int64_t size, T count) {
  T sum = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    sum += mean[i];
  }
  const T pivot = finite_pivot(sum / static_cast<T>(size));
  T sum_d = 0, sum_dd = 0, sum_m2 = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const T d = mean[i] - pivot;
    sum_d += d;
    sum_dd = Math<T>::fmadd(d, d, sum_dd);
    sum_m2 += m2[i];
  }
  Welford<T> merged;
  merged.count = count * static_cast<T>(size);
  T m2_of_means;
  shifted_moments(pivot, sum_d, sum_dd, T(1) / static_cast<T>(size), merged.mean, m2_of_means);
  merged.m2 = Math<T>::fmadd(m2_of_means, count, sum_m2);
  return merged;
}

}  // namespace bnext
