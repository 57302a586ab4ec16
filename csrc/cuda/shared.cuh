// The dynamic shared memory of every kernel; launch_config.h says how large its parts are.
#pragma once

#include "../core/normalize.h"
#include "walk.cuh"

// Its beginning is a multiple of 16 bytes.
extern __shared__ __align__(16) unsigned char bnext_shared[];

namespace bnext::cuda {

template <typename acc_t, int kLanes>
struct ForwardLanes {
  acc_t mean[kLanes], scale[kLanes], shift[kLanes];
};

template <typename acc_t, int kLanes>
struct BackwardLanes : ForwardLanes<acc_t, kLanes> {
  acc_t coef_x[kLanes], coef_0[kLanes];
};

// The constants of each channel of the tile: thread t computes those of channel t, once for all.
template <typename acc_t>
struct SharedConstants {
  acc_t* values;  // [kConstants, channels]
  int channels;

  __device__ __forceinline__ void set(int channel, const ForwardConstants<acc_t>& constants) const {
    values[channel] = constants.mean;
    values[channels + channel] = constants.scale;
    values[2 * channels + channel] = constants.shift;
  }
  __device__ __forceinline__ void set(
      int channel, const BackwardConstants<acc_t>& constants) const {
    values[3 * channels + channel] = constants.coef_x;
    values[4 * channels + channel] = constants.coef_0;
  }

  // Those of a thread's lanes, `first` the first of its channels.
  template <int kLanes>
  __device__ __forceinline__ void get(int first, ForwardLanes<acc_t, kLanes>& lanes) const {
    BNEXT_UNROLL
    for (int k = 0; k < kLanes; ++k) {
      lanes.mean[k] = values[first + k];
      lanes.scale[k] = values[channels + first + k];
      lanes.shift[k] = values[2 * channels + first + k];
    }
  }
  template <int kLanes>
  __device__ __forceinline__ void get_coefficients(
      int first, BackwardLanes<acc_t, kLanes>& lanes) const {
    BNEXT_UNROLL
    for (int k = 0; k < kLanes; ++k) {
      lanes.coef_x[k] = values[3 * channels + first + k];
      lanes.coef_0[k] = values[4 * channels + first + k];
    }
  }
};

// The parts of the block's shared memory.
template <typename scalar_t>
struct Shared {
  using acc_t = AccType<scalar_t>;
  int channels;  // of the tile

  __device__ __forceinline__ int* flag() const { return reinterpret_cast<int*>(bnext_shared); }
  __device__ __forceinline__ SharedConstants<acc_t> constants() const {
    return {reinterpret_cast<acc_t*>(bnext_shared + kFlagBytes), channels};
  }
  __device__ __forceinline__ double* scratch() const {
    return reinterpret_cast<double*>(bnext_shared + constants_end(channels, sizeof(acc_t)));
  }
  template <typename Seen>
  __device__ __forceinline__ Seen* seen() const {
    static_assert(sizeof(Seen) <= kSeenBytes);
    return reinterpret_cast<Seen*>(bnext_shared + scratch_end(channels, sizeof(acc_t)));
  }
  __device__ __forceinline__ scalar_t* cache() const {
    return reinterpret_cast<scalar_t*>(bnext_shared + seen_end(channels, sizeof(acc_t)));
  }
};

}  // namespace bnext::cuda
