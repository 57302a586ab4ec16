// The sanitizers' interfaces. They are weak, so the same object file links with and without them.
// The executor itself is never compiled with ThreadSanitizer: its own data would be seen as shared.
#pragma once

#include <cstddef>

extern "C" {
#define SIMT_WEAK __attribute__((weak))
SIMT_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t);
SIMT_WEAK void __sanitizer_finish_switch_fiber(
    void* fake_stack, const void** old_bottom, std::size_t* old_size);
SIMT_WEAK void __asan_poison_memory_region(const volatile void*, std::size_t);
SIMT_WEAK void __asan_unpoison_memory_region(const volatile void*, std::size_t);

SIMT_WEAK void* __tsan_get_current_fiber();
SIMT_WEAK void* __tsan_create_fiber(unsigned flags);
SIMT_WEAK void __tsan_destroy_fiber(void* fiber);
SIMT_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
SIMT_WEAK void __tsan_ignore_thread_begin();
SIMT_WEAK void __tsan_ignore_thread_end();
SIMT_WEAK void __tsan_acquire(void* address);
SIMT_WEAK void __tsan_release(void* address);
SIMT_WEAK void __tsan_java_init(unsigned long begin, unsigned long bytes);
SIMT_WEAK void __tsan_java_alloc(unsigned long address, unsigned long bytes);
SIMT_WEAK void __tsan_java_free(unsigned long address, unsigned long bytes);
#undef SIMT_WEAK
}

namespace simt {

inline bool under_tsan() {
  return __tsan_create_fiber != nullptr;
}
inline bool under_asan() {
  return __sanitizer_start_switch_fiber != nullptr && !under_tsan();
}

}  // namespace simt
