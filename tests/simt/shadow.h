// What the sanitizers know of memory that one CUDA thread or block takes over from another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sanitizers.h"

#pragma GCC visibility push(hidden)

namespace simt {

// ThreadSanitizer: the accesses seen so far are of another life of this memory.
void forget_accesses(const void* address, std::size_t bytes);

// ThreadSanitizer: what comes before a release comes before the acquires that follow it.
class Token {
 public:
  void release() {
    if (under_tsan()) __tsan_release(&address_);
  }
  void acquire() {
    if (under_tsan()) __tsan_acquire(&address_);
  }
  // Its address is to stand for another one now.
  void reset() { forget_accesses(&address_, sizeof(address_)); }

 private:
  std::uint64_t address_ = 0;
};

// AddressSanitizer: an access is an error, or is one no longer.
void poison(const void* address, std::size_t bytes);
void unpoison(const void* address, std::size_t bytes);

// While one lives, what the executor does with its own memory (new and delete above all) is not
// taken for accesses by the running CUDA thread. None may live across a switch.
class Unseen {
 public:
  Unseen() {
    if (under_tsan()) __tsan_ignore_thread_begin();
  }
  ~Unseen() {
    if (under_tsan()) __tsan_ignore_thread_end();
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// As memset and memcpy, which the sanitizers would take for accesses by the running CUDA thread.
void fill_unseen(void* to, int value, std::size_t bytes);
void copy_unseen(void* to, const void* from, std::size_t bytes);

}  // namespace simt

#pragma GCC visibility pop
