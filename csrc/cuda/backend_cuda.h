// The backend of CUDA tensors; its functions lie in forward_cuda.cpp, fold_cuda.cpp and
// backward_cuda.cpp.
#pragma once

#include "../ops/backend.h"

namespace bnext::cuda {

class CudaBackend final : public Backend {
 public:
  void forward(const ForwardCall& call, const ForwardTensors& tensors, const StatsTensors& saved)
      const override;
  void reduce(
      const at::Tensor& input, const Layout& layout, const MomentTensors& moments) const override;
  void merge(const MomentTensors& sets, const MomentTensors& merged) const override;
  void fold(
      const FoldCall& call, const MomentTensors& sets, const StatsTensors& saved) const override;
  void apply(const ForwardTensors& tensors, const StatsTensors& saved) const override;
  void backward(
      const BackwardTensors& tensors,
      bool frozen,
      const at::Tensor& grad_weight,
      const at::Tensor& grad_bias) const override;
  void grad_reduce(const BackwardTensors& tensors, const GradSumTensors& sums) const override;
  void grad_apply(
      const BackwardTensors& tensors, const std::optional<GradSumTensors>& sums) const override;
};

}  // namespace bnext::cuda
