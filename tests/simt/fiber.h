// Stacks, and the switch from one to another. The sanitizers are told of both when they are there.
#pragma once

#include <cstddef>

#pragma GCC visibility push(hidden)

namespace simt {

// A flow of control: the launching one or a CUDA thread's.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // For the flow of control that calls it.
  void adopt_current();
  // Ready to run `entry`, which must not return, on stack number `stack` of the pool.
  void prepare(std::size_t stack, void (*entry)());
  // Its stack may be used again. Nothing on it is destroyed.
  void abandon();
  // After a launch. ThreadSanitizer takes a fiber for the same as an earlier one that was
  // destroyed.
  static void destroy_abandoned();
  // To be called first by an entry.
  void entered();
  // From this fiber, which runs, to another. `last`: this fiber will not be switched to again.
  void switch_to(Fiber& next, bool last);
  // ThreadSanitizer's.
  void* tsan_fiber() const { return tsan_fiber_; }

 private:
  void* position_ = nullptr;  // stack pointer, or ucontext_t
  char* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_fiber_ = nullptr;
  bool owns_tsan_fiber_ = false;
};

}  // namespace simt

#pragma GCC visibility pop
