// Statistics of a channel: in a thread, over a block, over pieces and over ghosts.
#pragma once

#include "../core/normalize.h"
#include "../core/running_stats.h"
#include "../core/welford.h"
#include "block_reduce.cuh"
#include "kernel_args.h"

namespace bnext::cuda {

// Groups of vectors whose sums are kept in acc_t about one pivot, the mean of the first. With as
// many single vectors after them, and groups of four (half types on chip: of two), the bound of
// docs/math.md, section 4, is 1 + n / k <= 7 for floats and 13 for half types, which have no digits
// to lose: doubles are scarce on many GPUs.
template <typename scalar_t>
constexpr int kGroupsPerBlock = sizeof(scalar_t) > 2 ? 4 : 8;

template <typename scalar_t>
__device__ __forceinline__ AccType<scalar_t> get(
    const ChannelArray& array, std::int64_t channel, AccType<scalar_t> otherwise) {
  using acc_t = AccType<scalar_t>;
  if (array.data == nullptr) {
    return otherwise;
  }
  const std::int64_t at = channel * array.stride;
  return array.is_acc ? __ldcg(static_cast<const acc_t*>(array.data) + at)
                      : to_acc(__ldcg(static_cast<const scalar_t*>(array.data) + at));
}

template <typename scalar_t>
__device__ __forceinline__ void set(
    const ChannelArray& array, std::int64_t channel, AccType<scalar_t> value) {
  using acc_t = AccType<scalar_t>;
  const std::int64_t at = channel * array.stride;
  if (array.is_acc) {
    __stwb(static_cast<acc_t*>(array.data) + at, value);
  } else {
    __stwb(static_cast<scalar_t*>(array.data) + at, from_acc<scalar_t>(value));
  }
}

// The sum of n values, pairwise: n - 1 additions, log2(n) deep.
template <int n, typename acc_t>
__device__ __forceinline__ acc_t pairwise_sum(const acc_t (&values)[n]) {
  acc_t sums[n];
  BNEXT_UNROLL
  for (int i = 0; i < n; ++i) {
    sums[i] = values[i];
  }
  BNEXT_UNROLL
  for (int width = n / 2; width > 0; width /= 2) {
    BNEXT_UNROLL
    for (int i = 0; i < width; ++i) {
      sums[i] += sums[i + width];
    }
  }
  return sums[0];
}

// Sums over a group of vectors: per lane where lanes are channels, else over all values.
template <int kLanes, int kVec, typename acc_t>
__device__ __forceinline__ void add_lanes(const acc_t (&sums)[kVec], acc_t (&totals)[kLanes]) {
  if constexpr (kLanes == kVec) {
    BNEXT_UNROLL
    for (int k = 0; k < kLanes; ++k) {
      totals[k] += sums[k];
    }
  } else {
    totals[0] += pairwise_sum(sums);
  }
}

// The moments of what one thread has seen, per lane. A block of groups is summed in acc_t about the
// mean of its first group; blocks are summed in double about the pivot of the thread's first.
template <typename scalar_t, int kLanes>
class ThreadMoments {
  using acc_t = AccType<scalar_t>;
  // Doubles are summed in double: once to find the mean, and again about it, so that nothing
  // cancels. Sums of floats have bits to spare.
  static constexpr int kRounds = std::is_same_v<scalar_t, double> ? 2 : 1;
  // Values of half types differ from each other by 2^-11 of their size or not at all: doubles bear
  // sums about 0, whose cancellation is that size squared, 2^22. That saves registers.
  static constexpr bool kHasOrigin = sizeof(scalar_t) > 2;

 public:
  // Begins a block with the mean of a group as its pivot. Vectors stay as they lie in memory until
  // their turn: half types take half the registers.
  template <int n, int kVec>
  __device__ __forceinline__ void start_block(const Raw<scalar_t, kVec> (&vectors)[n]) {
    flush();
    acc_t sums[kVec], means[kLanes] = {};
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      acc_t x[kVec];
      unpack(vectors[u], x);
      BNEXT_UNROLL
      for (int k = 0; k < kVec; ++k) {
        sums[k] = u == 0 ? x[k] : sums[k] + x[k];
      }
    }
    add_lanes<kLanes>(sums, means);
    BNEXT_UNROLL
    for (int k = 0; k < kLanes; ++k) {
      pivot_[k] = finite_pivot(means[k] * (acc_t(kLanes) / acc_t(n * kVec)));
      sum_d_[k] = 0;
      sum_dd_[k] = 0;
      if constexpr (kHasOrigin) {
        origin_[k] = total_count_ == 0 ? pivot_[k] : origin_[k];
      }
    }
    singles_ = 0;
  }

