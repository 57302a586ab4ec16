// The ops between reduce and apply: (count, mean, M2) of ghosts or of processes to statistics.
#include "../checks.h"
#include "ops.h"

namespace bnext {

Tensor3 batch_norm_merge(const Backend* backend, MergeCall& call) {
  check(call);
  const MomentTensors merged = empty_moments(call.mean, 1, call.mean.sym_size(1));
  if (backend != nullptr) {
    backend->merge(contiguous_moments(call), merged);
  }
  return {merged.count, merged.mean, merged.m2};
}

Tensor3 batch_norm_fold(const Backend* backend, FoldCall& call) {
  check(call);
  const at::Tensor& mean = call.sets.mean;
  const StatsTensors saved = empty_stats(mean, mean.sym_size(0), mean.sym_size(1), call.dtype);
  if (backend != nullptr) {
    backend->fold(call, contiguous_moments(call.sets), saved);
    bump_versions(call.running);
  }
  return {saved.mean, saved.mean_lo, saved.invstd};
}

}  // namespace bnext
