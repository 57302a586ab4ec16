// The activations that a layer can fuse: one functor each, over a scalar or a SIMD vector.
#pragma once

#include "host_device.h"
#include "math.h"

namespace bnext {

enum class Activation { kNone, kRelu, kLeakyRelu, kSilu };

// What backward derives the activation's derivative from.
enum class Derivative {
  kFromInput,     // z = normalize(input)
  kFromResidual,  // z = normalize(input) + residual
  kFromOutput,    // the output, which has the sign of z
};

struct NoActivation {
  template <typename T>
  BNEXT_HD static T forward(T z) {
    return z;
  }
  template <typename T>
  BNEXT_HD static T backward(T grad, T) {
    return grad;
  }
};

// backward(grad, z) also accepts the output in place of z: both have the same sign.
struct Relu {
  template <typename T>
  BNEXT_HD static T forward(T z) {
    return Math<T>::positive_part(z);
  }
  template <typename T>
  BNEXT_HD static T backward(T grad, T z) {
    return Math<T>::where_le_zero(z, Math<T>::constant(0), grad);
  }
};

// The slope is torch.nn.LeakyReLU's default; it is positive, so that z and the output agree in
// sign.
struct LeakyRelu {
  static constexpr double kNegativeSlope = 0.01;

  template <typename T>
  BNEXT_HD static T forward(T z) {
    return Math<T>::where_gt_zero(z, z, z * Math<T>::constant(kNegativeSlope));
  }
  template <typename T>
  BNEXT_HD static T backward(T grad, T z) {
    return Math<T>::where_gt_zero(z, grad, grad * Math<T>::constant(kNegativeSlope));
  }
};

// z * sigmoid(z) (Elfwing, Uchibe, Doya 2017). Not monotonic: backward needs z itself.
struct Silu {
  template <typename T>
  BNEXT_HD static T forward(T z) {
    const T one = Math<T>::constant(1);
    return z / (one + Math<T>::exp(Math<T>::constant(0) - z));
  }
  template <typename T>
  BNEXT_HD static T backward(T grad, T z) {
    const T one = Math<T>::constant(1);
    const T sigmoid = one / (one + Math<T>::exp(Math<T>::constant(0) - z));
    return grad * sigmoid * Math<T>::fmadd(z, one - sigmoid, one);
  }
};

// Calls f with the functor of `activation`.
template <typename F>
BNEXT_HD inline void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f(NoActivation{});
    case Activation::kRelu:
      return f(Relu{});
    case Activation::kLeakyRelu:
      return f(LeakyRelu{});
    case Activation::kSilu:
      return f(Silu{});
  }
}

}  // namespace bnext