  // One vector or element, to the block there is, unless that has seen many of them.
  template <int kVec>
  __device__ __forceinline__ void add_single(const Raw<scalar_t, kVec> (&vector)[1]) {
    if (singles_ == kGroupsPerBlock<scalar_t>) {
      start_block(vector);
    }
    ++singles_;
    add(vector);
  }

  template <int n, int kVec>
  __device__ __forceinline__ void add(const Raw<scalar_t, kVec> (&vectors)[n]) {
    static_assert(kLanes == 1 || kLanes == kVec);
    acc_t sum_d[kVec], sum_dd[kVec];
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      acc_t x[kVec];
      unpack(vectors[u], x);
      BNEXT_UNROLL
      for (int k = 0; k < kVec; ++k) {
        const acc_t d = x[k] - pivot_[k % kLanes];
        sum_d[k] = u == 0 ? d : sum_d[k] + d;
        sum_dd[k] = u == 0 ? d * d : Math<acc_t>::fmadd(d, d, sum_dd[k]);
      }
    }
    add_lanes<kLanes>(sum_d, sum_d_);
    add_lanes<kLanes>(sum_dd, sum_dd_);
    count_ += n * kVec / kLanes;
  }

  // The moments of what the whole block has seen: thread t gets those of channel t of the tile,
  // which are of `count` values. The mean is relative to the thread's `base`.
  template <bool kRows, int kVec>
  __device__ __forceinline__ Welford<double> over_block(
      double count, double base, double* scratch) {
    using At = Position<kRows, kVec>;
    flush();
    double* pivots = scratch;
    double* sums_scratch = scratch + At::tile_channels();
    // The first part of each column has always seen a value.
    if (At::part() == 0) {
      BNEXT_UNROLL
      for (int k = 0; k < kLanes; ++k) {
        pivots[At::channel() + k] = origin(k);
      }
    }
    const int thread = At::thread();
    PairOfSums total;
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0 && thread < At::tile_channels()) {
        pivots[thread] = finite_pivot(pivots[thread] + total.a / count);
      }
      __syncthreads();
      const auto lane_sums = [&](int k) -> PairOfSums {
        const double distance = origin(k) - pivots[At::channel() + k];
        ShiftedSums<double> shifted;
        shifted.add_shifted(
            distance, static_cast<double>(total_count_), totals_[k].sum_d, totals_[k].sum_dd);
        return {shifted.sum_d, shifted.sum_dd};
      };
      total = sum_over_block<kRows, kVec>(lane_sums, sums_scratch);
    }
    if (thread >= At::tile_channels()) {
      return {};
    }
    const double pivot = kHasBase<scalar_t> ? pivots[thread] - base : pivots[thread];
    return ShiftedSums<double>{total.a, total.b}.moments(pivot, count, 1 / count);
  }

 private:
  __device__ __forceinline__ double origin(int k) const {
    return kHasOrigin ? static_cast<double>(origin_[k]) : 0.0;
  }

  __device__ __forceinline__ void flush() {
    const double count = count_;
    BNEXT_UNROLL
    for (int k = 0; k < kLanes; ++k) {
      const double distance = static_cast<double>(pivot_[k]) - origin(k);
      totals_[k].add_shifted(distance, count, sum_d_[k], sum_dd_[k]);
    }
    total_count_ += count_;
    count_ = 0;
  }

  acc_t pivot_[kLanes] = {}, sum_d_[kLanes] = {}, sum_dd_[kLanes] = {};
  int count_ = 0;  // values per lane in the block
  // Vectors and elements in the block that came alone; so many that the first one begins a block.
  int singles_ = kGroupsPerBlock<scalar_t>;
  acc_t origin_[kHasOrigin ? kLanes : 1] = {};
  ShiftedSums<double> totals_[kLanes];
  int total_count_ = 0;
};

// What the means of a ghost are relative to (kHasBase), by the thread of the channel; else 0.
template <bool kRows, typename scalar_t>
__device__ __forceinline__ double base_of(
    const scalar_t* input,
    const Tiling& tiling,
    std::int64_t ghost,
    std::int32_t tile,
    int thread) {
  double base = 0;
  if constexpr (kHasBase<scalar_t>) {
    const Piece first = tiling.piece(kRows, ghost, tile, 0);
    if (thread < first.n_channel) {  // a tile of planes is one channel
      base = finite_pivot(__ldg(input + first.offset + thread));
    }
  }
  return base;
}

// The same moments relative to a base that is lower by `distance`.
template <typename scalar_t>
__device__ __forceinline__ Welford<double> rebase(Welford<double> welford, double distance) {
  if constexpr (kHasBase<scalar_t>) {
    welford.mean += distance;
  }
  return welford;
}

