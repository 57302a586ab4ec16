// Every kernel. Includes no torch type and launches nothing: a plain .cu file with a main() can use
// it together with launch_config.h (tests/simt/standalone.cu does).
#pragma once

#include "backward_kernels.cuh"
#include "backward_on_chip.cuh"
#include "fold_kernels.cuh"
#include "forward_kernels.cuh"
#include "forward_on_chip.cuh"
