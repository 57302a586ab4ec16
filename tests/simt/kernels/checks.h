// What the checks of the real kernels share: problems, data, what the executor lets a kernel touch,
// and comparisons. Compiled with an include path to csrc or to a copy of it.
#pragma once

#include <cuda/workspace.h>
#include <cuda/elements.cuh>
#include <cuda/launch.cuh>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../executor.h"

namespace kernel_checks {

using namespace bnext;
using namespace bnext::cuda;

// Its first word tells what kind of failure it is: wrong, bits, counters or plan.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool right, const std::string& what) {
  if (!right) {
    throw Failure(what);
  }
}

struct Problem {
  const char* name;
  Order order;
  std::int64_t batch, channels, spatial, ghosts;
  int splits = 1;  // 0: as launch_config.h decides
  int row_bytes = detail::kNarrowRow;
  // On chip, where there are teams.
  int tile_teams = 0;
  int ghost_teams = 1;
  Activation activation = Activation::kNone;
  bool residual = false;
  int offset = 0;      // elements of each tensor past a multiple of 16 bytes
  bool apart = false;  // no common offset: single elements
  bool cumulative = false;
  bool infinite = false;  // the first value of the first channel
  bool constant = false;  // frozen statistics: eval
  bool affine = true;
  bool from_output = false;  // backward

  bool on_chip() const { return tile_teams != 0; }
  std::int64_t numel() const { return batch * channels * spatial; }
  std::int64_t at(std::int64_t n, std::int64_t c, std::int64_t s) const {
    return order == Order::kRows ? (n * spatial + s) * channels + c
                                 : (n * channels + c) * spatial + s;
  }
  double count(std::int64_t ghost) const {
    return static_cast<double>(split_range(batch, ghosts, ghost).size() * spatial);
  }

  // Calls f(element) for the values of a channel in a ghost; in all of them for -1.
  template <typename F>
  void for_values(std::int64_t ghost, std::int64_t c, F&& f) const {
    const Range samples = ghost < 0 ? Range{0, batch} : split_range(batch, ghosts, ghost);
    for (std::int64_t n = samples.begin; n < samples.end; ++n) {
      for (std::int64_t s = 0; s < spatial; ++s) {
        f(at(n, c, s));
      }
    }
  }
};

// Bytes that kernels may touch, filled with ones: NaN, -1.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size, int offset = 0)
      : size_(size),
        bytes_(static_cast<std::size_t>(size + offset) * sizeof(T) + kVectorAlignment) {
    void* start = bytes_.data();
    std::size_t space = bytes_.size();
    std::align(kVectorAlignment, bytes_.size() - kVectorAlignment, start, space);
    data_ = static_cast<T*>(start) + offset;
    clear();
    simt::register_memory(data_, static_cast<std::size_t>(size) * sizeof(T));
  }
  template <typename U>
  explicit Buffer(const std::vector<U>& values, int offset = 0)
      : Buffer(static_cast<std::int64_t>(values.size()), offset) {
    set(values);
  }
  Buffer(const Buffer&) = delete;

  void clear(int byte = 0xff) { std::memset(static_cast<void*>(data_), byte, size_ * sizeof(T)); }
  template <typename U>
  void set(const std::vector<U>& values) {
    for (std::int64_t i = 0; i < size_; ++i) {
      if constexpr (std::is_integral_v<T>) {
        data_[i] = static_cast<T>(values[i]);
      } else {
        data_[i] = from_acc<T>(static_cast<AccType<T>>(values[i]));
      }
    }
  }
  double operator[](std::int64_t i) const {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<double>(data_[i]);
    } else {
      return static_cast<double>(to_acc(data_[i]));
    }
  }
  T* data() { return data_; }
  std::int64_t size() const { return size_; }
  void append_to(std::vector<unsigned char>& bits) const {
    const auto* begin = reinterpret_cast<const unsigned char*>(data_);
    bits.insert(bits.end(), begin, begin + size_ * sizeof(T));
  }

 private:
  std::int64_t size_;
  std::vector<unsigned char> bytes_;
  T* data_ = nullptr;
};

