#include "launch_backward.cuh"

template struct bnext::cuda::BackwardLaunches<float>;
