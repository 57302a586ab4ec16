#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <utility>

#include "executor.h"
#include "sanitizers.h"
#include "settings.h"
#include "shadow.h"
#include "shared_memory.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace simt {
namespace {

// In which every thread that could run only looked for a change, and there was none.
constexpr unsigned kIdleRounds = 200;

// Its limit is 8128.
constexpr std::size_t kTsanThreads = 8000;

std::string to_string(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

uint3 unflatten(std::size_t number, const dim3& size) {
  return {
      unsigned(number % size.x), unsigned(number / size.x % size.y),
      unsigned(number / size.x / size.y)};
}

std::vector<std::size_t> order(std::size_t count, Random* random) {
  std::vector<std::size_t> result(count);
  std::iota(result.begin(), result.end(), 0);
  for (std::size_t i = count; random != nullptr && i > 1; --i) {
    std::swap(result[i - 1], result[random->below(i)]);
  }
  return result;
}

}  // namespace

Launch* launch_in_progress = nullptr;

Thread& current_thread() {
  if (launch_in_progress == nullptr) {
    throw Error("a device function was called on the host, outside of a kernel");
  }
  return launch_in_progress->current();
}

std::string to_string(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

std::string to_string(const Thread& thread) {
  return "thread " + to_string(thread.index) + " of block " + to_string(thread.block->index);
}

void Block::push(unsigned thread) {
  std::size_t slot = ready_first + ready_count++;
  ready[slot < ready.size() ? slot : slot - ready.size()] = thread;
}

Thread& Block::pop(Random* random) {
  if (random != nullptr && ready_count > 1) {
    std::size_t slot = ready_first + random->below(ready_count);
    std::swap(ready[ready_first], ready[slot < ready.size() ? slot : slot - ready.size()]);
  }
  Thread& thread = threads[ready[ready_first]];
  if (++ready_first == ready.size()) ready_first = 0;
  --ready_count;
  return thread;
}

Launch::Launch(dim3 grid, dim3 block, std::size_t dynamic_shared, bool cooperative)
    : grid_(grid), block_(block), dynamic_shared_(dynamic_shared), cooperative_(cooperative) {
  launch_in_progress = this;
  shared_memory::open(dynamic_shared);
  main_.adopt_current();
}

Launch::~Launch() {
  blocks_.clear();
  Fiber::destroy_abandoned();
  shared_memory::close();
  launch_in_progress = nullptr;
}

Random* Launch::random() {
  return settings.seed == 0 ? nullptr : &settings.random;
}

bool Launch::draws(unsigned one_in) {
  return settings.seed != 0 && settings.random.below(one_in) == 0;
}

void Launch::run(void (*body)(void*), void* arguments) {
  body_ = body;
  arguments_ = arguments;
  gridDim = grid_;
  blockDim = block_;
  std::size_t grid_size = std::size_t(grid_.x) * grid_.y * grid_.z;
  std::size_t at_once = cooperative_ ? grid_size : 1;
  std::size_t block_size = std::size_t(block_.x) * block_.y * block_.z;
  if (under_tsan() && grid_size * block_size > kTsanThreads) {
    throw Error("a launch of more threads than ThreadSanitizer can tell apart");
  }
  for (std::size_t i = 0; i < at_once; ++i) blocks_.push_back(std::make_unique<Block>());
  if (cooperative_) {
    for (std::size_t i = 0; i < grid_size; ++i) start(*blocks_[i], i, i * block_size);
    running_ = random() == nullptr ? 0 : random()->below(grid_size);
    run_started();
  } else {
    for (std::size_t number : order(grid_size, random())) {
      start(*blocks_[0], number, 0);
      run_started();
      if (!error_.empty()) break;
    }
  }
  token_.acquire();
  settings.blocks += grid_size;
  if (!error_.empty()) throw Error(error_);
}

void Launch::start(Block& block, std::size_t number, std::size_t first_stack) {
  std::size_t size = std::size_t(block_.x) * block_.y * block_.z;
  block.index = unflatten(number, grid_);
  if (block.threads.size() != size) {
    block.threads = std::vector<Thread>(size);
    block.ready.resize(size);
    block.polling.reserve(size);
  }
  block.ready_first = block.ready_count = 0;
  block.at_barrier = block.exited = block.barriers = 0;
  for (Token& token : block.barrier_tokens) token.reset();
  block.warps.clear();
  block.warps.resize((size + 31) / 32);
  for (std::size_t i = 0; i < size; ++i) {
    Thread& thread = block.threads[i];
    thread.fiber.abandon();
    thread.fiber.prepare(first_stack + i, thread_main);
    thread.block = &block;
    thread.index = unflatten(i, block_);
    thread.number = unsigned(i);
    thread.state = Thread::State::kReady;
    thread.unchanged_atomics = 0;
    thread.fence_token.reset();
    thread.fenced = thread.stored_since_fence = false;
    thread.atomics_since_fence.clear();
    block.warps[i / 32].lanes |= 1u << i % 32;
    block.push(unsigned(i));
  }
  alive_ += size;
  shared_memory::clear();
  if (cooperative_) shared_memory::save(block.shared);
}

void Launch::run_started() {
  Block& block = *blocks_[running_];
  if (cooperative_) shared_memory::restore(block.shared);
  Thread& first = block.pop(random());
  current_ = &first;
  threadIdx = first.index;
  blockIdx = block.index;
  main_.switch_to(first.fiber, false);
}

void Launch::thread_main() {
  Launch& launch = *launch_in_progress;
  launch.current_->fiber.entered();
  try {
    launch.body_(launch.arguments_);
  } catch (const std::exception& error) {
    Unseen unseen;
    launch.fail(to_string(*launch.current_) + " threw: " + error.what());
  } catch (...) {
    Unseen unseen;
    launch.fail(to_string(*launch.current_) + " threw an exception");
  }
  launch.exit_current();
}

void Launch::note_exit() {
  Unseen unseen;
  Thread& thread = *current_;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.number / 32];
  if (block.at_barrier != 0) {
    const Thread& other = *block.first_at_barrier;
    fail(
        to_string(thread) + " exited, but " + to_string(other) + " waits in __syncthreads at " +
        to_string(other.site));
  }
  for (const WarpGroup& group : warp.groups) {
    if ((group.mask >> thread.lane() & 1u) == 0) continue;
    fail(
        to_string(thread) + " exited, but is named in the mask of a warp operation at " +
        to_string(group.site));
  }
  thread.state = Thread::State::kExited;
  warp.exited |= 1u << thread.lane();
  if (++block.exited == block.threads.size() && shared_memory::overrun()) {
    fail(
        "block " + to_string(block.index) + " wrote behind its " + std::to_string(dynamic_shared_) +
        " bytes of dynamic shared memory");
  }
  --alive_;
  ++progress_;
}

void Launch::exit_current() {
  note_exit();
  token_.release();
  switch_to(next(), true);
  __builtin_unreachable();
}

void Launch::make_ready(Thread& thread) {
  thread.state = Thread::State::kReady;
  thread.block->push(thread.number);
}

void Launch::yield() {
  make_ready(*current_);
  switch_to(next(), false);
}

void Launch::suspend() {
  switch_to(next(), false);
}

void Launch::poll(const Site& site) {
  current_->state = Thread::State::kPolling;
  current_->site = site;
  current_->block->polling.push_back(current_->number);  // which has room
  switch_to(next(), false);
}

Block* Launch::another_ready_block() {
  std::size_t count = blocks_.size();
  std::size_t skip = random() == nullptr ? 0 : random()->below(count);
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t index = (running_ + 1 + skip + i) % count;
    if (blocks_[index]->ready_count != 0) {
      running_ = index;
      return blocks_[index].get();
    }
  }
  return nullptr;
}

