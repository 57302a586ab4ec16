// How the threads of a block walk over a piece: each visits 16-byte vectors at a constant distance,
// several of them at once, so that as many loads are in flight.
#pragma once

#include "launch_config.h"
#include "memory.cuh"

namespace bnext::cuda {

// Where a thread stands in its tile. The threads of one column (all of a block in planes) hold
// parts of the same channels, kLanes of them.
template <bool kRows, int kVec>
struct Position {
  static constexpr int kLanes = kRows ? kVec : 1;

  __device__ static int thread() {
    return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  }
  __device__ static int columns() { return kRows ? static_cast<int>(blockDim.x) : 1; }
  __device__ static int column() { return kRows ? static_cast<int>(threadIdx.x) : 0; }
  __device__ static int part() { return kRows ? static_cast<int>(threadIdx.y) : thread(); }
  __device__ static int parts() { return kRows ? static_cast<int>(blockDim.y) : kThreads; }
  // The first of the thread's channels, counted from the tile's first.
  __device__ static int channel() { return column() * kLanes; }
  __device__ static int tile_channels() { return columns() * kLanes; }
};

// Vectors that a visitor takes at once, its kAtOnce: of 64-bit offsets not as many fit registers.
template <typename index_t>
constexpr int kUnrollFor = sizeof(index_t) > sizeof(int) ? kUnroll / 2 : kUnroll;

// Calls visit.seek(offset, cache) for the first vector of each series, visit.vectors<n>(step,
// cache_step) for a group of n vectors, `step` elements from each to the next, and
// visit.advance(step, cache_step) to go on; visit.scalar(offset, cache) for single elements before
// the first and after the last 16-byte boundary of a line. Offsets count from the piece's first
// element, `cache` offsets from the beginning of its copy in shared memory, whose lines keep their
// alignment. A visitor with blocks of kGroupsPerBlock groups gets the first group of each by
// first_vectors.
template <bool kRows, int kVec, typename index_t, typename Visitor>
__device__ __forceinline__ void walk(const Tiling& tiling, const Piece& piece, Visitor& visit) {
  constexpr int n = Visitor::kAtOnce;
  const index_t stride = static_cast<index_t>(tiling.line_stride);
  const index_t lines = static_cast<index_t>(piece.lines);
  const index_t length = static_cast<index_t>(piece.length);
  const index_t tx = threadIdx.x, ty = threadIdx.y;
  const index_t n_tx = blockDim.x, n_ty = blockDim.y;
  // Down the lines every line starts on a vector's boundary; along them each has its own phase.
  const bool down = kRows || tiling.lines_inner;
  const index_t outer_end = down ? length / kVec : lines;
  for (index_t outer = down ? tx : ty; outer < outer_end; outer += down ? n_tx : n_ty) {
    index_t step, count, head = 0, tail = 0, first = 0;
    int line_cache = 0, cache_step;
    if (down) {
      step = n_ty * stride;
      count = lines > ty ? (lines - ty + n_ty - 1) / n_ty : 0;
      cache_step = static_cast<int>(n_ty) * tiling.cache_stride;
      visit.seek(
          outer * kVec + ty * stride, static_cast<int>(outer * kVec + ty * tiling.cache_stride));
    } else {
      first = outer * stride;
      const unsigned at = static_cast<unsigned>(tiling.phase) +
                          static_cast<unsigned>(piece.offset) + static_cast<unsigned>(first);
      const index_t phase = at % kVec;
      line_cache = static_cast<int>(outer * tiling.cache_stride + phase);
      head = (kVec - phase) % kVec;
      head = head < length ? head : length;
      const index_t vectors = (length - head) / kVec;
      tail = length - head - vectors * kVec;
      step = n_tx * kVec;
      count = vectors > tx ? (vectors - tx + n_tx - 1) / n_tx : 0;
      cache_step = static_cast<int>(step);
      const index_t begin = head + tx * kVec;
      visit.seek(first + begin, line_cache + static_cast<int>(begin));
    }
    // The compiler shall not unroll what is unrolled already.
    if constexpr (Visitor::kGroupsPerBlock > 1) {
      // What a block needs once is not done in the inner loop, where the time goes.
      BNEXT_NO_UNROLL
      while (count >= n) {
        visit.template first_vectors<n>(step, cache_step);
        visit.advance(n * step, n * cache_step);
        count -= n;
        BNEXT_NO_UNROLL
        for (int group = 1; group < Visitor::kGroupsPerBlock && count >= n; ++group) {
          visit.template vectors<n>(step, cache_step);
          visit.advance(n * step, n * cache_step);
          count -= n;
        }
      }
    } else {
      BNEXT_NO_UNROLL
      for (; count >= n; count -= n) {
        visit.template vectors<n>(step, cache_step);
        visit.advance(n * step, n * cache_step);
      }
    }
    BNEXT_NO_UNROLL
    for (; count > 0; --count) {
      visit.template vectors<1>(step, cache_step);
      visit.advance(step, cache_step);
    }
    if constexpr (!kRows && kVec > 1) {
      if (tx < head) {
        visit.scalar(first + tx, line_cache + static_cast<int>(tx));
      }
      if (tx < tail) {
        const index_t end = length - tail + tx;
        visit.scalar(first + end, line_cache + static_cast<int>(end));
      }
    }
  }
}

}  // namespace bnext::cuda
