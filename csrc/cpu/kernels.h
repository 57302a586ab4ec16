// The table of CPU kernels: raw pointers only. One table per instruction set and element type;
// dispatch.cpp picks one.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../core/activation.h"
#include "../core/math.h"
#include "../core/normalize.h"
#include "../core/welford.h"

namespace bnext::cpu {

// A piece of a tensor: `lines` runs of `length` adjacent elements, `stride` elements from one run
// to the next. Element j of a line belongs to channel j / inner, counted from the piece's first.
//   rows:   a line is a row of the (N * S, C) matrix, inner = 1
//   planes: a line is (a piece of) a sample, inner = S or the size of a piece of one plane
struct Slab {
  std::int64_t lines;
  std::int64_t length;
  std::int64_t stride;
  std::int64_t inner;

  std::int64_t channels() const { return length / inner; }
};

// A channel's run of this many adjacent elements or fewer, less than the widest pack, is a few
// columns of a wide matrix, whose lines are rows or samples; a longer one is walked on its own.
constexpr std::int64_t kShortRun = 31;

// Adjacent elements that are enough pages for the prefetchers of the hardware.
constexpr std::int64_t kLongLine = 16384;

// Bytes: what is stored past the caches begins and ends at cache lines, which are then written
// once.
constexpr std::int64_t kStreamAlign = 64;

// `offset` elements on; null stays null.
template <typename T>
T* at_offset(T* pointer, std::int64_t offset) {
  return pointer != nullptr ? pointer + offset : nullptr;
}

// Pointers to elements point at the slab's first element, those to per-channel values at its first
// channel.

template <typename scalar_t>
struct ReduceArgs {
  const scalar_t* input;
  const double* base;  // what the means are relative to; null unless kHasBase
  // Out: of the slab's values of each channel, lines * inner of them.
  double* mean;
  double* m2;
};

// The distance of a pivot from the base of channel or column i.
template <typename scalar_t>
inline double from_base(AccType<scalar_t> pivot, const double* base, std::int64_t i) {
  if constexpr (kHasBase<scalar_t>) {
    return pivot - base[i];
  } else {
    return pivot;
  }
}

template <typename scalar_t>
struct ApplyArgs {
  using acc_t = AccType<scalar_t>;
  const scalar_t* input;
  const scalar_t* residual;  // may be null
  scalar_t* output;
  const acc_t* mean;
  const acc_t* scale;
  const acc_t* shift;
  Activation activation;
  bool stream;  // store past the caches: all lines and runs start at multiples of kStreamAlign
  std::int64_t ahead;  // what lies this many elements further on will be read next; 0: unknown

  void advance(std::int64_t offset) {
    input += offset;
    residual = at_offset(residual, offset);
    output += offset;
  }
};

template <typename scalar_t>
struct GradArgs {
  using acc_t = AccType<scalar_t>;
  const scalar_t* grad_output;
  const scalar_t* input;
  const scalar_t* extra;  // the residual or the output, as `derivative` says; else null
  const acc_t* mean;
  const acc_t* scale;
  const acc_t* shift;
  Activation activation;
  Derivative derivative;

  void advance(std::int64_t offset) {
    grad_output += offset;
    input += offset;
    extra = at_offset(extra, offset);
  }
};

template <typename scalar_t>
struct GradReduceArgs : GradArgs<scalar_t> {
  // Out: of the slab's values of each channel, about `mean`.
  double* sum_dy;
  double* sum_dy_xmu;
};

template <typename scalar_t>
struct GradApplyArgs : GradArgs<scalar_t> {
  using acc_t = AccType<scalar_t>;
  const acc_t* coef_x;  // null for frozen statistics: grad_input = dy * scale
  const acc_t* coef_0;
  scalar_t* grad_input;     // null if not wanted
  scalar_t* grad_residual;  // null if not wanted
  bool stream;              // as in ApplyArgs, and so is
  std::int64_t ahead;

  void advance(std::int64_t offset) {
    GradArgs<scalar_t>::advance(offset);
    grad_input = at_offset(grad_input, offset);
    grad_residual = at_offset(grad_residual, offset);
  }
};

// Chan's merge of `other` into (mean, m2), as merge_moments takes it.
struct MergeArgs {
  double* mean;
  double* m2;
  const double* other_mean;
  const double* other_m2;
  double b_over_n;
  double ab_over_n;
};

template <typename acc_t>
struct StatisticsArgs {
  const double* base;  // null unless kHasBase
  const double* mean;
  const double* m2;
  double count;
  double eps;
  acc_t* save_mean;
  acc_t* save_mean_lo;
  acc_t* save_invstd;
};

template <typename acc_t>
struct ConstantsArgs {
  const acc_t* mean;
  const acc_t* mean_lo;
  const acc_t* invstd;
  const acc_t* weight;  // null: 1
  const acc_t* bias;    // null: 0
  acc_t* scale;
  acc_t* shift;
};

// Sums about mean_hi become sums about the mean, and join those of a group of ghosts, whose
// sum_dy_xmu are in units of the standard deviation.
template <typename acc_t>
struct GradFoldArgs {
  const double* sum_dy;
  double* sum_dy_xmu;
  double* group_dy;
  double* group_dy_xmu;
  const acc_t* mean_lo;
  const acc_t* invstd;
};

template <typename acc_t>
struct CoefficientsArgs {
  const double* sum_dy;
  const double* sum_dy_xmu;
  double count;
  const acc_t* mean_lo;
  const acc_t* invstd;
  const acc_t* scale;
  acc_t* coef_x;
  acc_t* coef_0;
};

// Kernels take their arguments by reference and copy them, value by value, to where no store of
// theirs can change them. A copy made for the call, by 16 bytes of what was just stored by 8, would
// wait until that has left the store buffer.
template <typename scalar_t>
struct Kernels {
  using acc_t = AccType<scalar_t>;
  void (*reduce)(const ReduceArgs<scalar_t>&, const Slab&);
  void (*apply)(const ApplyArgs<scalar_t>&, const Slab&);
  void (*grad_reduce)(const GradReduceArgs<scalar_t>&, const Slab&);
  void (*grad_apply)(const GradApplyArgs<scalar_t>&, const Slab&);
  void (*merge)(const MergeArgs&, std::int64_t n_channel);
  void (*statistics)(const StatisticsArgs<acc_t>&, std::int64_t n_channel);
  void (*constants)(const ConstantsArgs<acc_t>&, std::int64_t n_channel);
  void (*grad_fold)(const GradFoldArgs<acc_t>&, std::int64_t n_channel);
  void (*coefficients)(const CoefficientsArgs<acc_t>&, std::int64_t n_channel);
};

// The four element types of one instruction set.
struct KernelTable {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<c10::Half> float16;
  Kernels<c10::BFloat16> bfloat16;

  template <typename scalar_t>
  const Kernels<scalar_t>& of() const {
    if constexpr (std::is_same_v<scalar_t, float>) {
      return float32;
    } else if constexpr (std::is_same_v<scalar_t, double>) {
      return float64;
    } else if constexpr (std::is_same_v<scalar_t, c10::Half>) {
      return float16;
    } else {
      return bfloat16;
    }
  }
};

// Defined by kernels_default.cpp, kernels_avx2.cpp, kernels_avx512.cpp; the last two exist on
// x86-64 only.
extern const KernelTable kKernelsDefault;
extern const KernelTable kKernelsAvx2;
extern const KernelTable kKernelsAvx512;

}  // namespace bnext::cpu
