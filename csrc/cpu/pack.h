// Pack: as many elements of scalar_t as fill one SIMD register, held in acc_t (two registers for
// half and bfloat16). It is the T over which the numeric core runs on the CPU. The lanes are in
// order, but for bfloat16 on AVX-512: there, one register has the even ones and one the odd.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "../core/math.h"
#include "kernels.h"
#if defined(CPU_CAPABILITY_AVX512)
#include "pack_avx512.h"
#endif

// Left to itself, g++ calls a function for each vector addition once a file is large enough.
#define BNEXT_INLINE inline __attribute__((always_inline))
#define BNEXT_NOINLINE __attribute__((noinline))
#define BNEXT_UNROLL_HOST _Pragma("GCC unroll 16")
// One function of its own, with all it calls inlined: the loops of a kernel.
#define BNEXT_KERNEL __attribute__((flatten, noinline))

namespace bnext::cpu {
namespace CPU_CAPABILITY {

// The lanes of a vector, added in double.
template <typename T>
BNEXT_INLINE double sum_in_double(const at::vec::Vectorized<T>& v) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  __m256d four;
#if defined(CPU_CAPABILITY_AVX512)
  __m512d eight;
  if constexpr (std::is_same_v<T, double>) {
    eight = v;
  } else {
    const __m512 floats = v;
    eight = _mm512_cvtps_pd(_mm512_castps512_ps256(floats)) +
            _mm512_cvtps_pd(_mm512_extractf32x8_ps(floats, 1));
  }
  four = _mm512_castpd512_pd256(eight) + _mm512_extractf64x4_pd(eight, 1);
#else
  if constexpr (std::is_same_v<T, double>) {
    four = v;
  } else {
    const __m256 floats = v;
    four = _mm256_cvtps_pd(_mm256_castps256_ps128(floats)) +
           _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1));
  }
#endif
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  return two[0] + two[1];
#else
  T lanes[at::vec::Vectorized<T>::size()];
  v.store(lanes);
  double sum = 0;
  for (const T lane : lanes) {
    sum += lane;
  }
  return sum;
#endif
}

// Whole vectors are stored past the caches where the instruction set can; elsewhere as usual.
template <typename Vec>
BNEXT_INLINE void stream_bytes(void* p, const Vec& value) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(p), std::bit_cast<__m512i>(value));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_si256(static_cast<__m256i*>(p), std::bit_cast<__m256i>(value));
#else
  value.store(p);
#endif
}

template <typename scalar_t>
struct Pack {
  using acc_t = AccType<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  using ScalarVec = at::vec::Vectorized<scalar_t>;
  static constexpr std::int64_t kSize = ScalarVec::size();
  static constexpr int kVecs = ScalarVec::size() / Vec::size();
  static_assert(kVecs == 1 || kVecs == 2);

  Vec v[kVecs];

  Pack() = default;
  BNEXT_INLINE explicit Pack(acc_t value) {
    for (Vec& x : v) {
      x = Vec(value);
    }
  }