// Writes one set: thread t of the tile the moments of channel t.
__device__ __forceinline__ void store_triples(
    const TripleSets& sets,
    std::int64_t set,
    const Piece& piece,
    int thread,
    const Welford<double>& welford) {
  if (thread < piece.n_channel) {
    __stcg(sets.mean + set * sets.stride + thread, welford.mean);
    __stcg(sets.m2 + set * sets.stride + thread, welford.m2);
  }
  if (thread == 0) {
    __stcg(sets.count + set * sets.count_stride, welford.count);
  }
}

// The first set, whose sets hold `count` values: thread t gets channel t.
__device__ __forceinline__ Welford<double> load_triple(
    const TripleSets& sets, const Piece& piece, int thread, double count) {
  if (thread >= piece.n_channel) {
    return {};
  }
  return {count, __ldcg(sets.mean + thread), __ldcg(sets.m2 + thread)};
}

// The merge of the first `size` sets, which hold `count` values together, by all threads of the
// block in a fixed order: thread t gets channel t. The mean of the first set is the pivot of all.
template <bool kRows, int kVec>
__device__ __forceinline__ Welford<double> merge_triples(
    const TripleSets& sets,
    std::int64_t size,
    const Piece& piece,
    double count,
    double one_over_count,
    double* scratch) {
  using At = Position<kRows, kVec>;
  const auto lane_sums = [&](int k) -> PairOfSums {
    const int channel = At::channel() + k;
    ShiftedSums<double> lane;
    if (channel < piece.n_channel && At::part() < size) {
      const double pivot = finite_pivot(__ldcg(sets.mean + channel));
      BNEXT_NO_UNROLL
      for (std::int64_t i = At::part(); i < size; i += At::parts()) {
        const std::int64_t at = i * sets.stride + channel;
        lane.add_shifted(
            __ldcg(sets.mean + at) - pivot, __ldcg(sets.count + i * sets.count_stride), 0.0,
            __ldcg(sets.m2 + at));
      }
    }
    return {lane.sum_d, lane.sum_dd};
  };
  __syncthreads();  // the scratch may still be read
  const PairOfSums total = sum_over_block<kRows, kVec>(lane_sums, scratch);
  const int thread = At::thread();
  if (thread >= piece.n_channel) {
    return {};
  }
  const double pivot = finite_pivot(__ldcg(sets.mean + thread));
  return ShiftedSums<double>{total.a, total.b}.moments(pivot, count, one_over_count);
}

// What a ghost's moments, relative to `base`, become, by the thread of the channel.
template <typename scalar_t>
__device__ __forceinline__ ChannelStats<AccType<scalar_t>> finish_ghost(
    const StatsOutputs<scalar_t>& out,
    std::int64_t at,
    const Welford<double>& welford,
    double base) {
  if (out.mean != nullptr) {
    __stwb(out.mean + at, rebase<scalar_t>(welford, base).mean);
    __stwb(out.m2 + at, welford.m2);
  }
  const auto stats = channel_stats<AccType<scalar_t>>(welford, out.eps, base);
  if (out.saved.mean != nullptr) {
    __stwb(out.saved.mean + at, stats.mean);
    __stwb(out.saved.mean_lo + at, stats.mean_lo);
    __stwb(out.saved.invstd + at, stats.invstd);
  }
  return stats;
}

// The update of a channel's running statistics by the whole batch, whose mean is relative to
// `base`.
template <typename scalar_t>
__device__ __forceinline__ void update_running(
    const RunningStats& running,
    std::int64_t channel,
    const Welford<double>& welford,
    double base) {
  if (running.mean.data == nullptr) {
    return;
  }
  const std::int64_t batches = running.num_batches == nullptr ? 0 : __ldcg(running.num_batches) + 1;
  const double factor = average_factor(running.cumulative, running.momentum, batches);
  AccType<scalar_t> mean = get<scalar_t>(running.mean, channel, 0);
  AccType<scalar_t> var = get<scalar_t>(running.var, channel, 0);
  update_running_stats(rebase<scalar_t>(welford, base), factor, mean, var);
  set<scalar_t>(running.mean, channel, mean);
  set<scalar_t>(running.var, channel, var);
}

// After all tiles have read num_batches, the last of them counts this batch.
__device__ __forceinline__ void count_batch(
    const RunningStats& running, unsigned* counter, unsigned tiles, int* flag) {
  if (running.num_batches != nullptr && arrive_last(counter, tiles, flag) && threadIdx.x == 0 &&
      threadIdx.y == 0) {
    __stwb(running.num_batches, __ldcg(running.num_batches) + 1);
  }
}

}  // namespace bnext::cuda
