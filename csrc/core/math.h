// The few operations that differ between a scalar and a SIMD vector. The numeric core is written
// once over them; csrc/cpu specialises Math for its vectors.
#pragma once

#include <cmath>
#include <type_traits>

#include "host_device.h"

namespace bnext {

// What elements of scalar_t are computed and summed in.
template <typename scalar_t>
using AccType = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
struct Math {
  BNEXT_HD static T fmadd(T a, T b, T c) { return std::fma(a, b, c); }
  BNEXT_HD static T exp(T a) { return std::exp(a); }
  BNEXT_HD static T constant(double value) { return static_cast<T>(value); }

  // The three selections spell out what a NaN does, since `max` instructions drop it.
  BNEXT_HD static T where_le_zero(T x, T yes, T no) { return x <= T(0) ? yes : no; }
  BNEXT_HD static T where_gt_zero(T x, T yes, T no) { return x > T(0) ? yes : no; }
  BNEXT_HD static T where_nan(T x, T yes, T no) { return x != x ? yes : no; }

  // max(x, 0) that keeps NaN.
  BNEXT_HD static T positive_part(T x) { return where_le_zero(x, T(0), x); }
};

}  // namespace bnext