  BNEXT_INLINE static Pack load(const scalar_t* p) {
    Pack out;
    if constexpr (kVecs == 1) {
      out.v[0] = Vec::loadu(p);
#if defined(CPU_CAPABILITY_AVX512)
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      const EvenOdd values = load_bfloat16(p);
      out.v[0] = values.even;
      out.v[1] = values.odd;
#endif
    } else {
      at::vec::load_to_float<scalar_t>(p, out.v[0], out.v[1]);
    }
    return out;
  }
  BNEXT_INLINE void store(scalar_t* p) const {
    if constexpr (kVecs == 1) {
      v[0].store(p);
#if defined(CPU_CAPABILITY_AVX512)
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      _mm512_storeu_si512(p, to_bfloat16(v[0], v[1]));
#endif
    } else {
      at::vec::convert_from_float<scalar_t>(v[0], v[1]).store(p);
    }
  }
  // Past the caches; p is aligned to kStreamAlign.
  BNEXT_INLINE void stream(scalar_t* p) const {
    if constexpr (kVecs == 1) {
      stream_bytes(p, v[0]);
#if defined(CPU_CAPABILITY_AVX512)
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      stream_bytes(p, to_bfloat16(v[0], v[1]));
#endif
    } else {
      stream_bytes(p, at::vec::convert_from_float<scalar_t>(v[0], v[1]));
    }
  }
  BNEXT_INLINE static Pack load_acc(const acc_t* p) {
    Pack out;
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      const EvenOdd values = load_even_odd(p);
      out.v[0] = values.even;
      out.v[1] = values.odd;
      return out;
    }
#endif
    for (int i = 0; i < kVecs; ++i) {
      out.v[i] = Vec::loadu(p + i * Vec::size());
    }
    return out;
  }
  BNEXT_INLINE void store_acc(acc_t* p) const {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      store_in_order(p, v[0], v[1]);
      return;
    }
