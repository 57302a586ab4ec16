// Registers the CUDA kernels of torch.ops.bnext.
#include <torch/library.h>

#include "../ops.h"

namespace bnext {

TORCH_LIBRARY_IMPL(bnext, CUDA, m) {
  m.impl("batch_norm", &batch_norm_cuda);
  m.impl("batch_norm_backward", &batch_norm_backward_cuda);
  m.impl("batch_norm_reduce", &batch_norm_reduce_cuda);
  m.impl("batch_norm_merge", &batch_norm_merge_cuda);
  m.impl("batch_norm_fold", &batch_norm_fold_cuda);
  m.impl("batch_norm_apply", &batch_norm_apply_cuda);
  m.impl("batch_norm_grad_reduce", &batch_norm_grad_reduce_cuda);
  m.impl("batch_norm_grad_apply", &batch_norm_grad_apply_cuda);
}

}  // namespace bnext
