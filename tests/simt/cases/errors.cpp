// What a GPU leaves undefined is an error here, with the lines.
#include <cuda_fp16.h>

#include <string_view>

#include "cases.h"

namespace executor_cases {
namespace {

// Kernels leave here the lines of which an error is to speak.
int lines[2];
#define LINE(i) (lines[i] = __LINE__)

template <typename... Parameters, typename... Arguments>
void expect_error_in(
    const Where& where,
    Shape shape,
    std::vector<std::string> parts,
    int how_many_lines,
    void (*kernel)(Parameters...),
    Arguments... arguments) {
  for_seeds([&] {
    std::string message = "(no error)";
    try {
      launch(shape, kernel, arguments...);
    } catch (const simt::Error& error) {
      message = error.what();
    }
    std::vector<std::string> expected = parts;
    for (int i = 0; i < how_many_lines; ++i) {
      expected.push_back("errors.cpp:" + std::to_string(lines[i]));
    }
    for (const std::string& part : expected) {
      check(message.find(part) != message.npos, "'" + part + "' is not in: " + message, where);
    }
  });
}

template <typename... Parameters>
void expect_error(
    Shape shape,
    std::vector<std::string> parts,
    int how_many_lines,
    void (*kernel)(Parameters...),
    std::type_identity_t<Parameters>... arguments) {
  expect_error_in(Where::current(), shape, parts, how_many_lines, kernel, arguments...);
}

__global__ void barrier_or_exit() {
  if (threadIdx.x == 7) return;
  LINE(0), __syncthreads();
}

__global__ void one_of_two_barriers() {
  if (threadIdx.x == 7) {
    LINE(0), __syncthreads();
  } else {
    LINE(1), __syncthreads();
  }
}

void divergent_barriers() {
  expect_error({1, 64}, {"__syncthreads", "exited"}, 1, barrier_or_exit);
  expect_error({1, 64}, {"waits in another __syncthreads"}, 2, one_of_two_barriers);
}

__global__ void lane_exits() {
  if (threadIdx.x == 3) return;
  LINE(0), __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void lane_elsewhere() {
  if (threadIdx.x == 3) {
    LINE(0), __syncwarp();
  } else {
    LINE(1), __syncwarp();
  }
}

__global__ void lane_at_barrier() {
  if (threadIdx.x == 3) {
    LINE(0), __syncthreads();
  } else {
    LINE(1), __ballot_sync(0xffffffffu, 1);
  }
}

__global__ void other_masks() {
  LINE(0), __syncwarp(threadIdx.x == 3 ? 0xffu : 0xffffu);
}

__global__ void not_in_own_mask() {
  LINE(0), __shfl_sync(0xffu, 1, 0);
}

__global__ void reads_outside_of_mask() {
  if (threadIdx.x < 16) LINE(0), __shfl_down_sync(0xffffu, 1, 1u);
}

__global__ void whole_warps() {
  if (threadIdx.x >= 32) LINE(0), __ballot_sync(0xffffffffu, 1);
}

__global__ void wrong_width() {
  LINE(0), __shfl_sync(0xffffffffu, 1, 0, 12);
}

void warps() {
  expect_error({1, 32}, {"exited", "thread (3,0,0)"}, 1, lane_exits);
  expect_error({1, 32}, {"__syncwarp", "thread (3,0,0)"}, 2, lane_elsewhere);
  expect_error({1, 32}, {"vote", "__syncthreads"}, 2, lane_at_barrier);
  expect_error({1, 16}, {"0x000000ff", "0x0000ffff"}, 1, other_masks);
  expect_error({1, 32}, {"does not name its own lane"}, 1, not_in_own_mask);
  expect_error({1, 32}, {"reads lane 16, which is not in the mask"}, 1, reads_outside_of_mask);
  expect_error({1, 32}, {"the width 12"}, 1, wrong_width);
  expect_error({1, 40}, {"names lane 8, which the block lacks"}, 1, whole_warps);
}

__global__ void waits_for_ever(unsigned* flag, bool sleep) {
  while (LINE(0), atomicAdd(flag, 0u) == 0) {
    if (sleep) LINE(0), __nanosleep(100);
  }
}

// Two groups of lanes, each of which waits for a lane of the other.
__global__ void circle() {
  unsigned lane = threadIdx.x;
  if (lane == 0) LINE(0), __syncwarp(0x3u);
  if (lane == 1) __syncwarp(0x6u);
  if (lane == 2) LINE(1), __syncwarp(0x5u);
}

void deadlocks() {
  unsigned flag = 0;
  expect_error({2, 32}, {"deadlock", "change of memory"}, 1, waits_for_ever, &flag, true);
  expect_error({2, 32, 0, true}, {"deadlock", "change of memory"}, 1, waits_for_ever, &flag, false);
  expect_error({1, 3}, {"deadlock", "warp operation"}, 2, circle);
}

__global__ void wide_load(const float* from, float4* to) {
  LINE(0), __stcs(to, __ldg(reinterpret_cast<const float4*>(from)));
}

__global__ void small_store(__half* to) {
  LINE(0), __stcg(to, __float2half(1.0f));
}

void addresses() {
  alignas(16) float from[8] = {};
  float4 to;
  expect_error({1, 1}, {"load of 16 bytes", "not aligned"}, 1, wide_load, from + 1, &to);
  simt::register_memory(from, sizeof(from));
  std::vector<std::string> outside{"store of 16 bytes", "outside of the memory"};
  expect_error({1, 1}, outside, 1, wide_load, from, &to);
  simt::register_memory(&to, sizeof(to));
  check(launch({1, 1}, wide_load, from, &to) == 0, "within the memory");
  // One byte of two.
  auto* end = reinterpret_cast<__half*>(from) + 16;
  expect_error({1, 1}, {"store of 2 bytes", "outside"}, 1, small_store, end);
  simt::clear_memory();
}

__global__ void write_shared(unsigned index) {
  bnext_shared[index] = 1;
}

void behind_dynamic_shared_memory() {
  check(launch({2, 32, 100}, write_shared, 99u) == 0, "the last byte");
  expect_error({1, 32, 100}, {"behind its 100 bytes"}, 0, write_shared, 100u);
}

__global__ void nothing() {}
__global__ void nothing_else() {}

void bad_configurations() {
  const auto invalid = cudaErrorInvalidConfiguration;
  check(launch({0, 32}, nothing) == invalid, "no blocks");
  check(launch({1, 0}, nothing) == invalid, "no threads");
  check(launch({1, 1025}, nothing) == invalid, "too many threads");
  check(launch({1, {1, 1, 65}}, nothing) == invalid, "too many threads in z");
  check(launch({{1, 65536}, 32}, nothing) == invalid, "too many blocks in y");
  check(cudaPeekAtLastError() == invalid && cudaGetLastError() == invalid, "the last error");
  check(cudaGetLastError() == cudaSuccess, "no error any more");

  check(launch({1, 32, (48 << 10) + 1}, nothing) == cudaErrorInvalidValue, "shared memory");
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(nothing, attribute, 1 << 20) == cudaErrorInvalidValue, "never");
  check(cudaFuncSetAttribute(nothing, attribute, 64 << 10) == cudaSuccess, "raise the limit");
  check(launch({1, 32, 64 << 10}, nothing) == cudaSuccess, "within the raised limit");
  check(launch({1, 32, 64 << 10}, nothing_else) == cudaErrorInvalidValue, "of another kernel");

  Shape cooperative{32, 256, 0, true};
  check(launch(cooperative, nothing) == cudaSuccess, "as many as fit at once");
  cooperative.grid = 33;
  check(launch(cooperative, nothing) == cudaErrorCooperativeLaunchTooLarge, "one too many");
  check(std::string_view(cudaGetErrorName(invalid)) == "cudaErrorInvalidConfiguration", "name");
  cudaGetLastError();
}

// A launch after one that failed starts afresh.
void after_an_error() {
  for (int i = 0; i < 20; ++i) {
    try {
      launch({2, 64, 1000}, barrier_or_exit);
      check(false, "no error");
    } catch (const simt::Error&) {
    }
    check(launch({2, 64}, nothing) == cudaSuccess, "launch");
  }
}

}  // namespace

std::vector<Case> error_cases() {
  return {
      {"divergent_barriers", divergent_barriers},
      {"warps", warps},
      {"deadlocks", deadlocks},
      {"addresses", addresses},
      {"behind_dynamic_shared_memory", behind_dynamic_shared_memory},
      {"bad_configurations", bad_configurations},
      {"after_an_error", after_an_error},
  };
}

}  // namespace executor_cases
