// Found before the toolkit's header of the same name: what kernels and launchers need of CUDA C++,
// for a host compiler and the executor.
#pragma once

// The toolkit's vector_functions.h would include the toolkit's cuda_runtime_api.h beside it.
#define __CUDA_RUNTIME_API_H__

#include <crt/host_defines.h>
#include <vector_types.h>

#include <vector_functions.h>

#include "simt/math.h"
#include "simt/memory.h"
#include "simt/runtime.h"
#include "simt/thread.h"
