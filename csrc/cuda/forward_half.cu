#include "launch_forward.cuh"

template struct bnext::cuda::ForwardLaunches<__half>;
