// Cases of csrc/cuda/launch_config.h: which launches are chosen, and how full they keep a device.
#include "launch_model.h"

namespace core_cases {
namespace {

// A device is full where every multiprocessor has a block. (ghost, tile)s that are too few are cut,
// in two passes into no less than kLeastPiece, or an eighth where multiprocessors would have no
// block.
constexpr int64_t kLeastPiece = 48 * kKiB;

void blocks_fill_the_device() {
  for_launches(
      all_shapes(),
      [](const Launch& l, const Operands& of, const DeviceProperties& device, int tensors) {
    const int64_t numel = of.layout.numel();
    const int64_t least = kLeastPiece / of.element_bytes;
    // Twice for lines that do not divide evenly, and twice for tiles that are not full.
    if (numel >= 4 * least * device.num_sms) {
      check(l.blocks >= device.num_sms, "a block for each multiprocessor");
    }
    const Tiling& t = l.tiling;
    const int64_t most_lines = t.lines[t.ghosts.longer > 0 ? 1 : 0].piece(0).size();
    check(l.rows || t.lines_inner || l.threads_y <= most_lines, "a line for each row of threads");
    const int64_t pairs = of.num_ghosts * t.tiles;
    const int64_t resident = bnext::cuda::detail::resident_blocks(device);
    if (tensors == 0) {
      // Beyond one wave, what divides into many pieces leaves at most a third of the places empty.
      // (A single wave may have fewer blocks than places, where smaller pieces would be too small.)
      const int64_t waves = bnext::ceil_div(l.blocks, resident);
      if (waves > 1 && numel / pairs >= 16 * least &&
          t.ghosts.size * t.lines_per_sample >= 4 * kThreads) {
        check(3 * l.blocks >= 2 * waves * resident, "even waves");
      }
      check(l.blocks <= std::max(pairs * 4, 4 * resident + 3 * pairs), "few blocks");
      check(l.tiling.splits() == 1 || numel / l.blocks >= least / 16, "no small piece");
    }
  });
}

void teams_share_all_work() {
  for_launches(
      all_shapes(),
      [](const Launch& l, const Operands& of, const DeviceProperties& device, int tensors) {
    if (tensors == 0) {
      return;
    }
    const Tiling& t = l.tiling;
    check_equal(int64_t(l.num_teams()) * t.splits(), l.blocks, "blocks of all teams");
    check(l.tile_teams >= 1 && l.tile_teams <= t.tiles, "a tile for every team");
    check(l.ghost_teams >= 1 && l.ghost_teams <= of.num_ghosts, "a ghost for every team");
    if (!l.cooperative) {
      const int64_t pairs = of.num_ghosts * t.tiles;
      const int64_t resident = bnext::cuda::detail::resident_blocks(device);
      check(l.blocks >= std::min(pairs, 4 * resident), "four waves of lone blocks");
    }
    // The barriers count the arrivals of all rounds.
    const int64_t rounds =
        bnext::ceil_div(t.tiles, l.tile_teams) * bnext::ceil_div(of.num_ghosts, l.ghost_teams);
    check((rounds + 1) * t.splits() <= UINT32_MAX, "a barrier's count");
    check(t.splits() == 1 || l.tile_teams == t.tiles || l.ghost_teams == 1, "teams by tiles first");
  });
}

// A launch on chip that works as `lone` blocks, as a team, or does not.
enum class Way { kLone, kTeams, kTwoPass };

Way way_of(const Launch& launch) {
  return launch.blocks == 0 ? Way::kTwoPass : launch.cooperative ? Way::kTeams : Way::kLone;
}

void launches_on_chip() {
  struct Row {
    Order order;
    Shape shape;
    int64_t ghosts;
    int bytes;
    int tensors;
    std::vector<Device> on;
    Way way;
  };
  const std::vector<Row> rows{
      // Ghost statistics of 32 samples, forward and backward.
      {Order::kRows, {4096, 256, 1}, 128, 4, 1, devices(), Way::kLone},
      {Order::kRows, {4096, 256, 1}, 128, 4, 2, devices(), Way::kLone},
      {Order::kRows, {4096, 256, 1}, 128, 2, 3, devices(), Way::kLone},
      {Order::kRows, {4096, 256, 1}, 2048, 4, 1, devices(), Way::kLone},
      // ResNet-50: a channel of 392 KiB, and one of 6 KiB.
      {Order::kPlanes, {32, 64, 3136}, 1, 4, 1, {kA100, kH100, kB200}, Way::kTeams},
      {Order::kRows, {32, 64, 3136}, 1, 4, 1, {kH100, kB200}, Way::kTeams},
      // 98 MiB, of which four stretches of 64 bytes a row fit one after the other.
      {Order::kRows, {32, 64, 12544}, 1, 4, 1, {kH100, kB200}, Way::kTeams},
      {Order::kRows, {32, 256, 3136}, 1, 2, 2, {kH100, kB200}, Way::kTeams},
      {Order::kPlanes, {32, 512, 49}, 1, 4, 1, devices(), Way::kLone},
      {Order::kPlanes, {32, 2048, 49}, 1, 2, 2, devices(), Way::kLone},
      // A few values: no block waits for another.
      {Order::kPlanes, {2, 3, 5}, 1, 4, 3, devices(), Way::kLone},
      {Order::kRows, {8, 10, 1}, 1, 2, 1, devices(), Way::kLone},
      // One channel of 8 GiB, one ghost of 1 GiB; more than 2^31 elements in small ghosts.
      {Order::kPlanes, {1 << 21, 1, 1024}, 1, 4, 1, devices(), Way::kTwoPass},
      {Order::kRows, {1 << 20, 256, 4}, 4, 4, 1, devices(), Way::kTwoPass},
      {Order::kRows, {70000, 100000, 1}, 2187, 2, 1, devices(), Way::kLone},
  };
  for (const Row& row : rows) {
    const auto [n, c, s] = row.shape;
    const Operands of = operands(row.order, n, c, s, row.ghosts, row.bytes);
    for (const Device& device : row.on) {
      const Launch launch = on_chip(of, row.tensors, device.properties);
      check(
          way_of(launch) == row.way, "another way than " +
                                         std::to_string(static_cast<int>(way_of(launch))) +
                                         " for " + describe(of) + " on " + device.name);
    }
  }
}

// Teams leave few blocks' places empty and few rounds half done: else two passes are faster.
void teams_are_even() {
  for_launches(
      large_shapes(),
      [](const Launch& l, const Operands& of, const DeviceProperties& device, int tensors) {
    if (!l.cooperative) {
      return;
    }
    const int64_t resident = bnext::cuda::detail::resident_blocks(device);
    const int64_t rounds = bnext::ceil_div(l.tiling.tiles, l.tile_teams) *
                           bnext::ceil_div(of.num_ghosts, l.ghost_teams);
    const int64_t piece = int64_t(l.cache_elements) * tensors * of.element_bytes;
    const int64_t all = of.layout.numel() * tensors * of.element_bytes;
    // A large tensor: two passes take (2 t + 1) / (t + 1) as long as on chip without any loss.
    if (all / resident >= 512 * kKiB) {
      check(rounds * piece * (tensors + 1) <= all / resident * (2 * tensors + 1) + 1, "few losses");
    }
  });
}

// A kernel's blocks may not all be resident that the configuration assumes.
void fewer_resident_blocks() {
  for_operands(all_shapes(), [](const Operands& of) {
    for (int64_t resident : {0, 1, 40, 132}) {
      const Launch launch = on_chip_launch(of, 1, kH100.properties, resident);
      check(!launch.cooperative || launch.blocks <= resident, "all blocks resident");
    }
  });
}

}  // namespace

std::vector<Case> launch_choice_cases() {
  return {
      {"blocks_fill_the_device", blocks_fill_the_device},
      {"teams_share_all_work", teams_share_all_work},
      {"launches_on_chip", launches_on_chip},
      {"teams_are_even", teams_are_even},
      {"fewer_resident_blocks", fewer_resident_blocks},
  };
}

}  // namespace core_cases
