#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace simt {

// splitmix64 (Steele, Lea and Flood, 2014): any seed will do.
class Random {
 public:
  explicit Random(std::uint64_t seed = 0) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  // From [0, end), with a bias that does not matter here.
  std::size_t below(std::size_t end) { return std::size_t(((next() >> 32) * end) >> 32); }

 private:
  std::uint64_t state_;
};

}  // namespace simt
