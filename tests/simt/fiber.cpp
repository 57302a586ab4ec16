#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "sanitizers.h"
#include "shadow.h"

// Registers are switched by hand where we know how: about 10 times as fast as swapcontext, which
// makes a system call for the signal mask.
#if !defined(SIMT_UCONTEXT) && !(defined(__x86_64__) && defined(__linux__))
#define SIMT_UCONTEXT
#endif

#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#else
// System V ABI: a call preserves rbx, rbp, r12 to r15 and the control words of SSE and x87. An
// indirect jump returns, since the processor's stack of return addresses holds the wrong one.
extern "C" void simt_switch_stack(void** old_position, void* new_position);
asm(R"(
.text
.p2align 4
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size simt_switch_stack, .-simt_switch_stack
)");
#endif

namespace simt {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStacksPerSlab = 64;
// Each guard page splits a mapping, and Linux allows 65530 mappings in a process.
constexpr std::size_t kGuardedStacks = 8192;

// Reports of the sanitizers are written on the stack at fault.
std::size_t stack_bytes() {
  return (under_asan() || under_tsan() ? 256 : 64) << 10;
}

std::vector<void*> abandoned_tsan_fibers;

// Never unmapped: launches reuse the stacks, and pages never touched take no memory.
char* pool_stack(std::size_t number) {
  static std::vector<char*> slabs;
  std::size_t stride = stack_bytes() + kPage;
  while (slabs.size() * kStacksPerSlab <= number) {
    void* slab = mmap(
        nullptr, stride * kStacksPerSlab, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    if (slabs.size() * kStacksPerSlab < kGuardedStacks) {
      for (std::size_t i = 0; i < kStacksPerSlab; ++i) {
        mprotect(static_cast<char*>(slab) + i * stride, kPage, PROT_NONE);
      }
    }
    slabs.push_back(static_cast<char*>(slab));
  }
  return slabs[number / kStacksPerSlab] + number % kStacksPerSlab * stride + kPage;
}

}  // namespace

Fiber::~Fiber() {
  abandon();
#if defined(SIMT_UCONTEXT)
  delete static_cast<ucontext_t*>(position_);
#endif
}

void Fiber::adopt_current() {
#if defined(SIMT_UCONTEXT)
  if (position_ == nullptr) position_ = new ucontext_t;
#endif
  if (under_tsan()) tsan_fiber_ = __tsan_get_current_fiber();
  if (under_asan()) {
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &stack_bytes_);
    pthread_attr_destroy(&attributes);
    stack_ = static_cast<char*>(stack);
  }
}

void Fiber::prepare(std::size_t stack, void (*entry)()) {
  stack_ = pool_stack(stack);
  stack_bytes_ = stack_bytes();
  fake_stack_ = nullptr;
  if (under_asan()) __asan_unpoison_memory_region(stack_, stack_bytes_);
  if (under_tsan()) {
    forget_accesses(stack_, stack_bytes_);
    tsan_fiber_ = __tsan_create_fiber(0);
    owns_tsan_fiber_ = true;
  }
  // Tops at different distances from a page boundary, so that they do not share sets of the cache.
  std::size_t usable = stack_bytes_ - stack % 16 * 256;
#if defined(SIMT_UCONTEXT)
  if (position_ == nullptr) position_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(position_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = usable;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#else
  // What simt_switch_stack pops. Entered by a jump, an entry finds a return address of 0, where
  // unwinding stops, 8 bytes below a multiple of 16.
  auto* top = reinterpret_cast<std::uint64_t*>(stack_ + usable) - 9;
  for (int i = 0; i < 9; ++i) top[i] = 0;
  std::uint32_t mxcsr = 0;
  std::uint16_t x87 = 0;
  asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(mxcsr), "=m"(x87));
  top[0] = mxcsr | std::uint64_t(x87) << 32;
  top[7] = reinterpret_cast<std::uint64_t>(entry);
  position_ = top;
#endif
}

void Fiber::abandon() {
  if (owns_tsan_fiber_) abandoned_tsan_fibers.push_back(tsan_fiber_);
  owns_tsan_fiber_ = false;
  if (under_asan() && stack_ != nullptr) __asan_unpoison_memory_region(stack_, stack_bytes_);
}

void Fiber::destroy_abandoned() {
  for (void* fiber : abandoned_tsan_fibers) __tsan_destroy_fiber(fiber);
  abandoned_tsan_fibers.clear();
}

void Fiber::entered() {
  if (under_asan()) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

void Fiber::switch_to(Fiber& next, bool last) {
  if (under_asan()) {
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.stack_, next.stack_bytes_);
  }
  // 1: the switch orders nothing; barriers and fences do.
  if (under_tsan()) __tsan_switch_to_fiber(next.tsan_fiber_, 1);
#if defined(SIMT_UCONTEXT)
  swapcontext(static_cast<ucontext_t*>(position_), static_cast<ucontext_t*>(next.position_));
#else
  simt_switch_stack(&position_, next.position_);
#endif
  if (under_asan()) __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
}

}  // namespace simt
