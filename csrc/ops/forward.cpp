// The ops of the forward over elements: all of it, reduce, and apply.
#include "../checks.h"
#include "ops.h"

namespace bnext {

Tensor4 batch_norm(const Backend* backend, ForwardCall& call) {
  check(call);
  const at::Tensor& input = call.input;
  const DenseFormat format = dense_format(input);
  const at::Tensor output = empty_dense(input, format);
  const StatsTensors saved =
      empty_stats(input, call.num_ghosts, input.sym_size(1), input.scalar_type());
  if (backend != nullptr) {
    if (input.numel() != 0) {
      backend->forward(call, forward_tensors(call, format, output), saved);
    } else {  // as torch: the running statistics stay, the batch counts
      saved.zero();
      if (call.training && is_given(call.running.num_batches_tracked)) {
        call.running.num_batches_tracked->add_(1);
      }
    }
    if (call.training) {
      bump_versions(call.running);
    }
  }
  return {output, saved.mean, saved.mean_lo, saved.invstd};
}

Tensor3 batch_norm_reduce(const Backend* backend, ReduceCall& call) {
  check(call);
  const at::Tensor& input = call.input;
  const MomentTensors moments = empty_moments(input, call.num_ghosts, input.sym_size(1));
  if (backend != nullptr) {
    const DenseFormat format = dense_format(input);
    if (input.numel() != 0) {
      backend->reduce(to_dense(input, format), layout_of(input, format), moments);
    } else {
      moments.zero();
    }
  }
  return {moments.count, moments.mean, moments.m2};
}

at::Tensor batch_norm_apply(const Backend* backend, ApplyCall& call) {
  check(call);
  const DenseFormat format = dense_format(call.input);
  const at::Tensor output = empty_dense(call.input, format);
  if (backend != nullptr && call.input.numel() != 0) {
    backend->apply(forward_tensors(call, format, output), contiguous_stats(call.saved));
  }
  return output;
}

}  // namespace bnext
