// Kernels whose machine code is known, for tests/cuda/test_sass_reader.py.
#include <cuda_bf16.h>

namespace cases {

enum class Kind { kPlain, kOther };

// One loop, 16 bytes at a time.
template <typename scalar_t, bool kFlag, Kind kKind, int kVec>
__global__ void relu_kernel(const scalar_t* input, scalar_t* output, int n) {
  struct alignas(16) Vector {
    scalar_t values[kVec];
  };
  const int step = gridDim.x * blockDim.x;
#pragma unroll 1
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    Vector vector = reinterpret_cast<const Vector*>(input)[i];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      vector.values[k] = scalar_t(fmaxf(float(vector.values[k]) * 3.0f, 0.0f));
    }
    reinterpret_cast<Vector*>(output)[i] = vector;
  }
}

template __global__ void relu_kernel<float, true, Kind::kOther, 4>(const float*, float*, int);
template __global__ void relu_kernel<__nv_bfloat16, false, Kind::kPlain, 8>(
    const __nv_bfloat16*, __nv_bfloat16*, int);

// Two nested loops over single elements, and one over shared memory.
__global__ void sum_kernel(const float* input, float* output, int rows, int columns) {
  __shared__ float sums[128];
  float total = 0;
#pragma unroll 1
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0;
#pragma unroll 1
    for (int column = threadIdx.x; column < columns; column += 128) {
      sum += input[row * columns + column];
    }
    total += sum * sum;
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int k = 1; k < 128; ++k) {
      total += sums[k];
    }
    output[blockIdx.x] = total;
  }
}

// An array that is indexed at run time lies in local memory.
__global__ void local_kernel(const int* index, float* output) {
  float values[200];
#pragma unroll 1
  for (int k = 0; k < 200; ++k) {
    values[index[k]] = output[k];
  }
  output[threadIdx.x] = values[index[threadIdx.x]];
}

// More values at once than the 64 registers that the launch bounds leave.
__global__ void __launch_bounds__(1024) spill_kernel(float* values) {
  float held[96];
#pragma unroll
  for (int k = 0; k < 96; ++k) {
    held[k] = values[k * 1024 + threadIdx.x];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 96; ++k) {
    values[k * 1024 + threadIdx.x] = held[95 - k] * held[(k * 7 + 5) % 96];
  }
}

// Waits: a loop that loads and computes nothing. The second loads what another block has written.
__global__ void wait_kernel(const volatile int* flag, float* output, const float* workspace) {
  while (*flag == 0) {
  }
  float sum = 0;
#pragma unroll 1
  for (int k = 0; k < *flag; ++k) {
    sum += __ldcg(workspace + k);
  }
  output[0] = sum;
}

}  // namespace cases
