// Every kernel, launched by a plain CUDA program without torch: built by nvcc, and by the host's
// compiler with the executor (tests/cuda/test_standalone.py). Prints "ok", or what is wrong.
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/kernels.cuh"
#include "../../csrc/cuda/launch_config.h"
#include "../../csrc/cuda/workspace.h"
#include "standalone.h"

using namespace bnext;
using namespace bnext::cuda;
using standalone::kEps;
using standalone::kMomentum;
using standalone::Problem;

namespace {

// Small tensors need teams there, and every GPU holds its 8 blocks of at most 48 KiB at once.
constexpr DeviceProperties kSmallDevice{4, 1024, 16, 100 << 10, 48 << 10};

void check(bool right, const char* what) {
  if (!right) {
    std::printf("wrong: %s\n", what);
    std::exit(1);
  }
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    std::printf("%s: %s: %s\n", what, cudaGetErrorName(error), cudaGetErrorString(error));
    std::exit(1);
  }
}

// An array on the device.
template <typename T>
struct Array {
  T* data = nullptr;
  std::size_t size;

  explicit Array(std::size_t n, int byte = 0xFF) : size(n) {
    check(cudaMalloc(&data, (n + 1) * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data, byte, n * sizeof(T)), "cudaMemset");  // by default NaN
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    check(cudaMemcpy(data, values.data(), size * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data); }

  std::vector<T> host() const {
    std::vector<T> values(size);
    check(cudaMemcpy(values.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }
};

template <typename T>
void check_close(
    const Array<T>& actual,
    const std::vector<double>& expected,
    double tolerance,
    double size,
    const char* what) {
  const std::vector<T> values = actual.host();
  check(values.size() == expected.size(), what);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double value = static_cast<double>(static_cast<float>(values[i]));
    if (!(std::abs(value - expected[i]) <= tolerance * (size + std::abs(expected[i])))) {
      std::printf("wrong: %s[%zu] is %.9g, not %.9g\n", what, i, value, expected[i]);
      std::exit(1);
    }
  }
}

template <typename Args>
void start(
    void (*kernel)(Args),
    const Args& args,
    dim3 grid,
    dim3 block,
    int shared,
    bool cooperative,
    const char* what) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), what);
  check(cudaDeviceSynchronize(), what);
}

template <typename Args>
void start(void (*kernel)(Args), const Args& args, const Launch& launch, const char* what) {
  start(
      kernel, args, dim3(static_cast<unsigned>(launch.blocks)),
      dim3(static_cast<unsigned>(launch.threads_x), static_cast<unsigned>(launch.threads_y)),
      launch.shared_bytes, launch.cooperative, what);
}

template <typename Args>
void start_threads(void (*kernel)(Args), const Args& args, std::int64_t threads, const char* what) {
  const auto blocks = static_cast<unsigned>(ceil_div(threads, kThreads));
  start(kernel, args, dim3(blocks), dim3(kThreads), kFlagBytes, false, what);
}

// What the blocks of a launch share; its counters must be zero again at the end.
template <typename Sets>
struct Memory {
  WorkspaceSize size;
  Array<double> doubles;
  Array<unsigned> counters;
  unsigned* barriers = nullptr;
  Workspace<Sets> workspace;

  Memory(const Launch& launch, bool on_chip)
      : size(workspace_size(launch, on_chip, true)),
        doubles(static_cast<std::size_t>(size.doubles)),
        counters(static_cast<std::size_t>(size.counters), 0),
        workspace(
            make_workspace<Sets>(launch, size, on_chip, {doubles.data, counters.data}, &barriers)) {
  }
  ~Memory() {
    for (const unsigned count : counters.host()) {
      check(count == 0, "a counter after the launch");
    }
  }
};

template <typename T>
std::vector<T> cast(const std::vector<double>& values) {
  std::vector<T> out;
  for (const double value : values) {
    out.push_back(static_cast<T>(static_cast<float>(value)));
  }
  return out;
}

template <typename scalar_t, bool kRows>
class Run {
  static constexpr int kVec = kVectorSize<scalar_t>;
  static constexpr Fusion kFusion = Fusion::kRelu;
  static constexpr double kTolerance = std::is_same_v<scalar_t, float>    ? 1e-5
                                       : std::is_same_v<scalar_t, __half> ? 1e-3
                                                                          : 8e-3;

  const Problem& p;
  const std::size_t n = p.x.size(), channels = p.weight.size(), stats = p.mean.size();
  Array<scalar_t> x{cast<scalar_t>(p.x)}, dy{cast<scalar_t>(p.dy)}, y{n}, dx{n};
  Array<float> weight{cast<float>(p.weight)}, bias{cast<float>(p.bias)};
  Array<float> mean{stats}, mean_lo{stats}, invstd{stats}, dweight{channels}, dbias{channels};
  Array<float> running_mean{std::vector<float>(channels, 0)};
  Array<float> running_var{std::vector<float>(channels, 1)};
  Array<std::int64_t> num_batches{std::vector<std::int64_t>(1, 4)};

