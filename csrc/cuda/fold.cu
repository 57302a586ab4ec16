// The kernels between reduce and apply: C-sized.
#include "fold_kernels.cuh"
#include "launch.cuh"

namespace bnext::cuda {
namespace {

template <typename Args>
cudaError_t start_threads(
    void (*kernel)(Args), const Args& args, std::int64_t threads, cudaStream_t stream) {
  const std::int64_t blocks = fold_blocks(threads);
  if (blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  return start(
      kernel, args, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kFlagBytes,
      /*cooperative=*/false, stream);
}

}  // namespace

cudaError_t launch_merge(const MergeArgs& args, cudaStream_t stream) {
  return start_threads(&merge_kernel, args, args.n_channel, stream);
}

template <typename scalar_t>
cudaError_t FoldLaunches<scalar_t>::fold(const FoldArgs<scalar_t>& args, cudaStream_t stream) {
  return start_threads(&fold_kernel<scalar_t>, args, args.sets.n_channel, stream);
}

template <typename scalar_t>
cudaError_t FoldLaunches<scalar_t>::grad_fold(
    const GradFoldArgs<scalar_t>& args, cudaStream_t stream) {
  return start_threads(&grad_fold_kernel<scalar_t>, args, args.num_ghosts * args.n_channel, stream);
}

template struct FoldLaunches<float>;
template struct FoldLaunches<double>;
template struct FoldLaunches<__half>;
template struct FoldLaunches<__nv_bfloat16>;

}  // namespace bnext::cuda
