// What lies between reduce and apply, per channel: simple loops that the compiler vectorises. In
// the files of each instruction set, since without FMA every fused multiply-add is a call.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace bnext::cpu {
namespace CPU_CAPABILITY {
namespace {

inline void merge(const MergeArgs& given, std::int64_t n_channel) {
  const MergeArgs args = given;
  double* __restrict mean = args.mean;
  double* __restrict m2 = args.m2;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    merge_moments(
        mean[c], m2[c], args.other_mean[c], args.other_m2[c], args.b_over_n, args.ab_over_n);
  }
}

// 1 / sqrt(m2 / n + eps).
template <typename acc_t>
void inverse_stds(
    const double* mean,
    const double* m2,
    double one_over_n,
    double eps,
    acc_t* __restrict invstd,
    std::int64_t size) {
  for (std::int64_t c = 0; c < size; ++c) {
    invstd[c] = inverse_std<acc_t>(overflowed_m2(mean[c], m2[c]) * one_over_n, eps);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// Without the square root and the division, which take longer than all else that `statistics` does:
// an estimate r whose rest h = 1 - x r^2 is at most 2^-13, times the first terms of the series of
// (1 - h)^(-1/2) = 1 + h / 2 + 3/8 h^2 + 5/16 h^3 ..., of which the next is below 2^-40.
template <>
inline void inverse_stds<float>(
    const double* mean,
    const double* m2,
    double one_over_n,
    double eps,
    float* __restrict invstd,
    std::int64_t size) {
  for (std::int64_t c = 0; c < size; c += 8) {
    const auto lanes = static_cast<__mmask8>(size - c >= 8 ? 0xff : (1 << (size - c)) - 1);
    const __m512d centre = _mm512_maskz_loadu_pd(lanes, mean + c);
    const __m512d squares = _mm512_maskz_loadu_pd(lanes, m2 + c);
    const __mmask8 nan = _mm512_cmp_pd_mask(squares, squares, _CMP_UNORD_Q);
    // As overflowed_m2.
    const __m512d sum =
        _mm512_mask_add_pd(squares, nan, _mm512_sub_pd(centre, centre), _mm512_set1_pd(INFINITY));
    const __m512d variance = _mm512_mul_pd(sum, _mm512_set1_pd(one_over_n));
    const __m512d x = _mm512_add_pd(variance, _mm512_set1_pd(eps));
    const __m512d r = _mm512_rsqrt14_pd(x);
    const __m512d h = _mm512_fnmadd_pd(_mm512_mul_pd(x, r), r, _mm512_set1_pd(1));
    const __m512d series = _mm512_fmadd_pd(h, _mm512_set1_pd(0.375), _mm512_set1_pd(0.5));
    // NaN where x is 0 or infinite: the estimate is then right.
    const __mmask8 number = _mm512_cmp_pd_mask(h, h, _CMP_ORD_Q);
    const __m512d exact = _mm512_mask3_fmadd_pd(_mm512_mul_pd(r, h), series, r, number);
    _mm256_mask_storeu_ps(invstd + c, lanes, _mm512_cvtpd_ps(exact));
  }
}
#endif

template <typename scalar_t>
void statistics(const StatisticsArgs<AccType<scalar_t>>& given, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
  const StatisticsArgs<acc_t> args = given;
  acc_t* __restrict mean = args.save_mean;
  acc_t* __restrict mean_lo = args.save_mean_lo;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    acc_t high, low;
    split_mean(kHasBase<scalar_t> ? args.base[c] : 0.0, args.mean[c], high, low);
    mean[c] = high;
    mean_lo[c] = low;
  }
  inverse_stds<acc_t>(args.mean, args.m2, 1.0 / args.count, args.eps, args.save_invstd, n_channel);
}

template <typename scalar_t>
void constants(const ConstantsArgs<AccType<scalar_t>>& given, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
  const ConstantsArgs<acc_t> args = given;
  acc_t* __restrict scale = args.scale;
  acc_t* __restrict shift = args.shift;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    const ChannelStats<acc_t> stats{args.mean[c], args.mean_lo[c], args.invstd[c]};
    const auto out = forward_constants<acc_t>(
        stats, args.weight != nullptr ? args.weight[c] : acc_t(1),
        args.bias != nullptr ? args.bias[c] : acc_t(0));
    scale[c] = out.scale;
    shift[c] = out.shift;
  }
}

template <typename scalar_t>
void grad_fold(const GradFoldArgs<AccType<scalar_t>>& given, std::int64_t n_channel) {
  const GradFoldArgs<AccType<scalar_t>> args = given;
  double* __restrict sum_dy_xmu = args.sum_dy_xmu;
  double* __restrict group_dy = args.group_dy;
  double* __restrict group_dy_xmu = args.group_dy_xmu;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    GradSums sums{args.sum_dy[c], sum_dy_xmu[c]};
    sums.subtract_mean_lo(args.mean_lo[c]);
    sum_dy_xmu[c] = sums.sum_dy_xmu;
    group_dy[c] += sums.sum_dy;
    group_dy_xmu[c] += sums.sum_dy_xmu * args.invstd[c];
  }
}

template <typename scalar_t>
void coefficients(const CoefficientsArgs<AccType<scalar_t>>& given, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
  const CoefficientsArgs<acc_t> args = given;
  acc_t* __restrict coef_x = args.coef_x;
  acc_t* __restrict coef_0 = args.coef_0;
  const double one_over_count = 1.0 / args.count;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    const ChannelStats<acc_t> stats{acc_t(0), args.mean_lo[c], args.invstd[c]};
    const auto out = backward_constants(
        stats, args.scale[c], args.sum_dy[c] * one_over_count, args.sum_dy_xmu[c] * one_over_count);
    coef_x[c] = out.coef_x;
    coef_0[c] = out.coef_0;
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu
