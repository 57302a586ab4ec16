// The qualifiers of CUDA C++ as the executor understands them: a kernel is a plain function.
#pragma once

// The toolkit's headers would include the toolkit's own beside them.
#define __HOST_DEFINES_H__

// libstdc++ writes __attribute__((__noinline__)), which the macro below would break.
#include <memory>

#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __device_builtin__
#define __cudart_builtin__
#define CUDARTAPI

// The one storage class that is valid after `extern`, in a function and in a template alike. Blocks
// take turns on one OS thread, so it is one copy; the module's TLS segment is what they share.
#define __shared__ thread_local
