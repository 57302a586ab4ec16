// The middle step on CUDA: triples of ghosts or of processes to statistics. Counts are not checked
// as on the CPU: that would wait for the device.
#include "backend_cuda.h"
#include "tensors_cuda.h"

namespace bnext::cuda {
namespace {

// `merged`: null where not asked for.
MergeArgs merge_args(const MomentTensors& sets, const MomentTensors* merged) {
  return {
      sets.count.const_data_ptr<std::int64_t>(),
      sets.mean.const_data_ptr<double>(),
      sets.m2.const_data_ptr<double>(),
      merged == nullptr ? nullptr : merged->count.mutable_data_ptr<std::int64_t>(),
      merged == nullptr ? nullptr : merged->mean.mutable_data_ptr<double>(),
      merged == nullptr ? nullptr : merged->m2.mutable_data_ptr<double>(),
      sets.mean.size(0),
      sets.mean.size(1)};
}

}  // namespace

void CudaBackend::merge(const MomentTensors& sets, const MomentTensors& merged) const {
  const DeviceScope device(sets.mean);
  check_launch(launch_merge(merge_args(sets, &merged), device.stream()), "merge");
}

void CudaBackend::fold(
    const FoldCall& call, const MomentTensors& sets, const StatsTensors& saved) const {
  const DeviceScope device(sets.mean);
  const CounterMemory counters = device.counters(1);
  dispatch_dtype(call.dtype, [&](auto tag) {
    using scalar_t = decltype(tag);
    const FoldArgs<scalar_t> args{
        merge_args(sets, nullptr), saved_stats<scalar_t>(saved), call.eps,
        running_stats(call.running, call.momentum, call.dtype), counters.counters};
    check_launch(FoldLaunches<scalar_t>::fold(args, device.stream()), "fold");
  });
}

}  // namespace bnext::cuda
