// For ThreadSanitizer: a kernel, clean or a mutant, under a seed.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "kernels.h"

namespace executor_cases {
namespace {

// Lane 0 writes and the others read: ordered by a __syncwarp, and not by a vote.
template <int mutant>
__global__ void through_shared(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 5;
  if (mutant == kClean) __syncwarp();
  if (mutant != kClean) __ballot_sync(0xffffffffu, 1);
  out[threadIdx.x] = value;
}

template <int mutant>
void run(const std::string& kernel) {
  if (kernel == "last_block") {
    std::vector<float> input(1000, 1.0f), partial(4);
    unsigned count = 0;
    float output = 0;
    for (int i = 0; i < 2; ++i) {
      launch({4, 64, 256}, last_block<mutant>, input.data(), partial.data(), &count, &output, 1000);
    }
  } else if (kernel == "grid_barrier") {
    std::vector<int> a(4 * 32), b(4 * 32);
    unsigned count = 0;
    launch({4, 32, 4 * 32, true}, pass_on<mutant>, a.data(), b.data(), &count);
  } else {
    std::vector<int> out(32);
    launch({1, 32}, through_shared<mutant>, out.data());
  }
}

template <int... mutants>
void run(const std::string& kernel, int mutant, std::integer_sequence<int, mutants...>) {
  ((mutant == mutants ? run<mutants>(kernel) : void()), ...);
}

}  // namespace
}  // namespace executor_cases

int main(int, char** arguments) {
  using namespace executor_cases;
  try {
    run(arguments[1], std::atoi(arguments[2]),
        std::make_integer_sequence<int, kSwappedFence + 1>());
  } catch (const simt::Error& error) {
    std::puts(error.what());  // of a mutant, after the race
  }
  std::puts("done");
}
