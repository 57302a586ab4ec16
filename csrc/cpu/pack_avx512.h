// What ATen's AVX-512 vectors do in more instructions than needed: selections go through a vector
// mask there, and bfloat16 through two shifts and two shuffles.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace bnext {
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

// The high half of 16 floats rounded to nearest, ties to even; NaN becomes all ones, as in ATen.
inline __attribute__((always_inline)) __m512i round_to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(-1));
}

inline __attribute__((always_inline)) void store_bfloat16(
    c10::BFloat16* p, __m512 low, __m512 high, bool stream) {
  // The odd 16-bit lanes of both, in order.
  const __m512i odd_lanes = _mm512_add_epi16(
      _mm512_slli_epi16(
          _mm512_set_epi16(
              31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11,
              10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
          1),
      _mm512_set1_epi16(1));
  const __m512i packed =
      _mm512_permutex2var_epi16(round_to_bfloat16(low), odd_lanes, round_to_bfloat16(high));
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), packed);
  } else {
    _mm512_storeu_si512(p, packed);
  }
}

inline __attribute__((always_inline)) __m512 load_bfloat16(const c10::BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

}  // namespace CPU_CAPABILITY
}  // namespace bnext
