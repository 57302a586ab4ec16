// Marks the functions of core/ that both the host compiler and nvcc compile.
#pragma once

// Always inlined on the host: csrc/cpu compiles core/ once per instruction set, and the linker must
// not be left to pick one of several copies of a function.
#if defined(__CUDACC__)
#define BNEXT_HD __host__ __device__
#else
#define BNEXT_HD __attribute__((always_inline))
#endif

// Before a loop whose count is known at compile time and whose arrays shall live in registers.
// And before one that shall stay a loop.
#if defined(__CUDACC__)
#define BNEXT_UNROLL _Pragma("unroll")
#define BNEXT_NO_UNROLL _Pragma("unroll 1")
#else
#define BNEXT_UNROLL
#define BNEXT_NO_UNROLL
#endif