// Bits of all outputs.
using Bits = std::vector<unsigned char>;

enum class Error { kRelative, kAbsolute };

template <typename Value>
void compare(
    const char* name,
    const Value& found,
    const std::vector<double>& wanted,
    double tolerance,
    Error error = Error::kRelative) {
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const double a = found[static_cast<std::int64_t>(i)], b = wanted[i];
    const bool same =
        a == b || (std::isnan(a) && std::isnan(b)) ||
        std::abs(a - b) <= tolerance * (error == Error::kRelative ? 1 + std::abs(b) : 1);
    require(
        same, std::string("wrong: ") + name + "[" + std::to_string(i) + "] is " +
                  std::to_string(a) + ", not " + std::to_string(b));
  }
}

// Numbers of [0, 1), the same everywhere.
class Uniform {
 public:
  explicit Uniform(std::uint64_t seed) : state_(seed * 2 + 1) {}
  double operator()() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(state_ >> 33) / 2147483648.0;
  }

 private:
  std::uint64_t state_;
};

// The inputs, as doubles that scalar_t holds exactly. Some channels have a mean far off.
struct Data {
  std::vector<double> input, residual, grad_output, weight, bias, running_mean, running_var;

  template <typename scalar_t>
  static Data make(const Problem& p) {
    Data data;
    Uniform draw(17);
    const auto rounded = [](double value) {
      return static_cast<double>(to_acc(from_acc<scalar_t>(static_cast<AccType<scalar_t>>(value))));
    };
    const double far = sizeof(scalar_t) < 4 ? -3.0 : -3000.3;
    for (auto* values : {&data.input, &data.residual, &data.grad_output}) {
      values->resize(p.numel());
    }
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const double mean = c % 3 == 1 ? far : 0.25 * static_cast<double>(c % 3);
      const double std = 0.5 + static_cast<double>(c % 4);
      p.for_values(-1, c, [&](std::int64_t i) {
        data.input[i] = rounded(mean + std * (draw() + draw() + draw() + draw() - 2) * 1.7);
        data.residual[i] = rounded(2 * draw() - 1);
        data.grad_output[i] = rounded(2 * draw() - 0.5);
      });
      data.weight.push_back(static_cast<float>(0.5 + draw()));
      data.bias.push_back(static_cast<float>(draw() - 0.5));
      data.running_mean.push_back(static_cast<float>(draw()));
      data.running_var.push_back(static_cast<float>(0.5 + draw()));
    }
    if (p.infinite) {
      data.input[0] = INFINITY;
    }
    return data;
  }
  double weight_of(const Problem& p, std::int64_t c) const { return p.affine ? weight[c] : 1; }
  double bias_of(const Problem& p, std::int64_t c) const { return p.affine ? bias[c] : 0; }
};

struct Moments {
  double mean = 0, variance = 0, count = 0;
};

inline Moments moments(
    const Problem& p, const std::vector<double>& x, std::int64_t ghost, std::int64_t c) {
  Moments m;
  p.for_values(ghost, c, [&](std::int64_t i) {
    m.mean += x[i];
    ++m.count;
  });
  m.mean /= m.count;
  p.for_values(ghost, c, [&](std::int64_t i) { m.variance += (x[i] - m.mean) * (x[i] - m.mean); });
  m.variance /= m.count;
  return m;
}

constexpr double kEps = 1e-3;

