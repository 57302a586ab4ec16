#include "dense_format.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

namespace bnext {
namespace {

at::MemoryFormat memory_format(const at::Tensor& tensor, DenseFormat format) {
  if (format == DenseFormat::kContiguous) {
    return at::MemoryFormat::Contiguous;
  }
  return tensor.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

}  // namespace

at::Tensor empty_cpu(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  return at::Tensor(at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format));
}

DenseFormat dense_format(const at::Tensor& input) {
  if (input.dim() == 3 && !input.is_contiguous()) {
    const auto sizes = input.sym_sizes();
    const auto strides = input.sym_strides();
    if (strides[1] == 1 && strides[2] == sizes[1] && strides[0] == sizes[1] * sizes[2]) {
      return DenseFormat::kTransposed;
    }
  }
  return input.suggest_memory_format() == at::MemoryFormat::Contiguous ? DenseFormat::kContiguous
                                                                       : DenseFormat::kChannelsLast;
}

at::Tensor to_dense(const at::Tensor& tensor, DenseFormat format) {
  if (format == DenseFormat::kTransposed) {
    return tensor.transpose(1, 2).contiguous().transpose(1, 2);
  }
  return tensor.contiguous(memory_format(tensor, format));
}

at::Tensor empty_dense(const at::Tensor& like, DenseFormat format) {
  if (format == DenseFormat::kTransposed) {
    const auto sizes = like.sym_sizes();
    return at::empty_strided_symint(sizes, {sizes[1] * sizes[2], 1, sizes[1]}, like.options());
  }
  if (like.is_cpu()) {  // as options() tells: a fake tensor is on meta here
    return empty_cpu(like.sizes(), like.scalar_type(), memory_format(like, format));
  }
  return at::empty_symint(like.sym_sizes(), like.options(), memory_format(like, format));
}

}  // namespace bnext
