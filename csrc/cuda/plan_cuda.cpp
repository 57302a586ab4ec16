// A plan in words, for reports and tests.
#include <sstream>

#include "../checks.h"
#include "../ops/backend.h"
#include "tensors_cuda.h"

namespace bnext {
namespace cuda {
namespace {

void describe(std::ostream& text, const char* name, const Launch& launch) {
  text << name << ' ' << launch.blocks << '/' << launch.threads_x << 'x' << launch.threads_y;
  if (launch.tiling.splits() > 1) {
    text << "/s" << launch.tiling.splits();
  }
  if (launch.cooperative) {
    text << "/r"
         << ceil_div(launch.tiling.tiles, launch.tile_teams) *
                ceil_div(launch.tiling.num_ghosts, launch.ghost_teams);
  }
  if (!launch.vector) {
    text << " scalar";
  }
  if (launch.wide_index) {
    text << " wide";
  }
}

}  // namespace
}  // namespace cuda

std::string cuda_plan(
    const at::Tensor& input, std::optional<std::int64_t> ghost_batch_size, std::int64_t tensors) {
  using namespace cuda;
  ReduceCall call{
      input,
      ghost_batch_size.has_value() ? std::optional<c10::SymInt>(*ghost_batch_size) : std::nullopt};
  check(call);
  TORCH_CHECK(input.numel() > 0, "input must not be empty");
  TORCH_CHECK(tensors >= 1 && tensors <= 3, "tensors must be 1, 2 or 3, got ", tensors);
  const std::int64_t num_ghosts = call.num_ghosts.expect_int();
  const DeviceScope scope(input);
  const DeviceProperties device = scope.properties();
  const DenseFormat format = dense_format(input);
  const Layout layout = layout_of(input, format);
  const at::Tensor dense = to_dense(input, format);
  const Operands reads = operands(layout, num_ghosts, {dense});
  // What is written is a fresh tensor.
  const Operands all = operands(layout, num_ghosts, {dense, dense.new_empty({1})});
  const Launch on_chip =
      on_chip_launch(all, static_cast<int>(tensors), device, detail::resident_blocks(device));
  std::ostringstream text;
  const Launch reduce = two_pass_launch(reads, Pass::kReduce, device);
  text << (reduce.rows ? "rows: " : "planes: ");
  if (on_chip.blocks != 0) {
    describe(text, on_chip.cooperative ? "team" : "lone", on_chip);
  } else {
    describe(text, "two-pass", reduce);
    describe(text, " +", two_pass_launch(all, Pass::kApply, device));
  }
  return text.str();
}

}  // namespace bnext