// How a problem is cut, by hand so that small tensors take every path.
template <typename scalar_t>
Launch plan(const Problem& p, int tensors, Pass pass) {
  Operands operands{};
  operands.layout = {p.order, p.batch, p.channels, p.spatial};
  operands.num_ghosts = p.ghosts;
  operands.element_bytes = sizeof(scalar_t);
  operands.acc_bytes = sizeof(AccType<scalar_t>);
  operands.phase_bytes = p.apart ? -1 : p.offset * static_cast<int>(sizeof(scalar_t));
  const simt::Device& device = simt::device();
  const DeviceProperties properties{
      device.sm_count, device.max_threads_per_sm, device.max_blocks_per_sm,
      static_cast<int>(device.shared_per_sm), static_cast<int>(device.shared_per_block_optin)};
  if (p.splits == 0) {
    const Launch launch =
        p.on_chip()
            ? on_chip_launch(operands, tensors, properties, detail::resident_blocks(properties))
            : two_pass_launch(operands, pass, properties);
    require(launch.blocks > 0, "plan: does not fit on chip");
    return launch;
  }
  Launch launch = detail::base_launch(operands, p.row_bytes, properties);
  detail::cut(launch, p.splits);
  const Tiling& t = launch.tiling;
  require(
      t.splits() == p.splits,
      "plan: cut into " + std::to_string(t.splits()) + ", not " + std::to_string(p.splits));
  if (!p.on_chip()) {
    launch.blocks = p.ghosts * t.tiles * t.splits();
    launch.shared_bytes = pass == Pass::kReduce
                              ? scratch_end(t.tile_channels, operands.acc_bytes)
                              : constants_end(t.tile_channels, operands.acc_bytes);
    return launch;
  }
  launch.cache_elements = static_cast<int>(detail::cache_size(launch, operands.element_bytes));
  launch.shared_bytes = seen_end(t.tile_channels, operands.acc_bytes) +
                        launch.cache_elements * tensors * operands.element_bytes;
  launch.cooperative = t.splits() > 1;
  launch.tile_teams = std::min(p.tile_teams, t.tiles);
  launch.ghost_teams = p.ghost_teams;
  launch.blocks = static_cast<std::int64_t>(launch.num_teams()) * t.splits();
  return launch;
}

// The workspace of a launch, of any content, and its counters.
template <typename Sets>
struct Memory {
  WorkspaceSize size;
  Buffer<double> doubles;
  Buffer<unsigned> counters;
  Workspace<Sets> workspace;
  unsigned* barriers = nullptr;

  Memory(const Launch& launch, bool on_chip, bool merges_ghosts)
      : size(workspace_size(launch, on_chip, merges_ghosts)),
        doubles(size.doubles),
        counters(size.counters) {
    counters.clear(0);
    workspace =
        make_workspace<Sets>(launch, size, on_chip, {doubles.data(), counters.data()}, &barriers);
  }

  void check_counters() const {
    for (std::int64_t i = 0; i < counters.size(); ++i) {
      require(counters[i] == 0, "counters: one is left at " + std::to_string(counters[i]));
    }
  }
};

inline void check_launch(cudaError_t error) {
  require(error == cudaSuccess, std::string("plan: ") + cudaGetErrorString(error));
}

struct Case {
  std::string name;
  Bits (*run)(const Problem&);
  Problem problem;
};

// Runs the named cases, or all, each twice in order and once for each of a few other seeds.
inline int run_cases(const std::vector<Case>& cases, int count, char** arguments) {
  int seeds = 3, runs = 0;
  std::vector<std::string> names;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument.starts_with("--seeds=")) {
      seeds = std::stoi(argument.substr(8));
    } else {
      names.push_back(argument);
    }
  }
  for (const Case& each : cases) {
    const auto is_this = [&](const std::string& name) { return name == each.name; };
    if (!names.empty() && std::find_if(names.begin(), names.end(), is_this) == names.end()) {
      continue;
    }
    ++runs;
    try {
      Bits first;
      for (int seed = 0; seed < seeds; ++seed) {
        simt::set_seed(static_cast<unsigned>(seed));
        const Bits bits = each.run(each.problem);
        simt::clear_memory();
        require(seed == 0 || bits == first, "bits: others under another seed");
        first = bits;
      }
    } catch (const Failure& failure) {
      std::printf("%s: %s\n", each.name.c_str(), failure.what());
      return 1;
    } catch (const simt::Error& error) {
      std::printf("%s: error: %s\n", each.name.c_str(), error.what());
      return 1;
    }
  }
  if (!names.empty() && runs != static_cast<int>(names.size())) {
    std::printf("%d of %zu named cases: plan: no such case\n", runs, names.size());
    return 1;
  }
  std::printf("%d cases pass\n", runs);
  return runs == 0;
}

}  // namespace kernel_checks
