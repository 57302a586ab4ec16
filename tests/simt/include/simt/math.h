// The usual few intrinsics. All are correctly rounded here; a GPU's approximations are not
// modelled.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#define SIMT_MATH inline __attribute__((always_inline))

SIMT_MATH unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
SIMT_MATH int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
SIMT_MATH float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
SIMT_MATH float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
// Bytes of b:a (a is the lower word), each picked by a digit of the selector. The digits' highest
// bit, which copies a sign, is not modelled.
SIMT_MATH unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t both = std::uint64_t(b) << 32 | a;
  unsigned bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned picked = selector >> (4 * i) & 7;
    bytes |= (static_cast<unsigned>(both >> (8 * picked)) & 0xffu) << (8 * i);
  }
  return bytes;
}
SIMT_MATH long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
SIMT_MATH double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}

SIMT_MATH float __fadd_rn(float a, float b) {
  return a + b;
}
SIMT_MATH float __fsub_rn(float a, float b) {
  return a - b;
}
SIMT_MATH float __fmul_rn(float a, float b) {
  return a * b;
}
SIMT_MATH float __fdiv_rn(float a, float b) {
  return a / b;
}
SIMT_MATH float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
SIMT_MATH float __frcp_rn(float a) {
  return 1.0f / a;
}
SIMT_MATH float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
SIMT_MATH float __frsqrt_rn(float a) {
  return float(1.0 / std::sqrt(double(a)));
}
SIMT_MATH float __fdividef(float a, float b) {
  return a / b;
}
SIMT_MATH double __dadd_rn(double a, double b) {
  return a + b;
}
SIMT_MATH double __dsub_rn(double a, double b) {
  return a - b;
}
SIMT_MATH double __dmul_rn(double a, double b) {
  return a * b;
}
SIMT_MATH double __ddiv_rn(double a, double b) {
  return a / b;
}
SIMT_MATH double __fma_rn(double a, double b, double c) {
  return std::fma(a, b, c);
}
SIMT_MATH double __drcp_rn(double a) {
  return 1.0 / a;
}
SIMT_MATH double __dsqrt_rn(double a) {
  return std::sqrt(a);
}

SIMT_MATH float rsqrtf(float a) {
  return __frsqrt_rn(a);
}
SIMT_MATH float rsqrt(float a) {
  return __frsqrt_rn(a);
}
SIMT_MATH double rsqrt(double a) {
  return 1.0 / std::sqrt(a);
}
SIMT_MATH float __expf(float a) {
  return std::exp(a);
}
SIMT_MATH float __logf(float a) {
  return std::log(a);
}

SIMT_MATH float __int2float_rn(int a) {
  return float(a);
}
SIMT_MATH float __uint2float_rn(unsigned a) {
  return float(a);
}
SIMT_MATH float __ll2float_rn(long long a) {
  return float(a);
}
SIMT_MATH float __double2float_rn(double a) {
  return float(a);
}
SIMT_MATH double __int2double_rn(int a) {
  return a;
}

SIMT_MATH int __popc(unsigned a) {
  return std::popcount(a);
}
SIMT_MATH int __popcll(unsigned long long a) {
  return std::popcount(a);
}
SIMT_MATH int __clz(int a) {
  return std::countl_zero(unsigned(a));
}
SIMT_MATH int __clzll(long long a) {
  return std::countl_zero(std::uint64_t(a));
}
SIMT_MATH int __ffs(int a) {
  return a == 0 ? 0 : std::countr_zero(unsigned(a)) + 1;
}
SIMT_MATH int __ffsll(long long a) {
  return a == 0 ? 0 : std::countr_zero(std::uint64_t(a)) + 1;
}
SIMT_MATH unsigned __brev(unsigned a) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (a >> bit & 1u) << (31 - bit);
  return result;
}
SIMT_MATH unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned(std::uint64_t(a) * b >> 32);
}
SIMT_MATH int __mulhi(int a, int b) {
  return int(std::int64_t(a) * b >> 32);
}
SIMT_MATH unsigned __umul24(unsigned a, unsigned b) {
  return (a & 0xffffffu) * (b & 0xffffffu);
}
SIMT_MATH int __mul24(int a, int b) {
  auto low = [](int x) { return std::int64_t(int(unsigned(x) << 8) >> 8); };
  return int(unsigned(low(a) * low(b)));
}

#define SIMT_MIN_MAX(T)       \
  SIMT_MATH T min(T a, T b) { \
    return b < a ? b : a;     \
  }                           \
  SIMT_MATH T max(T a, T b) { \
    return a < b ? b : a;     \
  }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
// A NaN operand loses, as on the device.
SIMT_MATH float min(float a, float b) {
  return std::fmin(a, b);
}
SIMT_MATH float max(float a, float b) {
  return std::fmax(a, b);
}
SIMT_MATH double min(double a, double b) {
  return std::fmin(a, b);
}
SIMT_MATH double max(double a, double b) {
  return std::fmax(a, b);
}

#undef SIMT_MATH
