// Elements in memory to values of the accumulation type and back, 16 bytes or one element at a
// time. Every access of a kernel to global memory is made through the cached loads and stores of
// this file and of the CUDA headers: tests/simt counts them there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "../core/math.h"
#include "launch_config.h"

namespace bnext::cuda {

template <typename scalar_t>
constexpr int kVectorSize = kVectorAlignment / static_cast<int>(sizeof(scalar_t));

// When what is loaded will be read again.
enum class Reuse { kSoon, kNever };

template <typename scalar_t>
__device__ __forceinline__ AccType<scalar_t> to_acc(scalar_t value) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t from_acc(AccType<scalar_t> value) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// kVec elements as they lie in memory: one load or store.
template <typename scalar_t, int kVec>
struct Raw {
  static_assert(kVec == kVectorSize<scalar_t>);
  uint4 bits;
};

template <typename scalar_t>
struct Raw<scalar_t, 1> {
  scalar_t bits;
};

template <Reuse kReuse, int kVec, typename scalar_t>
__device__ __forceinline__ Raw<scalar_t, kVec> load_raw(const scalar_t* p) {
  if constexpr (kVec == 1) {
    return {kReuse == Reuse::kSoon ? __ldg(p) : __ldcs(p)};
  } else {
    const uint4* vector = reinterpret_cast<const uint4*>(p);
    return {kReuse == Reuse::kSoon ? __ldg(vector) : __ldcs(vector)};
  }
}

template <int kVec, typename scalar_t>
__device__ __forceinline__ void store_raw(scalar_t* p, const Raw<scalar_t, kVec>& raw) {
  if constexpr (kVec == 1) {
    __stwb(p, raw.bits);
  } else {
    __stwb(reinterpret_cast<uint4*>(p), raw.bits);
  }
}

// The same in shared memory.
template <int kVec, typename scalar_t>
__device__ __forceinline__ Raw<scalar_t, kVec> load_shared(const scalar_t* p) {
  if constexpr (kVec == 1) {
    return {*p};
  } else {
    return {*reinterpret_cast<const uint4*>(p)};
  }
}

template <int kVec, typename scalar_t>
__device__ __forceinline__ void store_shared(scalar_t* p, const Raw<scalar_t, kVec>& raw) {
  if constexpr (kVec == 1) {
    *p = raw.bits;
  } else {
    *reinterpret_cast<uint4*>(p) = raw.bits;
  }
}

template <typename scalar_t, int kVec>
__device__ __forceinline__ void unpack(
    const Raw<scalar_t, kVec>& raw, AccType<scalar_t> (&values)[kVec]) {
  if constexpr (kVec == 1) {
    values[0] = to_acc(raw.bits);
  } else if constexpr (
      std::is_same_v<scalar_t, __half> || std::is_same_v<scalar_t, __nv_bfloat16>) {
    using Pair = std::conditional_t<std::is_same_v<scalar_t, __half>, __half2, __nv_bfloat162>;
    Pair pairs[kVec / 2];
    std::memcpy(static_cast<void*>(pairs), &raw.bits, sizeof(pairs));
    BNEXT_UNROLL
    for (int i = 0; i < kVec / 2; ++i) {
      float2 both;
      if constexpr (std::is_same_v<scalar_t, __half>) {
        both = __half22float2(pairs[i]);
      } else {
        both = __bfloat1622float2(pairs[i]);
      }
      values[2 * i] = both.x;
      values[2 * i + 1] = both.y;
    }
  } else {
    std::memcpy(values, &raw.bits, sizeof(values));
  }
}

// A float rounded to nearest even, in the upper 16 bits; the lower ones are what is left of it.
__device__ __forceinline__ unsigned bfloat16_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? 0x7fffffffu : rounded;  // a NaN could carry into the sign
}

// As __floats2bfloat162_rn, which takes twice the instructions on a GPU that has none for it.
__device__ __forceinline__ unsigned round_to_bfloat16_pair(float low, float high) {
  return __byte_perm(bfloat16_bits(low), bfloat16_bits(high), 0x7632);
}

__device__ __forceinline__ unsigned bfloat16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return round_to_bfloat16_pair(low, high);
#else
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned bits;
  std::memcpy(&bits, static_cast<const void*>(&pair), sizeof(bits));
  return bits;
#endif
}

template <typename scalar_t, int kVec>
__device__ __forceinline__ Raw<scalar_t, kVec> pack(const AccType<scalar_t> (&values)[kVec]) {
  Raw<scalar_t, kVec> raw;
  if constexpr (kVec == 1) {
    raw.bits = from_acc<scalar_t>(values[0]);
  } else if constexpr (std::is_same_v<scalar_t, __half>) {
    __half2 pairs[kVec / 2];
    BNEXT_UNROLL
    for (int i = 0; i < kVec / 2; ++i) {
      pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    }
    std::memcpy(&raw.bits, pairs, sizeof(pairs));
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    unsigned pairs[kVec / 2];
    BNEXT_UNROLL
    for (int i = 0; i < kVec / 2; ++i) {
      pairs[i] = bfloat16_pair(values[2 * i], values[2 * i + 1]);
    }
    std::memcpy(&raw.bits, pairs, sizeof(pairs));
  } else {
    std::memcpy(&raw.bits, values, sizeof(values));
  }
  return raw;
}

}  // namespace bnext::cuda
