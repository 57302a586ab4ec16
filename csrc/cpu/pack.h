// Pack: as many elements of scalar_t as fill one SIMD register, held in acc_t (two registers for
// half and bfloat16). It is the T over which the numeric core runs on the CPU.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

#include "../core/math.h"
#include "kernels.h"

namespace bnext {
namespace CPU_CAPABILITY {

// How many lanes of a Pack a load or store touches.
struct AllLanes {};
struct FirstLanes {
  std::int64_t count;
};

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
  explicit Pack(acc_t value) {
    for (Vec& x : v) {
      x = Vec(value);
    }
  }

  static Pack load(const scalar_t* p, AllLanes) {
    Pack out;
    if constexpr (kVecs == 1) {
      out.v[0] = Vec::loadu(p);
    } else {
      at::vec::load_to_float<scalar_t>(p, out.v[0], out.v[1]);
    }
    return out;
  }
  // The other lanes are 0.
  static Pack load(const scalar_t* p, FirstLanes lanes) {
    scalar_t padded[kSize] = {};
    for (std::int64_t i = 0; i < lanes.count; ++i) {
      padded[i] = p[i];
    }
    return load(padded, AllLanes{});
  }

  void store(scalar_t* p, AllLanes) const {
    if constexpr (kVecs == 1) {
      v[0].store(p);
    } else {
      at::vec::convert_from_float<scalar_t>(v[0], v[1]).store(p);
    }
  }
  void store(scalar_t* p, FirstLanes lanes) const {
    scalar_t padded[kSize];
    store(padded, AllLanes{});
    for (std::int64_t i = 0; i < lanes.count; ++i) {
      p[i] = padded[i];
    }
  }

  static Pack load_acc(const acc_t* p, AllLanes = {}) {
    Pack out;
    for (int i = 0; i < kVecs; ++i) {
      out.v[i] = Vec::loadu(p + i * Vec::size());
    }
    return out;
  }
  static Pack load_acc(const acc_t* p, FirstLanes lanes) {
    acc_t padded[kSize] = {};
    for (std::int64_t i = 0; i < lanes.count; ++i) {
      padded[i] = p[i];
    }
    return load_acc(padded);
  }
  void store_acc(acc_t* p) const {
    for (int i = 0; i < kVecs; ++i) {
      v[i].store(p + i * Vec::size());
    }
  }

  template <typename F>
  static Pack map(F&& f) {
    Pack out;
    for (int i = 0; i < kVecs; ++i) {
      out.v[i] = f(i);
    }
    return out;
  }
  friend Pack operator+(const Pack& a, const Pack& b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Pack operator-(const Pack& a, const Pack& b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Pack operator*(const Pack& a, const Pack& b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Pack operator/(const Pack& a, const Pack& b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
};

}  // namespace CPU_CAPABILITY

template <typename scalar_t>
struct Math<CPU_CAPABILITY::Pack<scalar_t>> {
  using T = CPU_CAPABILITY::Pack<scalar_t>;
  using Vec = typename T::Vec;

  static T fmadd(const T& a, const T& b, const T& c) {
    return T::map([&](int i) { return at::vec::fmadd(a.v[i], b.v[i], c.v[i]); });
  }
  static T exp(const T& a) {
    return T::map([&](int i) { return a.v[i].exp(); });
  }
  static T constant(double value) { return T(static_cast<typename T::acc_t>(value)); }
  static T where_le_zero(const T& x, const T& yes, const T& no) {
    return T::map([&](int i) { return Vec::blendv(no.v[i], yes.v[i], x.v[i] <= Vec(0)); });
  }
  static T where_gt_zero(const T& x, const T& yes, const T& no) {
    return T::map([&](int i) { return Vec::blendv(no.v[i], yes.v[i], x.v[i] > Vec(0)); });
  }
  static T where_nan(const T& x, const T& yes, const T& no) {
    return T::map([&](int i) { return Vec::blendv(no.v[i], yes.v[i], x.v[i] != x.v[i]); });
  }
};

}  // namespace bnext
