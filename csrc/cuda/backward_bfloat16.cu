#include "launch_backward.cuh"

template struct bnext::cuda::BackwardLaunches<__nv_bfloat16>;
