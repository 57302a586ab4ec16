// What a device does for the ops: the kernels, on tensors that are checked, dense and not empty.
// All that is the same for every device is in forward.cpp, fold.cpp and backward.cpp.
#pragma once

#include <string>
#include <vector>

#include "../tensors.h"

namespace bnext {

class Backend {
 public:
  // Normalises; in training by the statistics it finds, which update the running ones, else by
  // the running ones. Writes those it took to `saved`.
  virtual void forward(
      const ForwardCall& call, const ForwardTensors& tensors, const StatsTensors& saved) const = 0;

  virtual void reduce(
      const at::Tensor& input, const Layout& layout, const MomentTensors& moments) const = 0;
  virtual void merge(const MomentTensors& sets, const MomentTensors& merged) const = 0;
  virtual void fold(
      const FoldCall& call, const MomentTensors& sets, const StatsTensors& saved) const = 0;
  virtual void apply(const ForwardTensors& tensors, const StatsTensors& saved) const = 0;

  virtual void backward(
      const BackwardTensors& tensors,
      bool frozen,
      const at::Tensor& grad_weight,
      const at::Tensor& grad_bias) const = 0;
  virtual void grad_reduce(const BackwardTensors& tensors, const GradSumTensors& sums) const = 0;
  // No sums: frozen statistics.
  virtual void grad_apply(
      const BackwardTensors& tensors, const std::optional<GradSumTensors>& sums) const = 0;

 protected:
  ~Backend() = default;
};

// The instruction set in use, and those compiled in.
std::string cpu_isa();
std::vector<std::string> cpu_isas();

// The launches of a training step's forward (tensors = 1) or backward (2; 3 with a residual) in
// words, such as "rows: team 264/4x64/s33/r2": grid/threads/splits/rounds.
std::string cuda_plan(
    const at::Tensor& input, std::optional<std::int64_t> ghost_batch_size, std::int64_t tensors);

// A hook for tests: from now on launches are planned as for a GPU with no more multiprocessors and
// bytes of shared memory than this, and with 32-bit offsets up to that many elements.
void limit_cuda_device(
    std::int64_t num_sms,
    std::int64_t shared_per_sm,
    std::int64_t shared_per_block,
    std::int64_t narrow_elements);

const Backend* cpu_backend();
const Backend* cuda_backend();  // in a build with CUDA
// Of meta tensors, which have no data: an op is done when its outputs are allocated.
inline const Backend* no_backend() {
  return nullptr;
}

}  // namespace bnext
