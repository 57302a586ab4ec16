// The arithmetic of one vector of elements, over the functions of core/.
#pragma once

#include "../core/activation.h"
#include "../core/normalize.h"
#include "moments.cuh"
#include "shared.cuh"

namespace bnext::cuda {

// What a kernel is compiled for. The cases of most networks have loops of their own; kAny reads the
// activation, and whether there is a residual, at run time.
enum class Fusion {
  kNone,          // no activation, no residual
  kRelu,          // no residual
  kReluResidual,  // backward: the derivative is that of the output
  kAny,
};

// One block where a thread decides at run time what it does with the sums of several channels, or
// with eight elements at once: for two there are not enough registers.
template <Fusion kFusion, bool kRows, int kVec>
constexpr int kMinBlocks = kFusion == Fusion::kAny && (kRows || kVec == 8) ? 1 : kMinBlocksPerSm;

// One constant per lane (rows) or one for all (planes).
template <int kLanes, typename T>
__device__ __forceinline__ T lane(const T (&values)[kLanes], int k) {
  return values[k % kLanes];
}

template <Fusion kFusion, int kVec, typename acc_t>
__device__ __forceinline__ void activate(acc_t (&z)[kVec], Activation activation) {
  if constexpr (kFusion == Fusion::kAny) {
    dispatch_activation(activation, [&](auto f) {
      BNEXT_UNROLL
      for (int k = 0; k < kVec; ++k) {
        z[k] = f.forward(z[k]);
      }
    });
  } else if constexpr (kFusion != Fusion::kNone) {
    BNEXT_UNROLL
    for (int k = 0; k < kVec; ++k) {
      z[k] = Relu::forward(z[k]);
    }
  }
}

// In place: input to output.
template <Fusion kFusion, typename scalar_t, int kLanes, int kVec, typename acc_t>
__device__ __forceinline__ void forward_vector(
    acc_t (&x)[kVec],
    const Raw<scalar_t, kVec>& residual,
    bool has_residual,
    const ForwardLanes<acc_t, kLanes>& constants,
    Activation activation) {
  BNEXT_UNROLL
  for (int k = 0; k < kVec; ++k) {
    x[k] = normalize(
        x[k], lane(constants.mean, k), lane(constants.scale, k), lane(constants.shift, k));
  }
  if (has_residual) {
    acc_t added[kVec];
    unpack(residual, added);
    BNEXT_UNROLL
    for (int k = 0; k < kVec; ++k) {
      x[k] += added[k];
    }
  }
  activate<kFusion>(x, activation);
}

// In place: grad_output to dy, the gradient after the activation's derivative.
template <Fusion kFusion, typename scalar_t, int kLanes, int kVec, typename acc_t>
__device__ __forceinline__ void derive_vector(
    acc_t (&dy)[kVec],
    const acc_t (&x)[kVec],
    const Raw<scalar_t, kVec>& extra,
    const ForwardLanes<acc_t, kLanes>& constants,
    Activation activation,
    Derivative derivative) {
  if constexpr (kFusion == Fusion::kNone) {
    return;
  }
  acc_t z[kVec];
  const bool from_output = kFusion == Fusion::kReluResidual ||
                           (kFusion == Fusion::kAny && derivative == Derivative::kFromOutput);
  if (from_output) {
    unpack(extra, z);
  } else {
    BNEXT_UNROLL
    for (int k = 0; k < kVec; ++k) {
      z[k] = normalize(
          x[k], lane(constants.mean, k), lane(constants.scale, k), lane(constants.shift, k));
    }
    if (kFusion == Fusion::kAny && derivative == Derivative::kFromResidual) {
      acc_t added[kVec];
      unpack(extra, added);
      BNEXT_UNROLL
      for (int k = 0; k < kVec; ++k) {
        z[k] += added[k];
      }
    }
  }
  if constexpr (kFusion == Fusion::kAny) {
    dispatch_activation(activation, [&](auto f) {
      BNEXT_UNROLL
      for (int k = 0; k < kVec; ++k) {
        dy[k] = f.backward(dy[k], z[k]);
      }
    });
  } else {
    BNEXT_UNROLL
    for (int k = 0; k < kVec; ++k) {
      dy[k] = Relu::backward(dy[k], z[k]);
    }
  }
}

// In place: x to grad_input. What derive_vector and grad_input give for a ReLU without a residual,
// an instruction less per element: where the derivative is 0, the product with dy is left out.
template <int kLanes, int kVec, typename acc_t>
__device__ __forceinline__ void relu_grad_input(
    const acc_t (&grad_output)[kVec],
    acc_t (&x)[kVec],
    const BackwardLanes<acc_t, kLanes>& constants) {
  using Op = Math<acc_t>;
  BNEXT_UNROLL
  for (int k = 0; k < kVec; ++k) {
    const acc_t scale = lane(constants.scale, k);
    const acc_t xmu = x[k] - lane(constants.mean, k);
    const acc_t z = normalize_centred(xmu, scale, lane(constants.shift, k));
    const acc_t rest = Op::fmadd(xmu, lane(constants.coef_x, k), lane(constants.coef_0, k));
    x[k] = Op::where_le_zero(z, rest, Op::fmadd(grad_output[k], scale, rest));
  }
}

// Whether a backward kernel reads `extra`.
template <Fusion kFusion, typename scalar_t>
__device__ __forceinline__ bool reads_extra(const BackwardElements<scalar_t>& elements) {
  return kFusion == Fusion::kReluResidual || (kFusion == Fusion::kAny && elements.extra != nullptr);
}

template <typename scalar_t>
__device__ __forceinline__ ForwardConstants<AccType<scalar_t>> constants_of(
    const ChannelStats<AccType<scalar_t>>& stats,
    const ChannelArray& weight,
    const ChannelArray& bias,
    std::int64_t channel) {
  return forward_constants(
      stats, get<scalar_t>(weight, channel, 1), get<scalar_t>(bias, channel, 0));
}

}  // namespace bnext::cuda
