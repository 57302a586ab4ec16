// What launches keep between them, by plain CUDA: no tensor, no kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace bnext::cuda {

// Lets a kernel take that much dynamic shared memory on the current device. What is set is the most
// that the device gives any kernel, once: a limit set for each launch could be lowered by another
// thread just before this one's launch.
cudaError_t opt_in_to_shared(const void* kernel, int shared_bytes);

// Counters that are zero before every launch, which leaves them so: launches of one stream follow
// each other, so one block of counters serves all of them, and no launch is spent on zeroing.
class StreamCounters {
 public:
  // n counters for launches on a stream that is not being captured. Their memory is CUDA's own:
  // torch's allocator may be inside the pool of a CUDA graph (torch.compile, "reduce-overhead"),
  // which would count a block that is kept as leaked, or hand it out again.
  cudaError_t get(int device, cudaStream_t stream, std::int64_t n, unsigned** counters);

  // For tests: f(counters, how many) for every block.
  template <typename F>
  void each(F&& f) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [key, block] : blocks_) {
      f(block.counters, block.size);
    }
  }

 private:
  struct Block {
    unsigned* counters = nullptr;
    std::int64_t size = 0;
  };
  // By the stream's number, not its handle: that of the per-thread stream is the same in every
  // thread, and that of a stream that was destroyed may come again while its last kernel runs.
  using Key = std::pair<int, unsigned long long>;
  std::mutex mutex_;
  std::map<Key, Block> blocks_;
};

StreamCounters& stream_counters();

}  // namespace bnext::cuda
