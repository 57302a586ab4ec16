// A kernel's view of its thread, block and warp.
#pragma once

#include <vector_types.h>

#include <bit>
#include <concepts>
#include <cstdint>
#include <source_location>
#include <type_traits>

#pragma GCC visibility push(hidden)

// Those of the running CUDA thread: the executor writes them when it switches.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

namespace simt {

using Site = std::source_location;

enum class WarpOp : unsigned char { kSync, kShuffle, kVote };

void barrier(const Site& site);
// Waits for the lanes of `mask`. A shuffle returns the `value` of lane `source`; a vote the mask of
// the lanes with a value other than 0.
std::uint64_t warp_op(
    WarpOp op, unsigned mask, std::uint64_t value, unsigned source, const Site& site);
unsigned active_mask();
unsigned lane();
[[noreturn]] void fail_bad_width(int width, const Site& site);

template <typename T, typename... Types>
concept OneOf = (std::same_as<T, Types> || ...);

template <typename T>
concept Shuffled =
    OneOf<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>;

// The segment of `width` lanes that a shuffle stays within: its first lane.
inline unsigned first_of_segment(int width, const Site& site) {
  if (width < 1 || width > warpSize || !std::has_single_bit(unsigned(width))) {
    fail_bad_width(width, site);
  }
  return lane() & ~unsigned(width - 1);
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const Site& site) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  auto bits = std::bit_cast<Bits>(value);
  return std::bit_cast<T>(Bits(warp_op(WarpOp::kShuffle, mask, bits, source, site)));
}

}  // namespace simt

inline void __syncthreads(const simt::Site& site = simt::Site::current()) {
  simt::barrier(site);
}

inline void __syncwarp(
    unsigned mask = 0xffffffffu, const simt::Site& site = simt::Site::current()) {
  simt::warp_op(simt::WarpOp::kSync, mask, 0, 0, site);
}

template <simt::Shuffled T>
T __shfl_sync(
    unsigned mask,
    T value,
    int source,
    int width = warpSize,
    const simt::Site& site = simt::Site::current()) {
  unsigned first = simt::first_of_segment(width, site);
  return simt::shuffle(mask, value, first + (unsigned(source) & unsigned(width - 1)), site);
}

template <simt::Shuffled T>
T __shfl_xor_sync(
    unsigned mask,
    T value,
    int lane_mask,
    int width = warpSize,
    const simt::Site& site = simt::Site::current()) {
  // A lane of an earlier segment may be read, one of a later segment not.
  unsigned source = simt::lane() ^ unsigned(lane_mask);
  bool inside = source < simt::first_of_segment(width, site) + unsigned(width);
  return simt::shuffle(mask, value, inside ? source : simt::lane(), site);
}

template <simt::Shuffled T>
T __shfl_down_sync(
    unsigned mask,
    T value,
    unsigned delta,
    int width = warpSize,
    const simt::Site& site = simt::Site::current()) {
  unsigned offset = simt::lane() - simt::first_of_segment(width, site);
  bool inside = delta < unsigned(width) - offset;
  return simt::shuffle(mask, value, simt::lane() + (inside ? delta : 0), site);
}

template <simt::Shuffled T>
T __shfl_up_sync(
    unsigned mask,
    T value,
    unsigned delta,
    int width = warpSize,
    const simt::Site& site = simt::Site::current()) {
  unsigned offset = simt::lane() - simt::first_of_segment(width, site);
  return simt::shuffle(mask, value, simt::lane() - (delta <= offset ? delta : 0), site);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return unsigned(simt::warp_op(simt::WarpOp::kVote, mask, predicate != 0, 0, site));
}

inline int __any_sync(
    unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::warp_op(simt::WarpOp::kVote, mask, predicate != 0, 0, site) != 0;
}

inline int __all_sync(
    unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::warp_op(simt::WarpOp::kVote, mask, predicate != 0, 0, site) == mask;
}

inline unsigned __activemask() {
  return simt::active_mask();
}

#pragma GCC visibility pop
