// The sums of backward: in a thread, over a block, over pieces and over ghosts.
#pragma once

#include "elements.cuh"

namespace bnext::cuda {

// sum(dy) and sum(dy * (x - mean)) of a group of vectors, in acc_t.
template <typename acc_t, int kVec>
struct GroupGradSums {
  acc_t dy[kVec], dy_xmu[kVec];

  template <int kLanes>
  __device__ __forceinline__ void add(
      const acc_t (&grad)[kVec], const acc_t (&x)[kVec], const acc_t (&mean)[kLanes], bool first) {
    BNEXT_UNROLL
    for (int k = 0; k < kVec; ++k) {
      const acc_t xmu = x[k] - lane(mean, k);
      dy[k] = first ? grad[k] : dy[k] + grad[k];
      dy_xmu[k] = first ? grad[k] * xmu : Math<acc_t>::fmadd(grad[k], xmu, dy_xmu[k]);
    }
  }
};

// The sums of what one thread has seen: groups are added up in double.
template <typename acc_t, int kLanes>
class ThreadGradSums {
 public:
  template <int kVec>
  __device__ __forceinline__ void add(const GroupGradSums<acc_t, kVec>& group) {
    acc_t dy[kLanes] = {}, dy_xmu[kLanes] = {};
    add_lanes<kLanes>(group.dy, dy);
    add_lanes<kLanes>(group.dy_xmu, dy_xmu);
    BNEXT_UNROLL
    for (int k = 0; k < kLanes; ++k) {
      sums_[k].a += static_cast<double>(dy[k]);
      sums_[k].b += static_cast<double>(dy_xmu[k]);
    }
  }

  template <bool kRows, int kVec>
  __device__ __forceinline__ PairOfSums over_block(double* scratch) const {
    return sum_over_block<kRows, kVec>([&](int k) { return sums_[k]; }, scratch);
  }

 private:
  PairOfSums sums_[kLanes];
};

// Writes one set: thread t of the tile the sums of channel t.
__device__ __forceinline__ void store_sums(
    const SumSets& sets, std::int64_t set, const Piece& piece, int thread, const PairOfSums& sums) {
  if (thread < piece.n_channel) {
    __stcg(sets.dy + set * sets.stride + thread, sums.a);
    __stcg(sets.dy_xmu + set * sets.stride + thread, sums.b);
  }
}

// The first set: thread t gets channel t.
__device__ __forceinline__ PairOfSums
load_sums(const SumSets& sets, const Piece& piece, int thread) {
  if (thread >= piece.n_channel) {
    return {};
  }
  return {__ldcg(sets.dy + thread), __ldcg(sets.dy_xmu + thread)};
}

// The sums of the first `size` sets, by all threads of the block in a fixed order: thread t gets
// channel t.
template <bool kRows, int kVec>
__device__ __forceinline__ PairOfSums
add_sets(const SumSets& sets, std::int64_t size, const Piece& piece, double* scratch) {
  using At = Position<kRows, kVec>;
  const auto lane_sums = [&](int k) {
    const int channel = At::channel() + k;
    PairOfSums sums;
    if (channel < piece.n_channel) {
      BNEXT_NO_UNROLL
      for (std::int64_t i = At::part(); i < size; i += At::parts()) {
        sums.a += __ldcg(sets.dy + i * sets.stride + channel);
        sums.b += __ldcg(sets.dy_xmu + i * sets.stride + channel);
      }
    }
    return sums;
  };
  __syncthreads();  // the scratch may still be read
  return sum_over_block<kRows, kVec>(lane_sums, scratch);
}

template <typename scalar_t>
__device__ __forceinline__ ChannelStats<AccType<scalar_t>> saved_stats(
    const BackwardElements<scalar_t>& elements, std::int64_t at) {
  return {__ldcg(elements.mean + at), __ldcg(elements.mean_lo + at), __ldcg(elements.invstd + at)};
}

// What a ghost's sums become, by the thread of the channel: makes them about the exact mean,
// returns the constants of grad_apply. `at` is the place of (ghost, channel).
template <typename scalar_t>
__device__ __forceinline__ BackwardConstants<AccType<scalar_t>> finish_grad_ghost(
    const GradOutputs<scalar_t>& out,
    const BackwardElements<scalar_t>& elements,
    const ChannelStats<AccType<scalar_t>>& stats,
    std::int64_t channel,
    std::int64_t at,
    double count,
    PairOfSums& sums,
    bool writes) {
  using acc_t = AccType<scalar_t>;
  GradSums exact{sums.a, sums.b};
  exact.subtract_mean_lo(stats.mean_lo);
  sums.b = exact.sum_dy_xmu;
  const acc_t scale = stats.invstd * get<scalar_t>(elements.weight, channel, 1);
  const auto constants = backward_constants(stats, scale, count, exact);
  if (writes && out.sum_dy != nullptr) {
    __stwb(out.sum_dy + at, exact.sum_dy);
    __stwb(out.sum_dy_xmu + at, exact.sum_dy_xmu);
  }
  if (writes && out.coef_x != nullptr) {
    __stwb(out.coef_x + at, constants.coef_x);
    __stwb(out.coef_0 + at, constants.coef_0);
  }
  return constants;
}

template <typename scalar_t>
__device__ __forceinline__ void store_parameter_grads(
    const GradOutputs<scalar_t>& out, std::int64_t channel, const PairOfSums& sums) {
  using acc_t = AccType<scalar_t>;
  __stwb(out.grad_bias + channel, static_cast<acc_t>(sums.a));
  __stwb(out.grad_weight + channel, static_cast<acc_t>(sums.b));
}

}  // namespace bnext::cuda
