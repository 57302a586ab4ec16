// What lies between reduce and apply, per channel: simple loops that the compiler vectorises. In
// the files of each instruction set, since without FMA every fused multiply-add is a call.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace bnext {
namespace CPU_CAPABILITY {
namespace {

inline void merge(const MergeArgs args, std::int64_t n_channel) {
  double* __restrict mean = args.mean;
  double* __restrict m2 = args.m2;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    merge_moments(
        mean[c], m2[c], args.other_mean[c], args.other_m2[c], args.b_over_n, args.ab_over_n);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// 1 / sqrt(x): an estimate of 14 bits, and two steps of Newton's method instead of a square root
// and a division, which take longer than all the rest.
inline __m512d inverse_sqrt(__m512d x) {
  __m512d r = _mm512_rsqrt14_pd(x);
  for (int step = 0; step < 2; ++step) {
    const __m512d rest = _mm512_fnmadd_pd(_mm512_mul_pd(x, r), r, _mm512_set1_pd(1));
    const __mmask8 finite = _mm512_cmp_pd_mask(rest, rest, _CMP_ORD_Q);  // x is not 0, nor infinite
    r = _mm512_mask_fmadd_pd(r, finite, _mm512_mul_pd(rest, _mm512_set1_pd(0.5)), r);
  }
  return r;
}

inline void float_statistics(const StatisticsArgs<float>& args, std::int64_t n_channel) {
  const __m512d one_over_count = _mm512_set1_pd(1 / args.count), eps = _mm512_set1_pd(args.eps);
  for (std::int64_t c = 0; c < n_channel; c += 8) {
    const auto lanes =
        static_cast<__mmask8>(n_channel - c >= 8 ? 0xff : (1 << (n_channel - c)) - 1);
    const __m512d exact = _mm512_maskz_loadu_pd(lanes, args.mean + c);
    const __m512d m2 = _mm512_maskz_loadu_pd(lanes, args.m2 + c);
    const __m256 mean = _mm512_cvtpd_ps(exact);
    const __m256 rest = _mm512_cvtpd_ps(_mm512_sub_pd(exact, _mm512_cvtps_pd(mean)));
    const __mmask8 number = _mm256_cmp_ps_mask(rest, rest, _CMP_ORD_Q);  // not inf - inf
    const __m512d variance = _mm512_mul_pd(m2, one_over_count);
    const __m512d invstd = inverse_sqrt(_mm512_add_pd(variance, eps));
    _mm256_mask_storeu_ps(args.save_mean + c, lanes, mean);
    _mm256_mask_storeu_ps(args.save_mean_lo + c, lanes, _mm256_maskz_mov_ps(number, rest));
    _mm256_mask_storeu_ps(args.save_invstd + c, lanes, _mm512_cvtpd_ps(invstd));
  }
}
#endif

template <typename scalar_t>
void statistics(const StatisticsArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<acc_t, float>) {
    return float_statistics(args, n_channel);
  }
#endif
  acc_t* __restrict mean = args.save_mean;
  acc_t* __restrict mean_lo = args.save_mean_lo;
  acc_t* __restrict invstd = args.save_invstd;
  const double one_over_count = 1.0 / args.count;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    const auto stats = channel_stats<acc_t>(args.mean[c], args.m2[c] * one_over_count, args.eps);
    mean[c] = stats.mean;
    mean_lo[c] = stats.mean_lo;
    invstd[c] = stats.invstd;
  }
}

template <typename scalar_t>
void constants(const ConstantsArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
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
void grad_fold(const GradFoldArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  GradSums* __restrict sums = args.sums;
  GradSums* __restrict group = args.group;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    sums[c].subtract_mean_lo(args.mean_lo[c]);
    group[c].add({sums[c].sum_dy, sums[c].sum_dy_xmu * args.invstd[c]});
  }
}

template <typename scalar_t>
void coefficients(const CoefficientsArgs<AccType<scalar_t>> args, std::int64_t n_channel) {
  using acc_t = AccType<scalar_t>;
  acc_t* __restrict coef_x = args.coef_x;
  acc_t* __restrict coef_0 = args.coef_0;
  const double one_over_count = 1.0 / args.count;
  for (std::int64_t c = 0; c < n_channel; ++c) {
    const ChannelStats<acc_t> stats{acc_t(0), args.mean_lo[c], args.invstd[c]};
    const GradSums& sums = args.sums[c];
    const auto out = backward_constants(
        stats, args.scale[c], sums.sum_dy * one_over_count, sums.sum_dy_xmu * one_over_count);
    coef_x[c] = out.coef_x;
    coef_0[c] = out.coef_0;
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext
