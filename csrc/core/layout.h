// How an (N, C, *) tensor lies in memory, and how its samples are cut into ghosts.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace bnext {

enum class Order {
  kRows,    // channels innermost: (N * S) rows of C      (2-D input, channels_last)
  kPlanes,  // spatial innermost: N * C planes of S       (contiguous input)
};

struct Layout {
  Order order;
  std::int64_t n_batch;
  std::int64_t n_channel;
  std::int64_t spatial;

  BNEXT_HD std::int64_t numel() const { return n_batch * n_channel * spatial; }
};

struct Range {
  std::int64_t begin;
  std::int64_t end;

  BNEXT_HD std::int64_t size() const { return end - begin; }
};

// Piece i of `total` items cut into `pieces` near-equal ranges: the first total % pieces ones are
// longer by one, as in torch.tensor_split.
BNEXT_HD inline Range split_range(std::int64_t total, std::int64_t pieces, std::int64_t i) {
  const std::int64_t size = total / pieces;
  const std::int64_t longer = total % pieces;
  const std::int64_t begin = i * size + (i < longer ? i : longer);
  return {begin, begin + size + (i < longer ? 1 : 0)};
}

BNEXT_HD inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);  // a + b - 1 could overflow
}

}  // namespace bnext
