// Global memory: loads and stores with a cache hint (counted and checked), atomics, fences.
#pragma once

#include <vector_types.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "thread.h"

struct __half;
struct __half2;
struct __nv_bfloat16;
struct __nv_bfloat162;

#pragma GCC visibility push(hidden)

namespace simt {

// Accesses by the binary logarithm of their bytes: 1, 2, 4, 8, 16. `slow`: check the address too.
struct AccessCounts {
  unsigned long long loads[5];
  unsigned long long stores[5];
  bool slow;
};
extern AccessCounts access_counts;

enum class Access : unsigned char { kLoad, kStore, kAtomic };

void slow_access(Access access, const volatile void* address, unsigned bytes, const Site& site);
void before_atomic(const volatile void* address, unsigned bytes, const Site& site);
void after_atomic(const volatile void* address, bool changed);
void fence();
void poll(const Site& site);

template <typename T>
concept Loaded = OneOf<
                     T,
                     char,
                     signed char,
                     unsigned char,
                     short,
                     unsigned short,
                     int,
                     unsigned,
                     long,
                     unsigned long,
                     long long,
                     unsigned long long,
                     float,
                     double,
                     __half,
                     __half2,
                     __nv_bfloat16,
                     __nv_bfloat162> ||
                 OneOf<
                     T,
                     char2,
                     char4,
                     uchar2,
                     uchar4,
                     short2,
                     short4,
                     ushort2,
                     ushort4,
                     int2,
                     int4,
                     uint2,
                     uint4,
                     float2,
                     float4,
                     double2,
                     longlong2,
                     ulonglong2>;

template <typename T>
concept AtomicInteger = OneOf<T, int, unsigned, unsigned long long>;

template <Access access>
inline void note(const void* address, unsigned bytes, const Site& site) {
#if !defined(__SANITIZE_THREAD__)  // there the counters would be shared data of the threads
  if (!access_counts.slow && reinterpret_cast<std::uintptr_t>(address) % bytes == 0) [[likely]] {
    auto* counts = access == Access::kLoad ? access_counts.loads : access_counts.stores;
    ++counts[std::countr_zero(bytes)];
    return;
  }
#endif
  slow_access(access, address, bytes, site);
}

template <typename T>
inline T load(const T* address, const Site& site) {
  note<Access::kLoad>(address, sizeof(T), site);
  return *address;
}

template <typename T>
inline void store(T* address, const T& value, const Site& site) {
  note<Access::kStore>(address, sizeof(T), site);
  *address = value;
}

template <typename T, typename F>
inline T atomic(T* address, const Site& site, F update) {
  before_atomic(address, sizeof(T), site);
  // Relaxed, so that ThreadSanitizer takes no order from it: that is what fences are for. Fibers
  // share an OS thread, so nobody comes between.
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  T next = update(old);
  __atomic_store_n(address, next, __ATOMIC_RELAXED);
  after_atomic(address, next != old);
  return old;
}

}  // namespace simt

#define SIMT_LOAD(name)                                                             \
  template <simt::Loaded T>                                                         \
  inline T name(const T* address, const simt::Site& site = simt::Site::current()) { \
    return simt::load(address, site);                                               \
  }
#define SIMT_STORE(name)                                \
  template <simt::Loaded T>                             \
  inline void name(                                     \
      T* address, const std::type_identity_t<T>& value, \
      const simt::Site& site = simt::Site::current()) { \
    simt::store(address, value, site);                  \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcv)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stcs)
SIMT_STORE(__stcg)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_LOAD
#undef SIMT_STORE

// Integers only: the order of floating-point atomics would show in the result.
#define SIMT_ATOMIC(name, expression)                                                              \
  template <simt::AtomicInteger T>                                                                 \
  inline T name(                                                                                   \
      T* address, std::type_identity_t<T> value, const simt::Site& site = simt::Site::current()) { \
    return simt::atomic(address, site, [value](T old) -> T { return expression; });                \
  }
SIMT_ATOMIC(atomicExch, (static_cast<void>(old), value))
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicMin, old < value ? old : value)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
// The sums wrap around, for int as well.
SIMT_ATOMIC(atomicAdd, T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value)))
SIMT_ATOMIC(atomicSub, T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(value)))
#undef SIMT_ATOMIC

template <simt::AtomicInteger T>
inline T atomicCAS(
    T* address,
    std::type_identity_t<T> compare,
    std::type_identity_t<T> value,
    const simt::Site& site = simt::Site::current()) {
  return simt::atomic(address, site, [=](T old) -> T { return old == compare ? value : old; });
}

inline void __threadfence() {
  simt::fence();
}
inline void __threadfence_system() {
  simt::fence();
}
// Orders nothing between blocks; within one, barriers do.
inline void __threadfence_block() {
  asm volatile("" ::: "memory");
}

inline void __nanosleep(unsigned, const simt::Site& site = simt::Site::current()) {
  simt::poll(site);
}

#pragma GCC visibility pop
