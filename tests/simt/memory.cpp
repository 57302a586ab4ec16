// Accesses to global memory, and what orders them.
#include <algorithm>
#include <bit>
#include <new>

#include "sanitizers.h"
#include "scheduler.h"
#include "settings.h"
#include "shadow.h"

namespace simt {

AccessCounts access_counts;

namespace {

// A thread whose atomics change nothing, so many in a row, is taken to wait for a change.
constexpr unsigned kUnchangedToPoll = 4;

const char* name(Access access) {
  switch (access) {
    case Access::kLoad:
      return "load";
    case Access::kStore:
      return "store";
    default:
      return "atomic";
  }
}

bool is_registered(std::uintptr_t address, unsigned bytes) {
  auto after = settings.memory.upper_bound(address);
  return after != settings.memory.begin() && address + bytes <= std::prev(after)->second;
}

void check(Access access, const volatile void* pointer, unsigned bytes, const Site& site) {
  Unseen unseen;
  Thread& thread = current_thread();
  auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const char* wrong = nullptr;
  if (address % bytes != 0) wrong = " is not aligned";
  if (!settings.memory.empty() && !is_registered(address, bytes)) {
    wrong = " is outside of the memory it may use";
  }
  if (wrong == nullptr) return;
  launch_in_progress->fail(
      std::string(name(access)) + " of " + std::to_string(bytes) + " bytes at " + to_string(site) +
      " by " + to_string(thread) + ": the address" + wrong);
}

// Everything before the fence, and nothing after it, is to be ordered before what acquires
// `address`. A thread of ThreadSanitizer with no past passes on what the fence left in the token.
void release_as_of_fence(Thread& thread, void* address) {
  void* self = __tsan_get_current_fiber();
  // Created by the launching one, since a creator's past is passed on too.
  __tsan_switch_to_fiber(launch_in_progress->launcher().tsan_fiber(), 1);
  void* messenger = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(messenger, 1);
  thread.fence_token.acquire();
  __tsan_release(address);
  __tsan_switch_to_fiber(self, 1);
  __tsan_destroy_fiber(messenger);
}

}  // namespace

void slow_access(Access access, const volatile void* address, unsigned bytes, const Site& site) {
  check(access, address, bytes, site);
  int size = std::countr_zero(bytes);
  if (access == Access::kLoad) {
    ++access_counts.loads[size];
  } else {
    ++access_counts.stores[size];
    current_thread().stored_since_fence = true;
  }
}

void before_atomic(const volatile void* address, unsigned bytes, const Site& site) {
  Thread& thread = current_thread();
  check(Access::kAtomic, address, bytes, site);
  ++settings.atomics;
  if (thread.unchanged_atomics >= kUnchangedToPoll) {
    launch_in_progress->poll(site);
  } else if (launch_in_progress->draws(2)) {
    thread.site = site;
    launch_in_progress->yield();
  }
}

void after_atomic(const volatile void* address, bool changed) {
  Thread& thread = current_thread();
  if (changed) {
    launch_in_progress->note_progress();
    thread.unchanged_atomics = 0;
  } else if (thread.unchanged_atomics < kUnchangedToPoll) {
    ++thread.unchanged_atomics;
  }
  if (!under_tsan()) return;
  // Now rather than before, so that the atomic itself is ordered too: the last block may then reset
  // a counter by a plain store.
  void* sync = const_cast<void*>(address);
  if (thread.fenced && thread.stored_since_fence) release_as_of_fence(thread, sync);
  if (thread.fenced && !thread.stored_since_fence) __tsan_release(sync);
  Unseen unseen;
  auto& seen = thread.atomics_since_fence;
  if (std::find(seen.begin(), seen.end(), address) == seen.end()) seen.push_back(address);
}

void fence() {
  Thread& thread = current_thread();
  asm volatile("" ::: "memory");
  if (!under_tsan()) return;
  for (const volatile void* address : thread.atomics_since_fence) {
    __tsan_acquire(const_cast<void*>(address));
  }
  thread.atomics_since_fence.clear();
  thread.fence_token.release();
  thread.fenced = true;
  thread.stored_since_fence = false;
}

void poll(const Site& site) {
  current_thread().unchanged_atomics = 0;
  launch_in_progress->poll(site);
}

}  // namespace simt
