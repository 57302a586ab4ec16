// The state of a launch. One OS thread runs it; its CUDA threads take turns, and each says at its
// end or wherever it has to wait which goes next.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "random.h"
#include "shadow.h"

#pragma GCC visibility push(hidden)

namespace simt {

struct Block;

struct Thread {
  enum class State : unsigned char { kReady, kBarrier, kWarp, kPolling, kExited };

  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  unsigned number = 0;  // in its block
  State state = State::kReady;
  unsigned char unchanged_atomics = 0;  // in a row
  Site site;                            // of what it waits for

  // A warp operation's operands and result.
  std::uint64_t value = 0;
  std::uint64_t result = 0;
  unsigned source = 0;

  // Fences, for ThreadSanitizer.
  bool fenced = false;
  bool stored_since_fence = false;
  Token fence_token;
  std::vector<const volatile void*> atomics_since_fence;

  unsigned lane() const { return number % 32; }
};

// Lanes of a warp that meet in one operation.
struct WarpGroup {
  WarpOp op;
  unsigned mask;
  unsigned arrived;
  Site site;
};

struct Warp {
  unsigned lanes = 0;  // that exist
  unsigned exited = 0;
  unsigned at_barrier = 0;
  std::vector<WarpGroup> groups;
  std::map<unsigned, std::unique_ptr<Token>> tokens;  // by mask, for ThreadSanitizer
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> ready;  // a ring in order, a bag with a seed
  std::size_t ready_first = 0;
  std::size_t ready_count = 0;
  std::vector<unsigned> polling;
  unsigned at_barrier = 0;
  Thread* first_at_barrier = nullptr;
  unsigned exited = 0;
  unsigned barriers = 0;  // passed
  Token barrier_tokens[2];
  std::vector<unsigned char> shared;  // while another block runs

  void push(unsigned thread);
  Thread& pop(Random* random);
};

class Launch {
 public:
  Launch(dim3 grid, dim3 block, std::size_t dynamic_shared, bool cooperative);
  ~Launch();

  // Throws Error.
  void run(void (*body)(void*), void* arguments);

  Thread& current() { return *current_; }
  const Fiber& launcher() const { return main_; }
  // The current thread goes on later, as others may now.
  void yield();
  // The current thread goes on once it has been made ready, which it may be by now.
  void suspend();
  // The current thread looks again later for what another thread is to write.
  void poll(const Site& site);
  void make_ready(Thread& thread);
  void note_progress() { ++progress_; }
  // null: in order.
  Random* random();
  bool draws(unsigned one_in);

  // Ends the launch; the current thread is not resumed. To be called while one Unseen lives.
  [[noreturn]] void fail(const std::string& message);

 private:
  static void thread_main();
  void start(Block& block, std::size_t number, std::size_t first_stack);
  void run_started();
  void note_exit();
  void exit_current();
  Block* another_ready_block();
  bool wake_polling();
  // The thread to run next; null at the end of the launch.
  Thread* next();
  void switch_to(Thread* thread, bool last);
  std::string describe_waiting() const;

  dim3 grid_;
  dim3 block_;
  std::size_t dynamic_shared_;
  bool cooperative_;
  void (*body_)(void*) = nullptr;
  void* arguments_ = nullptr;
  std::vector<std::unique_ptr<Block>> blocks_;  // that run at once
  std::size_t running_ = 0;                     // index of the current block
  Fiber main_;
  Thread* current_ = nullptr;
  std::size_t alive_ = 0;
  unsigned long long progress_ = 0;
  unsigned long long progress_at_wake_ = 0;
  unsigned idle_rounds_ = 0;
  std::string error_;
  Token token_;
};

// null outside of a launch.
extern Launch* launch_in_progress;
Thread& current_thread();

std::string to_string(const Site& site);
std::string to_string(const Thread& thread);

}  // namespace simt

#pragma GCC visibility pop
