// The threads that share the work of one call. They are woken once for all its steps: waking a
// thread that sleeps can take longer than half a step does, and what a late one would have done,
// those that are awake have then done for it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "../core/layout.h"

namespace bnext::cpu {

// Stores past the caches are not in order with others: this is for the thread that made them,
// before another may read. It waits for all of them, too long for once a piece.
inline void finish_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Calls body(worker) for workers 0 .. n - 1, in as many threads as there are. No worker may wait
// for another to start.
template <typename F>
void run_workers(std::int64_t n, const F& body) {
  at::parallel_for(0, n, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker) {
      body(worker);
    }
    finish_streams();
  });
}

inline std::int64_t num_workers(std::int64_t items) {
  return at::in_parallel_region() ? 1 : std::min<std::int64_t>(at::get_num_threads(), items);
}

enum class Walk { kForward, kBackward };

// The items of one step. Each worker has a share of them, whose data its cache may hold from the
// step before, and takes from the others' when it is through.
class StepItems {
 public:
  StepItems(std::int64_t items, std::int64_t workers, Walk walk = Walk::kForward)
      : items_(items), workers_(workers), walk_(walk), shares_(new Share[workers]) {}

  // Calls f(item) for every item that this worker takes; returns when all items are finished,
  // whoever took them.
  template <typename F>
  void run(std::int64_t worker, F&& f) {
    for (std::int64_t i = 0; i < workers_; ++i) {
      const std::int64_t share = (worker + i) % workers_;
      const Range range = split_range(items_, workers_, share);
      std::atomic<std::int64_t>& taken = shares_[share].taken;
      for (std::int64_t n; (n = taken.fetch_add(1, std::memory_order_relaxed)) < range.size();) {
        const Finish finish{finished_};
        f(walk_ == Walk::kForward ? range.begin + n : range.end - 1 - n);
      }
    }
    wait();
  }

 private:
  struct alignas(64) Share {  // a cache line each
    std::atomic<std::int64_t> taken{0};
  };

  // An item that throws is finished as well: the others wait for it.
  struct Finish {
    std::atomic<std::int64_t>& finished;
    ~Finish() { finished.fetch_add(1, std::memory_order_release); }
  };

  // Others are at work on the last items, each a small part of the step: not worth a sleep.
  void wait() const {
    constexpr int kSpins = 4096;
    for (int spin = 0; finished_.load(std::memory_order_acquire) < items_; ++spin) {
      if (spin >= kSpins) {
        std::this_thread::yield();  // more threads than cores
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

  std::int64_t items_;
  std::int64_t workers_;
  Walk walk_;
  std::unique_ptr<Share[]> shares_;
  std::atomic<std::int64_t> finished_{0};
};

}  // namespace bnext::cpu
