// CUDA's own header, whichever of it and cuda_runtime.h a file includes first.
#pragma once

#include_next <cuda_bf16.h>
#include <cuda_runtime.h>
