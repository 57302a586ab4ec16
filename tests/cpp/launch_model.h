// Devices and tensors to plan launches for, and a model of the walk of csrc/cuda/walk.cuh. The
// kernels' own walk is run by tests/simt; the model reaches tensors that are too large to run.
#pragma once

#include <initializer_list>

#include "core_cases.h"
#include "cuda/launch_config.h"
#include "cuda/workspace.h"

namespace core_cases {

using bnext::Layout;
using bnext::Order;
using bnext::cuda::DeviceProperties;
using bnext::cuda::kThreads;
using bnext::cuda::kVectorAlignment;
using bnext::cuda::Launch;
using bnext::cuda::Operands;
using bnext::cuda::Pass;
using bnext::cuda::Piece;
using bnext::cuda::Tiling;
using std::int64_t;

struct Device {
  const char* name;
  DeviceProperties properties;  // as cudaGetDeviceProperties gives them
};

constexpr int kKiB = 1024;
constexpr Device kT4{"T4", {40, 1024, 16, 64 * kKiB, 64 * kKiB}};               // sm_75
constexpr Device kA100{"A100", {108, 2048, 32, 164 * kKiB, 163 * kKiB}};        // sm_80
constexpr Device kRtx3090{"RTX 3090", {82, 1536, 16, 100 * kKiB, 99 * kKiB}};   // sm_86
constexpr Device kRtx4090{"RTX 4090", {128, 1536, 24, 100 * kKiB, 99 * kKiB}};  // sm_89
constexpr Device kH100{"H100 SXM", {132, 2048, 32, 228 * kKiB, 227 * kKiB}};    // sm_90
constexpr Device kB200{"B200", {148, 2048, 32, 228 * kKiB, 227 * kKiB}};        // sm_100
constexpr Device kRtx5090{"RTX 5090", {170, 1536, 24, 100 * kKiB, 99 * kKiB}};  // sm_120
constexpr Device kTiny{"a tiny device", {2, 512, 2, 48 * kKiB, 48 * kKiB}};

inline const std::vector<Device>& devices() {
  static const std::vector<Device> all{kT4,   kA100, kRtx3090, kRtx4090,
                                       kH100, kB200, kRtx5090, kTiny};
  return all;
}

inline Operands operands(
    Order order, int64_t n, int64_t c, int64_t s, int64_t ghosts, int bytes, int phase = 0) {
  return {{order, n, c, s}, ghosts, bytes, bytes == 8 ? 8 : 4, phase};
}

inline std::string describe(const Operands& of) {
  const Layout& layout = of.layout;
  std::ostringstream text;
  text << (layout.order == Order::kRows ? "rows" : "planes") << " (" << layout.n_batch << ", "
       << layout.n_channel << ", " << layout.spatial << ") of " << of.element_bytes << " bytes in "
       << of.num_ghosts << " ghosts at phase " << of.phase_bytes;
  return text.str();
}

struct Shape {
  int64_t n_batch, n_channel, spatial;
};

// Calls f(operands) for all shapes in both orders, one ghost to ghosts of one sample, all widths of
// elements and phases.
template <typename F>
void for_operands(const std::vector<Shape>& shapes, F&& f) {
  for (const Shape& shape : shapes) {
    const int64_t n = shape.n_batch;
    std::vector<int64_t> ghost_counts;
    for (int64_t ghosts : {int64_t(1), int64_t(3), n / 32, n / 2, n}) {
      if (ghosts >= 1 && ghosts <= n && (ghost_counts.empty() || ghosts > ghost_counts.back())) {
        ghost_counts.push_back(ghosts);
      }
    }
    for (Order order : {Order::kRows, Order::kPlanes}) {
      for (int64_t ghosts : ghost_counts) {
        for (int bytes : {8, 4, 2}) {
          for (int phase : {0, bytes, 16 - bytes, -1}) {
            f(operands(order, n, shape.n_channel, shape.spatial, ghosts, bytes, phase));
          }
        }
      }
    }
  }
}

inline const std::vector<Shape>& small_shapes() {
  static const std::vector<Shape> all{
      {1, 1, 2},    {2, 1, 1},    {7, 1, 13},   {64, 1, 1},   {5, 1, 2049}, {3, 2, 1},
      {2, 3, 1},    {13, 5, 3},   {4, 10, 49},  {33, 7, 49},  {9, 16, 1},   {100, 8, 1},
      {65, 129, 1}, {40, 12, 4},  {8, 24, 16},  {3, 3, 225},  {6, 2, 784},  {2, 2, 1021},
      {1, 4, 5000}, {70, 130, 2}, {3, 1, 4099}, {150, 2, 15},  // many short lines
      {12, 2, 1800}};  // lines cut in two, and walked down, if of 2 bytes
  return all;
}

inline const std::vector<Shape>& large_shapes() {
  static const std::vector<Shape> all{
      {32, 64, 112 * 112}, {32, 64, 56 * 56},   {32, 256, 56 * 56},       {32, 128, 28 * 28},
      {32, 512, 28 * 28},  {32, 1024, 14 * 14}, {32, 512, 7 * 7},         {32, 2048, 7 * 7},
      {256, 300, 17 * 17}, {1, 64, 56 * 56},    {2, 3, 224 * 224},        {4096, 256, 1},
      {4096, 1000, 1},     {1000003, 1, 1},     {1000000, 17, 1},         {1000000, 64, 1},
      {10007, 101, 1},     {64, 100000, 1},     {2, 100000, 49},          {2, 100003, 1},
      {3, 1, 1 << 24},     {100, 48, 100003},   {1024, 1024, 2111},       {70000, 100000, 1},
      {2, 1 << 29, 1},     {2, 1 << 28, 4},     {4, 3, int64_t(1) << 30}, {5, 1, int64_t(1) << 31}};
  return all;
}

inline std::vector<Shape> all_shapes() {
  std::vector<Shape> all = small_shapes();
  all.insert(all.end(), large_shapes().begin(), large_shapes().end());
  return all;
}

inline Launch on_chip(const Operands& of, int tensors, const DeviceProperties& device) {
  return on_chip_launch(of, tensors, device, bnext::cuda::detail::resident_blocks(device));
}

// Calls f(launch, operands, device, tensors) for the plans of all kernels; tensors == 0: not on
// chip.
template <typename F>
void for_launches(const std::vector<Shape>& shapes, F&& f) {
  for_operands(shapes, [&](const Operands& of) {
    for (const Device& device : devices()) {
      try {
        for (Pass pass : {Pass::kReduce, Pass::kApply}) {
          f(two_pass_launch(of, pass, device.properties), of, device.properties, 0);
        }
        for (int tensors = 1; tensors <= 3; ++tensors) {
          const Launch launch = on_chip(of, tensors, device.properties);
          if (launch.blocks != 0) {
            f(launch, of, device.properties, tensors);
          }
        }
      } catch (const std::runtime_error& error) {
        throw std::runtime_error(
            std::string(error.what()) + ": " + describe(of) + " on " + device.name);
      }
    }
  });
}

inline int vector_width(const Launch& launch, const Operands& of) {
  return launch.vector ? kVectorAlignment / of.element_bytes : 1;
}

// What walk.cuh does with one thread. Calls visit(offset, width, cache offset), and returns the
// largest number that the kernel's index type has to hold on the way.
template <typename Visit>
int64_t walk(
    const Launch& launch, const Piece& piece, int vec, int64_t tx, int64_t ty, Visit&& visit) {
  const Tiling& t = launch.tiling;
  const int64_t n_tx = launch.threads_x, n_ty = launch.threads_y;
  const bool down = launch.rows || t.lines_inner;
  const int64_t end = down ? piece.length / vec : piece.lines;
  int64_t largest = piece.lines + n_ty;
  for (int64_t outer = down ? tx : ty; outer < end; outer += down ? n_tx : n_ty) {
    int64_t offset, step, count, head = 0, tail = 0, first = 0, cache, cache_step;
    if (down) {
      offset = outer * vec + ty * t.line_stride;
      step = n_ty * t.line_stride;
      count = piece.lines > ty ? (piece.lines - ty + n_ty - 1) / n_ty : 0;
      cache = outer * vec + ty * t.cache_stride;
      cache_step = n_ty * t.cache_stride;
    } else {
      first = outer * t.line_stride;
      const int64_t phase = (t.phase + piece.offset + first) % vec;
      head = std::min((vec - phase) % vec, piece.length);
      const int64_t vectors = (piece.length - head) / vec;
      tail = piece.length - head - vectors * vec;
      offset = first + head + tx * vec;
      step = n_tx * vec;
      count = vectors > tx ? (vectors - tx + n_tx - 1) / n_tx : 0;
      cache = outer * t.cache_stride + phase + head + tx * vec;
      cache_step = step;
    }
    const int64_t line_cache = cache - (head + tx * vec);
    largest = std::max({largest, offset + count * step, step, cache + count * cache_step});
    for (int64_t i = 0; i < count; ++i) {
      visit(offset + i * step, vec, cache + i * cache_step);
    }
    if (!launch.rows && vec > 1) {
      if (tx < head) {
        visit(first + tx, 1, line_cache + tx);
      }
      if (tx < tail) {
        const int64_t at = piece.length - tail + tx;
        visit(first + at, 1, line_cache + at);
      }
    }
  }
  return largest;
}

}  // namespace core_cases
