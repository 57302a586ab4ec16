// Tensors to the raw pointers that kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include "../tensors.h"
#include "kernels.h"
#include "schedule.h"

namespace bnext::cpu {

// The tensor itself where it is that already: `to` is a call of the dispatcher in any case.
inline at::Tensor to_contiguous(const at::Tensor& tensor, at::ScalarType dtype) {
  return (tensor.scalar_type() == dtype ? tensor : tensor.to(dtype)).contiguous();
}

// A per-channel tensor as contiguous values of acc_t; null if it is not given. Parameters may be of
// the input's dtype or of acc_t, and of any stride: C-sized, so that a copy costs nothing.
template <typename acc_t>
class ChannelValues {
 public:
  explicit ChannelValues(const OptionalTensor& tensor) {
    if (is_given(tensor)) {
      tensor_ = to_contiguous(*tensor, c10::CppTypeToScalarType<acc_t>::value);
      data_ = tensor_.const_data_ptr<acc_t>();
    }
  }
  const acc_t* data() const { return data_; }
  acc_t get(std::int64_t channel, acc_t otherwise) const {
    return data_ != nullptr ? data_[channel] : otherwise;
  }

 private:
  at::Tensor tensor_;
  const acc_t* data_ = nullptr;
};

// Null where the tensor is undefined.
template <typename T>
const T* optional_data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}
template <typename T>
T* optional_mutable_data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// Calls f with a value of the C++ type of a checked input dtype.
template <typename F>
void dispatch_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(c10::Half{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    default:
      return f(float{});
  }
}

// dispatch.cpp: the table for the instruction set that ATen uses.
const KernelTable& kernel_table();

}  // namespace bnext::cpu
