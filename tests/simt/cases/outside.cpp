// Accesses that AddressSanitizer and UBSan are to stop: the process ends in them.
#include "cases.h"

namespace executor_cases {
namespace {

__global__ void write_dynamic(unsigned index) {
  bnext_shared[index] = 1;
}

__global__ void write_static(unsigned index) {
  __shared__ float fixed[32];
  fixed[index] = 1;
}

__global__ void read_global(const float* from, float* to) {
  float value = __ldg(from + threadIdx.x);
  if (value == 1) __stcs(to, value);
}

__device__ __noinline__ void fill(int* values, unsigned count) {
  for (unsigned i = 0; i < count; ++i) values[i] = int(i);
}

__global__ void write_local(unsigned count, int* to) {
  int values[8];
  fill(values, count);
  __syncthreads();
  if (threadIdx.x == 0) __stcs(to, values[0]);
}

}  // namespace

std::vector<Case> outside_cases() {
  return {
      {"outside_of_dynamic_shared", [] { launch({2, 32, 100}, write_dynamic, 100u); }},
      {"outside_of_static_shared", [] { launch({1, 32}, write_static, 32u); }},
      {"outside_of_global",
       [] {
    std::vector<float> from(31);
    float to = 0;
    launch({1, 32}, read_global, from.data(), &to);
  }},
      {"outside_of_local",
       [] {
    int to = 0;
    launch({1, 32}, write_local, 9u, &to);
  }},
  };
}

}  // namespace executor_cases
