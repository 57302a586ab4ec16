// Barriers and warp operations.
#include <algorithm>
#include <bit>
#include <cstring>

#include "scheduler.h"
#include "settings.h"
#include "shadow.h"

namespace simt {
namespace {

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

const char* name(WarpOp op) {
  switch (op) {
    case WarpOp::kSync:
      return "__syncwarp";
    case WarpOp::kShuffle:
      return "shuffle";
    default:
      return "vote";
  }
}

std::string hex(unsigned mask) {
  std::string result = "0x";
  for (int shift = 28; shift >= 0; shift -= 4) result += "0123456789abcdef"[mask >> shift & 15u];
  return result;
}

std::string here(const char* what, const Site& site, const Thread& thread) {
  return std::string(what) + " at " + to_string(site) + " by " + to_string(thread) + ": ";
}

Thread& lane_of(Thread& thread, unsigned lane) {
  return thread.block->threads[thread.number / 32 * 32 + lane];
}

Thread& first_lane(Thread& thread, unsigned mask) {
  return lane_of(thread, unsigned(std::countr_zero(mask)));
}

[[noreturn]] void fail_mask(
    Thread& thread, const char* what, unsigned mask, const Site& site, const std::string& wrong) {
  launch_in_progress->fail(here(what, site, thread) + "the mask " + hex(mask) + wrong);
}

void check_mask(
    Thread& thread, const Warp& warp, const char* what, unsigned mask, const Site& site) {
  if ((mask >> thread.lane() & 1u) == 0) {
    std::string lane = std::to_string(thread.lane());
    fail_mask(thread, what, mask, site, " does not name its own lane, " + lane);
  }
  if ((mask & (~warp.lanes | warp.exited | warp.at_barrier)) == 0) return;
  if (unsigned missing = mask & ~warp.lanes) {
    std::string lane = std::to_string(std::countr_zero(missing));
    fail_mask(thread, what, mask, site, " names lane " + lane + ", which the block lacks");
  }
  if (unsigned exited = mask & warp.exited) {
    std::string other = to_string(first_lane(thread, exited));
    fail_mask(thread, what, mask, site, " names " + other + ", which has exited");
  }
  const Thread& other = first_lane(thread, mask & warp.at_barrier);
  fail_mask(
      thread, what, mask, site,
      " names " + to_string(other) + ", which waits in __syncthreads at " + to_string(other.site));
}

// The group to join. Others may be under way, unless they wait for this lane and it for them.
WarpGroup& group_of(Thread& thread, Warp& warp, WarpOp op, unsigned mask, const Site& site) {
  for (WarpGroup& group : warp.groups) {
    if (group.op == op && group.mask == mask && same(group.site, site)) return group;
    if ((group.mask >> thread.lane() & 1u) == 0) continue;
    unsigned both = group.arrived & mask;
    if (both == 0) continue;
    launch_in_progress->fail(
        here(name(op), site, thread) + "mask " + hex(mask) + ", but " +
        to_string(first_lane(thread, both)) + " waits for it in a " + name(group.op) + " at " +
        to_string(group.site) + " with mask " + hex(group.mask));
  }
  warp.groups.push_back({op, mask, 0, site});
  return warp.groups.back();
}

// All have arrived. Results are read now: a lane's value may be its next operation's by the time
// another lane runs.
void complete(Thread& thread, Warp& warp, WarpGroup& completed) {
  WarpGroup group = completed;
  unsigned votes = 0;
  for (unsigned rest = group.mask; rest != 0 && group.op == WarpOp::kVote; rest &= rest - 1) {
    unsigned lane = unsigned(std::countr_zero(rest));
    votes |= unsigned(lane_of(thread, lane).value != 0) << lane;
  }
  completed = warp.groups.back();
  warp.groups.pop_back();
  for (unsigned rest = group.mask; rest != 0; rest &= rest - 1) {
    Thread& other = lane_of(thread, unsigned(std::countr_zero(rest)));
    if (group.op == WarpOp::kShuffle) {
      if ((group.mask >> other.source & 1u) == 0) {
        launch_in_progress->fail(
            here("shuffle", group.site, other) + "reads lane " + std::to_string(other.source) +
            ", which is not in the mask " + hex(group.mask));
      }
      other.result = lane_of(thread, other.source).value;
    } else {
      other.result = votes;
    }
    launch_in_progress->make_ready(other);
  }
  launch_in_progress->note_progress();
}

// To release before the wait and acquire after it, for ThreadSanitizer.
Token* arrive_at_barrier(Thread& thread, const Site& site) {
  Unseen unseen;
  Launch& launch = *launch_in_progress;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.number / 32];
  if (block.exited != 0) {
    auto exited = [](const Thread& t) { return t.state == Thread::State::kExited; };
    const Thread& other = *std::find_if(block.threads.begin(), block.threads.end(), exited);
    launch.fail(here("__syncthreads", site, thread) + to_string(other) + " has exited");
  }
  for (const WarpGroup& group : warp.groups) {
    if ((group.mask >> thread.lane() & 1u) == 0) continue;
    launch.fail(
        here("__syncthreads", site, thread) + to_string(first_lane(thread, group.arrived)) +
        " waits for it in a " + name(group.op) + " at " + to_string(group.site));
  }
  if (block.at_barrier == 0) {
    block.first_at_barrier = &thread;
  } else if (const Thread& other = *block.first_at_barrier; !same(other.site, site)) {
    launch.fail(
        here("__syncthreads", site, thread) + to_string(other) +
        " waits in another __syncthreads at " + to_string(other.site));
  }
  thread.state = Thread::State::kBarrier;
  thread.site = site;
  thread.unchanged_atomics = 0;
  warp.at_barrier |= 1u << thread.lane();
  Token* token = &block.barrier_tokens[block.barriers % 2];
  if (++block.at_barrier == block.threads.size()) {
    block.at_barrier = 0;
    ++block.barriers;
    for (Warp& each : block.warps) each.at_barrier = 0;
    for (Thread& each : block.threads) launch.make_ready(each);
    launch.note_progress();
  }
  return token;
}

Token* arrive_at_warp_op(
    Thread& thread,
    WarpOp op,
    unsigned mask,
    std::uint64_t value,
    unsigned source,
    const Site& site) {
  Unseen unseen;
  Warp& warp = thread.block->warps[thread.number / 32];
  check_mask(thread, warp, name(op), mask, site);
  WarpGroup& group = group_of(thread, warp, op, mask, site);
  thread.state = Thread::State::kWarp;
  thread.site = site;
  thread.value = value;
  thread.source = source;
  thread.unchanged_atomics = 0;
  group.arrived |= 1u << thread.lane();
  if (group.arrived == mask) complete(thread, warp, group);
  if (!under_tsan() || (op != WarpOp::kSync && !settings.shuffles_order_memory)) return nullptr;
  // A token of the mask's own: one of the warp would order lanes that do not take part.
  auto& token = warp.tokens[mask];
  if (token == nullptr) token = std::make_unique<Token>();
  return token.get();
}

void wait_with(Token* token) {
  if (token != nullptr) token->release();
  launch_in_progress->suspend();
  if (token != nullptr) token->acquire();
}

}  // namespace

void barrier(const Site& site) {
  wait_with(arrive_at_barrier(current_thread(), site));
}

std::uint64_t warp_op(
    WarpOp op, unsigned mask, std::uint64_t value, unsigned source, const Site& site) {
  Thread& thread = current_thread();
  wait_with(arrive_at_warp_op(thread, op, mask, value, source, site));
  return thread.result;
}

unsigned active_mask() {
  Thread& thread = current_thread();
  const Warp& warp = thread.block->warps[thread.number / 32];
  return warp.lanes & ~warp.exited;
}

unsigned lane() {
  return current_thread().lane();
}

void fail_bad_width(int width, const Site& site) {
  Unseen unseen;
  launch_in_progress->fail(
      here("shuffle", site, current_thread()) + "the width " + std::to_string(width) +
      " is not a power of two up to 32");
}

}  // namespace simt
