// The eight ops, and how they are registered for a device. docs/ops.md documents each.
#pragma once

#include <torch/library.h>

#include "backend.h"

namespace bnext {

// Checks, allocates the outputs, and has the backend fill them.
Tensor4 batch_norm(const Backend* backend, ForwardCall& call);
Tensor3 batch_norm_reduce(const Backend* backend, ReduceCall& call);
Tensor3 batch_norm_merge(const Backend* backend, MergeCall& call);
Tensor3 batch_norm_fold(const Backend* backend, FoldCall& call);
at::Tensor batch_norm_apply(const Backend* backend, ApplyCall& call);
Tensor4 batch_norm_backward(const Backend* backend, BackwardCall& call);
Tensor2 batch_norm_grad_reduce(const Backend* backend, GradReduceCall& call);
Tensor2 batch_norm_grad_apply(const Backend* backend, GradApplyCall& call);

constexpr const char* kOps[] = {
    "batch_norm",       "batch_norm_reduce",   "batch_norm_merge",       "batch_norm_fold",
    "batch_norm_apply", "batch_norm_backward", "batch_norm_grad_reduce", "batch_norm_grad_apply"};

// An op as the function that the dispatcher calls.
template <auto op, auto backend, typename Call, typename Op = typename Call::Op>
struct Kernel;
template <auto op, auto backend, typename Call, typename Result, typename... Args>
struct Kernel<op, backend, Call, Result(Args...)> {
  static Result run(Args... args) {
    Call call{args...};
    return op(backend(), call);
  }
};

template <auto backend>
void implement(torch::Library& m) {
  m.impl("batch_norm", &Kernel<&batch_norm, backend, ForwardCall>::run);
  m.impl("batch_norm_reduce", &Kernel<&batch_norm_reduce, backend, ReduceCall>::run);
  m.impl("batch_norm_merge", &Kernel<&batch_norm_merge, backend, MergeCall>::run);
  m.impl("batch_norm_fold", &Kernel<&batch_norm_fold, backend, FoldCall>::run);
  m.impl("batch_norm_apply", &Kernel<&batch_norm_apply, backend, ApplyCall>::run);
  m.impl("batch_norm_backward", &Kernel<&batch_norm_backward, backend, BackwardCall>::run);
  m.impl("batch_norm_grad_reduce", &Kernel<&batch_norm_grad_reduce, backend, GradReduceCall>::run);
  m.impl("batch_norm_grad_apply", &Kernel<&batch_norm_grad_apply, backend, GradApplyCall>::run);
}

}  // namespace bnext