bool Launch::wake_polling() {
  idle_rounds_ = progress_ == progress_at_wake_ ? idle_rounds_ + 1 : 0;
  progress_at_wake_ = progress_;
  if (idle_rounds_ > kIdleRounds) return false;
  bool any = false;
  for (auto& block : blocks_) {
    for (unsigned number : block->polling) make_ready(block->threads[number]);
    any = any || !block->polling.empty();
    block->polling.clear();
  }
  return any;
}

Thread* Launch::next() {
  for (;;) {
    Block* block = blocks_[running_].get();
    if (cooperative_ && draws(64)) block = another_ready_block();
    if (block == nullptr || block->ready_count == 0) block = another_ready_block();
    if (block != nullptr) return &block->pop(random());
    if (alive_ == 0) return nullptr;
    if (wake_polling()) continue;
    Unseen unseen;
    error_ = "deadlock: " + describe_waiting();
    return nullptr;
  }
}

void Launch::switch_to(Thread* thread, bool last) {
  Thread& from = *current_;
  if (thread == &from) return;
  if (thread == nullptr) {
    from.fiber.switch_to(main_, last);
    __builtin_unreachable();
  }
  ++settings.switches;
  if (thread->block != from.block) {
    shared_memory::save(from.block->shared);
    shared_memory::restore(thread->block->shared);
    blockIdx = thread->block->index;
  }
  current_ = thread;
  threadIdx = thread->index;
  from.fiber.switch_to(thread->fiber, last);
}

void Launch::fail(const std::string& message) {
  error_ = message;
  if (under_tsan()) __tsan_ignore_thread_end();  // the caller's Unseen
  switch_to(nullptr, true);
  __builtin_unreachable();
}

std::string Launch::describe_waiting() const {
  std::map<std::string, std::size_t> counts;
  for (const auto& block : blocks_) {
    for (const Thread& thread : block->threads) {
      const char* what = thread.state == Thread::State::kBarrier   ? "in __syncthreads at "
                         : thread.state == Thread::State::kWarp    ? "in a warp operation at "
                         : thread.state == Thread::State::kPolling ? "for a change of memory at "
                                                                   : nullptr;
      if (what != nullptr) ++counts[what + to_string(thread.site)];
    }
  }
  std::string result;
  for (const auto& [what, count] : counts) {
    result += (result.empty() ? "" : "; ") + std::to_string(count) + " threads wait " + what;
  }
  return result;
}

}  // namespace simt
