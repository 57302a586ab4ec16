#include "shadow.h"

#include "sanitizers.h"

namespace simt {

void forget_accesses(const void* address, std::size_t bytes) {
  if (!under_tsan()) return;
  // The interface for the Java heap is the one that resets a range, in fact one at any address. The
  // heap is declared tiny, since reports walk through it.
  static bool initialised = false;
  if (!initialised) __tsan_java_init(8, 8);
  initialised = true;
  auto begin = (reinterpret_cast<std::uintptr_t>(address) + 7) & ~std::uintptr_t(7);
  auto end = (reinterpret_cast<std::uintptr_t>(address) + bytes) & ~std::uintptr_t(7);
  if (begin >= end) return;
  __tsan_java_free(begin, end - begin);
  __tsan_java_alloc(begin, end - begin);
}

void poison(const void* address, std::size_t bytes) {
  if (under_asan()) __asan_poison_memory_region(address, bytes);
}

void unpoison(const void* address, std::size_t bytes) {
  if (under_asan()) __asan_unpoison_memory_region(address, bytes);
}

void fill_unseen(void* to, int value, std::size_t bytes) {
#if defined(__x86_64__)
  asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
#else
  auto* bytes_to = static_cast<volatile unsigned char*>(to);
  for (std::size_t i = 0; i < bytes; ++i) bytes_to[i] = static_cast<unsigned char>(value);
#endif
}

void copy_unseen(void* to, const void* from, std::size_t bytes) {
#if defined(__x86_64__)
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
#else
  auto* bytes_to = static_cast<volatile unsigned char*>(to);
  auto* bytes_from = static_cast<const volatile unsigned char*>(from);
  for (std::size_t i = 0; i < bytes; ++i) bytes_to[i] = bytes_from[i];
#endif
}

}  // namespace simt
