// CUDA's own header, whichever of it and cuda_runtime.h a file includes first.
#pragma once

#include <cuda_runtime.h>

#include_next <cuda_bf16.h>
