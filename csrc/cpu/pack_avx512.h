// What ATen's AVX-512 vectors do in more instructions than needed: selections go through a vector
// mask there, and bfloat16 through two shifts and two shuffles.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace bnext::cpu {
namespace CPU_CAPABILITY {

// yes where x compares to y, no elsewhere.
template <int kPredicate>
inline __attribute__((always_inline)) at::vec::Vectorized<float> select(
    __m512 x, __m512 y, __m512 yes, __m512 no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, kPredicate), no, yes);
}
template <int kPredicate>
inline __attribute__((always_inline)) at::vec::Vectorized<double> select(
    __m512d x, __m512d y, __m512d yes, __m512d no) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, y, kPredicate), no, yes);
}

// The second operand of the instruction is what it returns if one is NaN.
inline __attribute__((always_inline)) at::vec::Vectorized<float> max_zero(__m512 x) {
  return _mm512_max_ps(_mm512_setzero_ps(), x);
}
inline __attribute__((always_inline)) at::vec::Vectorized<double> max_zero(__m512d x) {
  return _mm512_max_pd(_mm512_setzero_pd(), x);
}

// bfloat16 is widened and narrowed without moving lanes: 32 values are two vectors of floats, those
// of even and those of odd index. Constants and sums, which are in order, follow once a strip.
struct EvenOdd {
  __m512 even;
  __m512 odd;
};

inline __attribute__((always_inline)) EvenOdd load_bfloat16(const c10::BFloat16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
      _mm512_castsi512_ps(_mm512_and_si512(bits, high))};
}

// 16 floats whose high halves are them rounded to nearest, ties to even. NaN, which is quiet, keeps
// its bits: a sum could carry them into the sign.
inline __attribute__((always_inline)) __m512i round_to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __m512i half =
      _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  return _mm512_mask_add_epi32(bits, number, bits, half);
}

inline __attribute__((always_inline)) __m512i to_bfloat16(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(round_to_bfloat16(even), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, round_to_bfloat16(odd));
}

inline __attribute__((always_inline)) EvenOdd load_even_odd(const float* p) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

inline __attribute__((always_inline)) void store_in_order(float* p, __m512 even, __m512 odd) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even, high, odd));
}

}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu
