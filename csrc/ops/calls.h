// One struct for the call of each op: its arguments, in the order of the schema (library.cpp), and
// then what check() makes of them. `Op` is the op as a function type, in the same order. An
// argument that is added touches the schema, the struct (and for batch_norm ForwardCall in
// bnext/ops.py), and what reads it.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "../core/activation.h"

namespace bnext {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalString = std::optional<std::string_view>;
using Tensor2 = std::tuple<at::Tensor, at::Tensor>;
using Tensor3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Tensor4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline bool is_given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

// The buffers of a layer.
struct RunningStatsArgs {
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
};

struct ForwardCall {
  using Op = Tensor4(
      const at::Tensor& input,
      const OptionalTensor& weight,
      const OptionalTensor& bias,
      const OptionalTensor& running_mean,
      const OptionalTensor& running_var,
      const OptionalTensor& num_batches_tracked,
      const OptionalTensor& residual,
      bool training,
      std::optional<double> momentum,
      double eps,
      OptionalString activation_name,
      std::optional<c10::SymInt> ghost_batch_size);

  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  RunningStatsArgs running;
  const OptionalTensor& residual;
  bool training;
  std::optional<double> momentum;  // none: a cumulative average
  double eps;
  OptionalString activation_name;
  std::optional<c10::SymInt> ghost_batch_size;

  c10::SymInt num_ghosts = 1;
  Activation activation = Activation::kNone;
};

struct ReduceCall {
  using Op = Tensor3(const at::Tensor& input, std::optional<c10::SymInt> ghost_batch_size);

  const at::Tensor& input;
  std::optional<c10::SymInt> ghost_batch_size;

  c10::SymInt num_ghosts = 1;
};

// (count, mean, M2) of K sets.
struct MergeCall {
  using Op = Tensor3(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2);

  const at::Tensor& count;
  const at::Tensor& mean;
  const at::Tensor& m2;
};

struct FoldCall {
  using Op = Tensor3(
      const at::Tensor& count,
      const at::Tensor& mean,
      const at::Tensor& m2,
      const OptionalTensor& running_mean,
      const OptionalTensor& running_var,
      const OptionalTensor& num_batches_tracked,
      std::optional<double> momentum,
      double eps,
      at::ScalarType dtype);

  MergeCall sets;
  RunningStatsArgs running;
  std::optional<double> momentum;
  double eps;
  at::ScalarType dtype;
};

struct SavedStatsArgs {
  const at::Tensor& save_mean;
  const at::Tensor& save_mean_lo;
  const at::Tensor& save_invstd;
};

struct ApplyCall {
  using Op = at::Tensor(
      const at::Tensor& input,
      const OptionalTensor& weight,
      const OptionalTensor& bias,
      const OptionalTensor& residual,
      const at::Tensor& save_mean,
      const at::Tensor& save_mean_lo,
      const at::Tensor& save_invstd,
      OptionalString activation_name);

  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  SavedStatsArgs saved;
  OptionalString activation_name;

  c10::SymInt num_ghosts = 1;
  Activation activation = Activation::kNone;
};

// The leading arguments of the three ops of backward. OpOf<Result, Rest...> is the type of one that
// goes on with Rest.
struct BackwardInputs {
  template <typename Result, typename... Rest>
  using OpOf = Result(
      const at::Tensor& grad_output,
      const at::Tensor& input,
      const OptionalTensor& weight,
      const OptionalTensor& bias,
      const OptionalTensor& output,
      const OptionalTensor& residual,
      const at::Tensor& save_mean,
      const at::Tensor& save_mean_lo,
      const at::Tensor& save_invstd,
      Rest... rest);

  const at::Tensor& grad_output;
  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& output;
  const OptionalTensor& residual;
  SavedStatsArgs saved;
};

struct BackwardCall {
  using Op = BackwardInputs::
      OpOf<Tensor4, bool /*training*/, OptionalString /*activation_name*/, std::array<bool, 2>>;

  BackwardInputs in;
  bool training;
  OptionalString activation_name;
  std::array<bool, 2> output_mask;

  c10::SymInt num_ghosts = 1;
  Activation activation = Activation::kNone;
};

struct GradReduceCall {
  using Op = BackwardInputs::OpOf<Tensor2, OptionalString /*activation_name*/>;

  BackwardInputs in;
  OptionalString activation_name;

  c10::SymInt num_ghosts = 1;
  Activation activation = Activation::kNone;
};

struct GradApplyCall {
  using Op = BackwardInputs::OpOf<
      Tensor2,
      const OptionalTensor& /*count*/,
      const OptionalTensor& /*sum_dy*/,
      const OptionalTensor& /*sum_dy_xmu*/,
      OptionalString /*activation_name*/,
      std::array<bool, 2> /*output_mask*/>;

  BackwardInputs in;
  const OptionalTensor& count;
  const OptionalTensor& sum_dy;
  const OptionalTensor& sum_dy_xmu;
  OptionalString activation_name;
  std::array<bool, 2> output_mask;

  c10::SymInt num_ghosts = 1;
  Activation activation = Activation::kNone;
};

}  // namespace bnext
