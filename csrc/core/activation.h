// The activations that a layer can fuse: one functor each, over a scalar or a SIMD vector. A new
// one is an enumerator, a functor and its place in `Activations`, all in this file; its other half
// is an entry in bnext/activations.py.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "host_device.h"
#include "math.h"

namespace bnext {

enum class Activation { kNone, kRelu, kRelu6, kLeakyRelu, kSilu };

// What backward derives the activation's derivative from.
enum class Derivative {
  kFromInput,     // z = normalize(input)
  kFromResidual,  // z = normalize(input) + residual
  kFromOutput,    // the output in place of z, for functors with kFromOutput
};

struct NoActivation {
  static constexpr Activation kActivation = Activation::kNone;
  static constexpr const char* kName = "";
  static constexpr bool kFromOutput = false;

  template <typename T>
  BNEXT_HD static T forward(T z) {
    return z;
  }
  template <typename T>
  BNEXT_HD static T backward(T grad, T) {
    return grad;
  }
};

// The output has the sign of z, or is 0 where z rounds to 0.
struct Relu {
  static constexpr Activation kActivation = Activation::kRelu;
  static constexpr const char* kName = "relu";
  static constexpr bool kFromOutput = true;

  template <typename T>
  BNEXT_HD static T forward(T z) {
    return Math<T>::positive_part(z);
  }
  template <typename T>
  BNEXT_HD static T backward(T grad, T z) {
    return Math<T>::where_le_zero(z, Math<T>::constant(0), grad);
  }
};

// min(max(z, 0), 6) (Krizhevsky 2010). Not from the output: in a half type, 6 may be a rounded z.
struct Relu6 {
  static constexpr Activation kActivation = Activation::kRelu6;
  static constexpr const char* kName = "relu6";
  static constexpr bool kFromOutput = false;

  template <typename T>
  BNEXT_HD static T forward(T z) {
    const T six = Math<T>::constant(6);
    return Math<T>::where_gt_zero(z - six, six, Math<T>::positive_part(z));
  }
  template <typename T>
  BNEXT_HD static T backward(T grad, T z) {
    const T zero = Math<T>::constant(0);
    const T below = Math<T>::where_le_zero(Math<T>::constant(6) - z, zero, grad);
    return Math<T>::where_le_zero(z, zero, below);
  }
};

// The slope is torch.nn.LeakyReLU's default; it is positive, so that z and the output agree in
// sign.
struct LeakyRelu {
  static constexpr Activation kActivation = Activation::kLeakyRelu;
  static constexpr const char* kName = "leaky_relu";
  static constexpr bool kFromOutput = true;
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

// z * sigmoid(z) (Elfwing, Uchibe, Doya 2017). Not monotonic: the output does not tell z.
struct Silu {
  static constexpr Activation kActivation = Activation::kSilu;
  static constexpr const char* kName = "silu";
  static constexpr bool kFromOutput = false;

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

template <typename... Functors>
struct ActivationList {
  // In the order of the enumerators, none left out between.
  static constexpr bool in_order() {
    int place = 0;
    return ((static_cast<int>(Functors::kActivation) == place++) && ...);
  }

  // Calls f with the functor of `activation`.
  template <typename F>
  BNEXT_HD static void dispatch(Activation activation, F&& f) {
    (void)((activation == Functors::kActivation && (f(Functors{}), true)) || ...);
  }

  static std::optional<Activation> find(std::string_view name) {
    std::optional<Activation> found;
    ((name == Functors::kName && !name.empty() ? void(found = Functors::kActivation) : void()),
     ...);
    return found;
  }

  // As Python writes them.
  static std::string names() {
    std::string text = "None";
    ((*Functors::kName != 0 ? void(text.append(", '").append(Functors::kName).append("'"))
                            : void()),
     ...);
    return text;
  }
};
using Activations = ActivationList<NoActivation, Relu, Relu6, LeakyRelu, Silu>;
static_assert(Activations::in_order());

template <typename F>
BNEXT_HD inline void dispatch_activation(Activation activation, F&& f) {
  Activations::dispatch(activation, f);
}

}  // namespace bnext
