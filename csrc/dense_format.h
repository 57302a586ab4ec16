// Where an input's elements lie once it is dense, and so its output.
#pragma once

#include <ATen/core/Tensor.h>

namespace bnext {

// An (N, L, C) tensor seen as (N, C, L) keeps its strides, others follow their suggested memory
// format.
enum class DenseFormat { kContiguous, kChannelsLast, kTransposed };

DenseFormat dense_format(const at::Tensor& input);

// The tensor itself where it has the format already, else a copy.
at::Tensor to_dense(const at::Tensor& tensor, DenseFormat format);

at::Tensor empty_dense(const at::Tensor& like, DenseFormat format);

// at::empty passes the dispatcher twice, which takes longer than to allocate a small tensor.
at::Tensor empty_cpu(
    at::IntArrayRef sizes,
    at::ScalarType dtype,
    at::MemoryFormat format = at::MemoryFormat::Contiguous);

}  // namespace bnext
