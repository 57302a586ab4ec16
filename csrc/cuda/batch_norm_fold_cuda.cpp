// The middle step on CUDA: triples of ghosts or of processes to statistics. Counts are not checked
// as on the CPU: that would wait for the device.
#include "../ops.h"
#include "tensors_cuda.h"

namespace bnext {

Tensor3 batch_norm_merge_cuda(
    const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2) {
  check_moments(count, mean, m2);
  const cuda::DeviceScope device(mean);
  const at::Tensor counts = count.contiguous(), means = mean.contiguous(), m2s = m2.contiguous();
  const at::Tensor merged_count = count.new_empty({1});
  const at::Tensor merged_mean = mean.new_empty({1, mean.size(1)});
  const at::Tensor merged_m2 = mean.new_empty({1, mean.size(1)});
  const cuda::MergeArgs args{
      counts.const_data_ptr<std::int64_t>(),
      means.const_data_ptr<double>(),
      m2s.const_data_ptr<double>(),
      merged_count.mutable_data_ptr<std::int64_t>(),
      merged_mean.mutable_data_ptr<double>(),
      merged_m2.mutable_data_ptr<double>(),
      mean.size(0),
      mean.size(1)};
  cuda::check_launch(cuda::launch_merge(args, device.stream()), "merge");
  return {merged_count, merged_mean, merged_m2};
}

Tensor3 batch_norm_fold_cuda(
    const at::Tensor& count,
    const at::Tensor& mean,
    const at::Tensor& m2,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    at::ScalarType dtype) {
  check_fold(count, mean, m2, running_mean, running_var, num_batches_tracked, momentum, eps, dtype);
  const cuda::DeviceScope device(mean);
  const at::Tensor counts = count.contiguous(), means = mean.contiguous(), m2s = m2.contiguous();
  const at::ScalarType acc = acc_type(dtype);
  const at::Tensor save_mean = mean.new_empty(mean.sizes(), acc);
  const at::Tensor save_mean_lo = mean.new_empty(mean.sizes(), acc);
  const at::Tensor save_invstd = mean.new_empty(mean.sizes(), acc);
  const cuda::CounterMemory counters = device.counters(1);
  cuda::dispatch_dtype(dtype, [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = AccType<scalar_t>;
    const cuda::FoldArgs<scalar_t> args{
        {counts.const_data_ptr<std::int64_t>(), means.const_data_ptr<double>(),
         m2s.const_data_ptr<double>(), nullptr, nullptr, nullptr, mean.size(0), mean.size(1)},
        {cuda::data_of<acc_t>(save_mean), cuda::data_of<acc_t>(save_mean_lo),
         cuda::data_of<acc_t>(save_invstd)},
        eps,
        cuda::running_stats(running_mean, running_var, num_batches_tracked, momentum, dtype),
        counters.counters};
    cuda::check_launch(cuda::FoldLaunches<scalar_t>::fold(args, device.stream()), "fold");
  });
  for (const OptionalTensor* buffer : {&running_mean, &running_var, &num_batches_tracked}) {
    if (is_given(*buffer)) {
      bump_version(**buffer);
    }
  }
  return {save_mean, save_mean_lo, save_invstd};
}

}  // namespace bnext