#endif
    for (int i = 0; i < kVecs; ++i) {
      v[i].store(p + i * Vec::size());
    }
  }

  // The first `lanes` lanes, the others load as 0: for lines shorter than a pack. One test that
  // always goes the same way is cheaper than a second copy of every kernel.
  BNEXT_INLINE static Pack load(const scalar_t* p, std::int64_t lanes) {
    return lanes == kSize ? load(p) : load_part(p, lanes);
  }
  BNEXT_INLINE void store(scalar_t* p, std::int64_t lanes) const {
    if (lanes == kSize) {
      store(p);
    } else {
      store_part(p, lanes);
    }
  }
  BNEXT_INLINE static Pack load_acc(const acc_t* p, std::int64_t lanes) {
    return lanes == kSize ? load_acc(p) : load_acc_part(p, lanes);
  }

  BNEXT_INLINE void store_acc(acc_t* p, std::int64_t lanes) const {
    if (lanes == kSize) {
      store_acc(p);
    } else {
      store_acc_part(p, lanes);
    }
  }

  // The last `lanes` lanes as they are, the others 0: of a pack that overlaps the one before it.
  BNEXT_INLINE Pack last(std::int64_t lanes) const {
    const Pack mask = load_acc(kLastLanes.values + lanes);
    Pack out;
    for (int i = 0; i < kVecs; ++i) {
      out.v[i] = Vec::blendv(Vec(0), v[i], mask.v[i] != Vec(0));
    }
    return out;
  }

  BNEXT_INLINE double sum_lanes() const {
    return sum_in_double(kVecs == 1 ? v[0] : v[0] + v[kVecs - 1]);
  }

  // In acc_t: for what need not be exact.
  BNEXT_INLINE acc_t rough_sum_of_lanes() const {
    const auto add = [](const Vec& a, const Vec& b) { return a + b; };
    return at::vec::vec_reduce_all<acc_t>(add, kVecs == 1 ? v[0] : v[0] + v[kVecs - 1]);
  }

  BNEXT_INLINE friend Pack operator+(Pack a, const Pack& b) {
    for (int i = 0; i < kVecs; ++i) {
      a.v[i] = a.v[i] + b.v[i];
    }
    return a;
  }
  BNEXT_INLINE friend Pack operator-(Pack a, const Pack& b) {
    for (int i = 0; i < kVecs; ++i) {
      a.v[i] = a.v[i] - b.v[i];
    }
    return a;
  }
  BNEXT_INLINE friend Pack operator*(Pack a, const Pack& b) {
    for (int i = 0; i < kVecs; ++i) {
      a.v[i] = a.v[i] * b.v[i];
    }
    return a;
  }
  BNEXT_INLINE friend Pack operator/(Pack a, const Pack& b) {
    for (int i = 0; i < kVecs; ++i) {
      a.v[i] = a.v[i] / b.v[i];
    }
    return a;
  }

 private:
  // A window of kSize values that starts at `lanes` has that many ones, at its end.
  struct LastLanes {
    constexpr LastLanes() {
      for (std::int64_t i = 0; i < 2 * kSize; ++i) {
        values[i] = i < kSize ? acc_t(0) : acc_t(1);
      }
    }
    acc_t values[2 * kSize];
  };
  static constexpr LastLanes kLastLanes{};

  BNEXT_NOINLINE static Pack load_part(const scalar_t* p, std::int64_t lanes) {
    scalar_t padded[kSize] = {};
    std::copy_n(p, lanes, padded);
    return load(padded);
  }
  BNEXT_NOINLINE void store_part(scalar_t* p, std::int64_t lanes) const {
    scalar_t padded[kSize];
    store(padded);
    std::copy_n(padded, lanes, p);
  }
  BNEXT_NOINLINE void store_acc_part(acc_t* p, std::int64_t lanes) const {
    acc_t padded[kSize];
    store_acc(padded);
    std::copy_n(padded, lanes, p);
  }
  BNEXT_NOINLINE static Pack load_acc_part(const acc_t* p, std::int64_t lanes) {
    acc_t padded[kSize] = {};
    std::copy_n(p, lanes, padded);
    return load_acc(padded);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu

namespace bnext {

template <typename scalar_t>
struct Math<cpu::CPU_CAPABILITY::Pack<scalar_t>> {
  using T = cpu::CPU_CAPABILITY::Pack<scalar_t>;
  using Vec = typename T::Vec;

  BNEXT_INLINE static T constant(double value) { return T(static_cast<typename T::acc_t>(value)); }
  BNEXT_INLINE static T fmadd(T a, const T& b, const T& c) {
    for (int i = 0; i < T::kVecs; ++i) {
      a.v[i] = at::vec::fmadd(a.v[i], b.v[i], c.v[i]);
    }
    return a;
  }
  BNEXT_INLINE static T exp(T a) {
    for (Vec& x : a.v) {
      x = x.exp();
    }
    return a;
  }
  BNEXT_INLINE static T where_le_zero(const T& x, const T& yes, T no) {
    for (int i = 0; i < T::kVecs; ++i) {
#if defined(CPU_CAPABILITY_AVX512)
      no.v[i] = cpu::CPU_CAPABILITY::select<_CMP_LE_OQ>(x.v[i], Vec(0), yes.v[i], no.v[i]);
#else
      no.v[i] = Vec::blendv(no.v[i], yes.v[i], x.v[i] <= Vec(0));
#endif
    }
    return no;
  }
  BNEXT_INLINE static T positive_part(T x) {
#if defined(CPU_CAPABILITY_AVX512)
    for (Vec& v : x.v) {
      v = cpu::CPU_CAPABILITY::max_zero(v);
    }
    return x;
#else
    return where_le_zero(x, T(0), x);
#endif
  }
  BNEXT_INLINE static T where_gt_zero(const T& x, const T& yes, T no) {
    for (int i = 0; i < T::kVecs; ++i) {
#if defined(CPU_CAPABILITY_AVX512)
      no.v[i] = cpu::CPU_CAPABILITY::select<_CMP_GT_OQ>(x.v[i], Vec(0), yes.v[i], no.v[i]);
#else
      no.v[i] = Vec::blendv(no.v[i], yes.v[i], x.v[i] > Vec(0));
#endif
    }
    return no;
  }
  BNEXT_INLINE static T where_nan(const T& x, const T& yes, T no) {
    for (int i = 0; i < T::kVecs; ++i) {
#if defined(CPU_CAPABILITY_AVX512)
      no.v[i] = cpu::CPU_CAPABILITY::select<_CMP_UNORD_Q>(x.v[i], x.v[i], yes.v[i], no.v[i]);
#else
      no.v[i] = Vec::blendv(no.v[i], yes.v[i], x.v[i] != x.v[i]);
#endif
    }
    return no;
  }
};

}  // namespace bnext
