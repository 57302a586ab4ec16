// csrc/cuda/launch_state: what launches of several threads and streams share, and what they do not.
#include "../../../csrc/cuda/launch_state.h"

#include <thread>

#include "cases.h"

namespace executor_cases {
namespace {

using bnext::cuda::opt_in_to_shared;
using bnext::cuda::StreamCounters;

__global__ void one_kernel() {}

template <typename F>
int limit_of(F* kernel) {
  cudaFuncAttributes attributes;
  check_equal(cudaFuncGetAttributes(&attributes, kernel), cudaSuccess, "attributes");
  return attributes.maxDynamicSharedSizeBytes;
}

// A thread that launches with less must not lower the limit of one that is about to launch with
// more.
void shared_limit_is_never_lowered() {
  const auto* kernel = reinterpret_cast<const void*>(&one_kernel);
  check_equal(opt_in_to_shared(kernel, 48 << 10), cudaSuccess, "no opt-in needed");
  check_equal(limit_of(&one_kernel), 48 << 10, "the limit without");
  check_equal(opt_in_to_shared(kernel, 100 << 10), cudaSuccess, "large");
  check_equal(opt_in_to_shared(kernel, 50 << 10), cudaSuccess, "smaller, by another thread");
  check_equal(launch({1, 32, 100 << 10}, one_kernel), cudaSuccess, "the large launch");
  check_equal(limit_of(&one_kernel), 163 << 10, "the device's most");
}

unsigned* counters_for(StreamCounters& all, cudaStream_t stream, std::int64_t n = 10) {
  unsigned* counters = nullptr;
  check_equal(all.get(0, stream, n, &counters), cudaSuccess, "counters");
  return counters;
}

void counters_of_streams() {
  StreamCounters all;
  unsigned* const first = counters_for(all, nullptr);
  check(counters_for(all, nullptr) == first, "launches of a stream share their counters");
  for (int i = 0; i < 10; ++i) check_equal(first[i], 0u, "a counter");
  check(counters_for(all, nullptr, 5000) != first, "more than there were");
  first[0] = 1;  // a kernel that still runs
  check_equal(counters_for(all, nullptr, 9000)[0], 0u, "a counter of the larger block");
  check_equal(first[0], 1u, "a counter of the block that was outgrown");

  cudaStream_t stream;
  check_equal(cudaStreamCreate(&stream), cudaSuccess, "create");
  unsigned* const old = counters_for(all, stream);
  const cudaStream_t handle = stream;
  cudaStreamDestroy(stream);
  cudaStreamCreate(&stream);
  check(stream == handle, "the executor gives a handle out again");
  check(counters_for(all, stream) != old, "another stream has the handle");
  cudaStreamDestroy(stream);

  unsigned *mine = counters_for(all, cudaStreamPerThread), *theirs = nullptr;
  std::thread([&] { theirs = counters_for(all, cudaStreamPerThread); }).join();
  check(mine != theirs, "each thread has a stream of its own");
}

// Another thread captures in CUDA's global mode, which forbids cudaMalloc in all threads.
void counters_while_others_capture() {
  StreamCounters all;
  simt::set_capturing(true);
  void* memory = nullptr;
  check_equal(cudaMalloc(&memory, 1), cudaErrorStreamCaptureUnsupported, "cudaMalloc");
  check(counters_for(all, nullptr) != nullptr, "counters all the same");
  check_equal(cudaMalloc(&memory, 1), cudaErrorStreamCaptureUnsupported, "the mode is restored");
  simt::set_capturing(false);
}

}  // namespace

std::vector<Case> launch_state_cases() {
  return {
      {"shared_limit_is_never_lowered", shared_limit_is_never_lowered},
      {"counters_of_streams", counters_of_streams},
      {"counters_while_others_capture", counters_while_others_capture},
  };
}

}  // namespace executor_cases