  SavedStats<scalar_t> saved() { return {mean.data, mean_lo.data, invstd.data}; }
  RunningStats running() {
    return {
        {running_mean.data, 1, true},
        {running_var.data, 1, true},
        num_batches.data,
        kMomentum,
        false};
  }
  ForwardElements<scalar_t> forward_elements() {
    return {x.data,           nullptr, y.data, {weight.data, 1, true}, {bias.data, 1, true},
            Activation::kRelu};
  }
  BackwardElements<scalar_t> backward_elements() {
    BackwardElements<scalar_t> e{};
    e.grad_output = dy.data;
    e.input = x.data;
    e.grad_input = dx.data;
    e.weight = {weight.data, 1, true};
    e.bias = {bias.data, 1, true};
    e.mean = mean.data;
    e.mean_lo = mean_lo.data;
    e.invstd = invstd.data;
    e.activation = Activation::kRelu;
    e.derivative = Derivative::kFromInput;
    return e;
  }

  Operands operands() const { return {p.layout, p.num_ghosts, sizeof(scalar_t), 4, 0}; }
  Launch two_pass(Pass pass) const {
    const Launch launch = two_pass_launch(operands(), pass, kSmallDevice);
    check(launch.rows == kRows && launch.vector && !launch.wide_index, "the kind of the launch");
    return launch;
  }
  Launch on_chip(int tensors, bool team) const {
    const Launch launch =
        on_chip_launch(operands(), tensors, kSmallDevice, detail::resident_blocks(kSmallDevice));
    check(launch.blocks > 0 && launch.cooperative == team, "lone blocks or teams");
    check(launch.rows == kRows && launch.vector, "the kind of the launch on chip");
    return launch;
  }

  void check_statistics() {
    check_close(mean, p.mean, 1e-5, 1, "mean");
    check_close(invstd, p.invstd, 1e-5, 1, "invstd");
    check_close(running_mean, p.running_mean, 1e-5, 1, "running_mean");
    check_close(running_var, p.running_var, 1e-5, 1, "running_var");
    check(num_batches.host()[0] == 5, "num_batches_tracked");
  }
  void check_gradients() {
    const double count = static_cast<double>(p.layout.n_batch * p.layout.spatial);
    check_close(dx, p.dx, kTolerance, 1, "grad_input");
    check_close(dweight, p.dweight, 1e-5, count, "grad_weight");
    check_close(dbias, p.dbias, 1e-5, count, "grad_bias");
  }

 public:
  explicit Run(const Problem& problem) : p(problem) {}

  // reduce, merge, fold, apply; grad_reduce, grad_fold, grad_apply.
  void in_parts() {
    const auto ghosts = static_cast<std::size_t>(p.num_ghosts);
    Array<std::int64_t> count{ghosts}, merged_count{1};
    Array<double> means{stats}, m2{stats}, merged_mean{channels}, merged_m2{channels};
    {
      const Launch launch = two_pass(Pass::kReduce);
      Memory<TripleSets> memory(launch, false);
      StatsOutputs<scalar_t> outputs;
      outputs.count = count.data;
      outputs.mean = means.data;
      outputs.m2 = m2.data;
      outputs.eps = kEps;
      start(
          &reduce_kernel<scalar_t, kRows, kVec, int>,
          ReduceArgs<scalar_t>{launch.tiling, x.data, outputs, memory.workspace}, launch, "reduce");
    }
    const MergeArgs sets{count.data,       means.data,     m2.data,      merged_count.data,
                         merged_mean.data, merged_m2.data, p.num_ghosts, p.layout.n_channel};
    start_threads(&merge_kernel, sets, p.layout.n_channel, "merge");
    check(merged_count.host()[0] == p.layout.n_batch * p.layout.spatial, "the merged count");
    Array<unsigned> blocks_done{1, 0};
    start_threads(
        &fold_kernel<scalar_t>,
        FoldArgs<scalar_t>{sets, saved(), kEps, running(), blocks_done.data}, p.layout.n_channel,
        "fold");
    check_statistics();
    const Launch apply = two_pass(Pass::kApply);
    start(
        &apply_kernel<scalar_t, kRows, kVec, int, kFusion>,
        ApplyArgs<scalar_t>{apply.tiling, forward_elements(), saved(), false, 0, {}}, apply,
        "apply");
    check_close(y, p.y, kTolerance, 1, "output");

    Array<double> sum_dy{stats}, sum_dy_xmu{stats};
    Array<float> coef_x{stats}, coef_0{stats};
    {
      const Launch launch = two_pass(Pass::kReduce);
      Memory<SumSets> memory(launch, false);
      const GradOutputs<scalar_t> outputs{sum_dy.data, sum_dy_xmu.data, nullptr,
                                          nullptr,     dweight.data,    dbias.data};
      start(
          &grad_reduce_kernel<scalar_t, kRows, kVec, int, kFusion>,
          GradReduceArgs<scalar_t>{launch.tiling, backward_elements(), outputs, memory.workspace},
          launch, "grad_reduce");
    }
    start_threads(
        &grad_fold_kernel<scalar_t>,
        GradFoldArgs<scalar_t>{
            count.data,
            sum_dy.data,
            sum_dy_xmu.data,
            mean_lo.data,
            invstd.data,
            {weight.data, 1, true},
            coef_x.data,
            coef_0.data,
            p.num_ghosts,
            p.layout.n_channel},
        p.num_ghosts * p.layout.n_channel, "grad_fold");
    start(
        &grad_apply_kernel<scalar_t, kRows, kVec, int, kFusion>,
        GradApplyArgs<scalar_t>{apply.tiling, backward_elements(), coef_x.data, coef_0.data}, apply,
        "grad_apply");
    check_gradients();
  }

  void on_chip(bool team) {
    {
      const Launch launch = on_chip(1, team);
      Memory<TripleSets> memory(launch, true);
      StatsOutputs<scalar_t> outputs;
      outputs.saved = saved();
      outputs.eps = kEps;
      outputs.running = running();
      start(
          &forward_on_chip_kernel<scalar_t, kRows, kVec, kFusion>,
          ForwardOnChipArgs<scalar_t>{
              launch.tiling,
              {launch.tile_teams, launch.ghost_teams, launch.cache_elements, memory.barriers},
              forward_elements(),
              outputs,
              memory.workspace},
          launch, "forward_on_chip");
    }
    check_statistics();
    check_close(y, p.y, kTolerance, 1, "output");
    {
      const Launch launch = on_chip(2, team);
      Memory<SumSets> memory(launch, true);
      GradOutputs<scalar_t> outputs;
      outputs.grad_weight = dweight.data;
      outputs.grad_bias = dbias.data;
      start(
          &backward_on_chip_kernel<scalar_t, kRows, kVec, kFusion>,
          BackwardOnChipArgs<scalar_t>{
              launch.tiling,
              {launch.tile_teams, launch.ghost_teams, launch.cache_elements, memory.barriers},
              backward_elements(),
              outputs,
              memory.workspace},
          launch, "backward_on_chip");
    }
    check_gradients();
  }
};

template <typename scalar_t, bool kRows>
void run_all() {
  constexpr Order order = kRows ? Order::kRows : Order::kPlanes;
  constexpr std::int64_t n = 4 / sizeof(scalar_t);  // the same bytes for all
  const Layout small = kRows ? Layout{order, 41, 24, 1} : Layout{order, 7, 5, 40};
  const Layout large = kRows ? Layout{order, 1500 * n, 16, 1} : Layout{order, 16 * n, 2, 750};
  const auto lone = Problem::make<scalar_t>(small, /*num_ghosts=*/2);
  Run<scalar_t, kRows>{lone}.in_parts();
  Run<scalar_t, kRows>{lone}.on_chip(/*team=*/false);
  const auto team = Problem::make<scalar_t>(large, /*num_ghosts=*/1);
  Run<scalar_t, kRows>{team}.in_parts();
  Run<scalar_t, kRows>{team}.on_chip(/*team=*/true);
}

struct RoundArgs {
  unsigned low, high;
  unsigned *found, *expected;
};

__global__ void round_kernel(const __grid_constant__ RoundArgs args) {
  const unsigned upper = blockIdx.x * blockDim.x + threadIdx.x;
  const float a = __uint_as_float(upper << 16 | args.low);
  const float b = __uint_as_float(upper << 16 | args.high);
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  args.found[upper] = round_to_bfloat16_pair(a, b);
  std::memcpy(args.expected + upper, static_cast<const void*>(&pair), sizeof(pair));
}

// Every upper half of a float, with lower halves that round it down, up and to even.
void check_rounding() {
  constexpr unsigned kUppers = 1u << 16;
  const unsigned lowers[][2] = {{0, 0x7fff}, {0x8000, 0x8001}, {0xffff, 1}};
  for (const auto& [low, high] : lowers) {
    const Array<unsigned> found(kUppers), expected(kUppers);
    start_threads(&round_kernel, RoundArgs{low, high, found.data, expected.data}, kUppers, "round");
    check(found.host() == expected.host(), "rounding to bfloat16");
  }
}

}  // namespace

int main() {
  check_rounding();
  run_all<float, true>();
  run_all<float, false>();
  run_all<__half, true>();
  run_all<__nv_bfloat16, false>();
  std::puts("ok");
  return 0;
}
