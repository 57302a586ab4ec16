// Each primitive gives what CUDA's guide says, in whatever order the threads run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <thread>

#include "kernels.h"

namespace executor_cases {
namespace {

__global__ void indices(uint3* blocks, uint3* threads) {
  unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  unsigned size = blockDim.x * blockDim.y * blockDim.z;
  unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  blocks[block * size + thread] = blockIdx;
  threads[block * size + thread] = threadIdx;
}

void builtin_variables() {
  std::vector<uint3> blocks(24 * 30), threads(24 * 30);
  check(launch({{2, 3, 4}, {5, 3, 2}}, indices, blocks.data(), threads.data()) == 0, "launch");
  for (unsigned i = 0; i < blocks.size(); ++i) {
    unsigned block = i / 30, thread = i % 30;
    check(blocks[i].x == block % 2 && blocks[i].y == block / 2 % 3, "blockIdx");
    check(blocks[i].z == block / 6, "blockIdx.z");
    check(threads[i].x == thread % 5 && threads[i].y == thread / 5 % 3, "threadIdx");
    check(threads[i].z == thread / 15, "threadIdx.z");
  }
}

template <typename T>
__global__ void shuffles(T* out, int width) {
  unsigned lane = threadIdx.x % 32, all = 0xffffffffu;
  T mine = T(100 + lane);
  T* row = out + threadIdx.x * 4;
  row[0] = __shfl_sync(all, mine, 5, width);
  row[1] = __shfl_xor_sync(all, mine, 3, width);
  row[2] = __shfl_down_sync(all, mine, 3u, width);
  row[3] = __shfl_up_sync(all, mine, 3u, width);
}

template <typename T>
void check_shuffles() {
  for (int width : {32, 16, 8, 4}) {
    std::vector<T> out(64 * 4);
    check(launch({1, 64}, shuffles<T>, out.data(), width) == 0, "launch");
    for (int i = 0; i < 64; ++i) {
      int lane = i % 32, first = lane / width * width, end = first + width;
      const T* row = &out[std::size_t(i) * 4];
      check_equal(row[0], T(100 + first + 5 % width), "__shfl_sync");
      check_equal(row[1], T(100 + (lane ^ 3)), "__shfl_xor_sync");
      check_equal(row[2], T(100 + (lane + 3 < end ? lane + 3 : lane)), "__shfl_down_sync");
      check_equal(row[3], T(100 + (lane - 3 >= first ? lane - 3 : lane)), "__shfl_up_sync");
    }
  }
}

void all_shuffles() {
  for_seeds([] {
    check_shuffles<int>();
    check_shuffles<unsigned>();
    check_shuffles<long long>();
    check_shuffles<unsigned long long>();
    check_shuffles<float>();
    check_shuffles<double>();
  });
}

__global__ void votes(unsigned* out) {
  unsigned lane = threadIdx.x;
  unsigned mask = lane < 8 ? 0xffu : 0xffffff00u;  // the halves vote at different times
  if (lane < 8) __syncwarp(mask);
  out[lane * 4] = __ballot_sync(mask, lane % 2);
  out[lane * 4 + 1] = unsigned(__any_sync(mask, lane == 9));
  out[lane * 4 + 2] = unsigned(__all_sync(mask, lane >= 8));
  out[lane * 4 + 3] = __activemask();
  __syncwarp();
}

void all_votes() {
  for_seeds([] {
    std::vector<unsigned> out(32 * 4);
    check(launch({1, 32}, votes, out.data()) == 0, "launch");
    for (unsigned lane = 0; lane < 32; ++lane) {
      unsigned mask = lane < 8 ? 0xffu : 0xffffff00u;
      check_equal(out[lane * 4], 0xaaaaaaaau & mask, "__ballot_sync");
      check_equal(out[lane * 4 + 1], unsigned(lane >= 8), "__any_sync");
      check_equal(out[lane * 4 + 2], unsigned(lane >= 8), "__all_sync");
      check_equal(out[lane * 4 + 3], 0xffffffffu, "__activemask");
    }
  });
}

template <typename T>
__global__ void atomics(T* out, unsigned* tickets) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(out, i);
  atomicSub(out + 1, i);
  atomicMax(out + 2, i);
  atomicMin(out + 3, i);
  atomicOr(out + 4, 1u << i % 8);
  atomicAnd(out + 5, ~(1u << i % 8));
  T seen = atomicCAS(out + 6, 0, i + 1);
  if (seen == 0) atomicExch(out + 7, 77);
  tickets[i] = atomicAdd(tickets + 128, 1u);
}

template <typename T>
void check_atomics() {
  std::vector<T> out{0, 0, 0, 1000, 0, T(0x1ff), 0, 0};
  std::vector<unsigned> tickets(129);
  check(launch({4, 32}, atomics<T>, out.data(), tickets.data()) == 0, "launch");
  const T sum = 127 * 128 / 2;
  check(out[0] == sum && out[1] == T(T(0) - sum), "atomicAdd, atomicSub");
  check(out[2] == 127 && out[3] == 0, "atomicMax, atomicMin");
  check(out[4] == 0xff && out[5] == 0x100, "atomicOr, atomicAnd");
  check(out[6] > 0 && out[6] <= 128 && out[7] == 77, "atomicCAS, atomicExch");
  std::sort(tickets.begin(), tickets.end());
  for (unsigned i = 0; i < 128; ++i) check_equal(tickets[i], i, "ticket");
}

template <typename T>
concept Adds = requires(T* p) { atomicAdd(p, T(1)); };
static_assert(Adds<int> && Adds<unsigned> && Adds<unsigned long long>);
static_assert(!Adds<float> && !Adds<double> && !Adds<__half> && !Adds<short>);

void all_atomics() {
  for_seeds([] {
    check_atomics<int>();
    check_atomics<unsigned>();
    check_atomics<unsigned long long>();
  });
}

// A thread reads what its neighbour wrote before the barrier, and overwrites it after the next.
__global__ void rotate(int* out, int rounds) {
  int* ring = reinterpret_cast<int*>(bnext_shared);
  unsigned i = threadIdx.x;
  ring[i] = int(i);
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    int next = ring[(i + 1) % blockDim.x];
    __syncthreads();
    ring[i] = next;
  }
  out[blockIdx.x * blockDim.x + i] = ring[i];
}

void barriers() {
  for_seeds([] {
    std::vector<int> out(3 * 100);
    check(launch({3, 100, 400}, rotate, out.data(), 7) == 0, "launch");
    for (int i = 0; i < 300; ++i) check_equal(out[std::size_t(i)], (i + 7) % 100, "rotated");
  });
}

__global__ void first_seen(unsigned* fresh) {
  __shared__ unsigned fixed[64];
  unsigned* dynamic = reinterpret_cast<unsigned*>(bnext_shared);
  if (fixed[threadIdx.x] == ~0u && dynamic[threadIdx.x] == ~0u) atomicAdd(fresh, 1u);
  fixed[threadIdx.x] = dynamic[threadIdx.x] = threadIdx.x;
}

void shared_memory_starts_as_nan() {
  for (bool cooperative : {false, true}) {
    unsigned fresh = 0;
    check(launch({3, 64, 256, cooperative}, first_seen, &fresh) == 0, "launch");
    check_equal(fresh, 3u * 64, "threads that found 0xff");
  }
}

void last_block_reduction() {
  for_seeds([] {
    std::vector<float> input(1000, 1.0f), partial(8);
    unsigned count = 0;
    float output = 0;
    for (int run = 0; run < 2; ++run) {
      check(
          launch(
              {8, 64, 256}, last_block<kClean>, input.data(), partial.data(), &count, &output,
              1000) == 0,
          "launch");
      check_equal(output, 1000.0f, "sum");
      check_equal(count, 0u, "count");
    }
  });
}

void cooperative_grid_barrier() {
  for_seeds([] {
    std::vector<int> a(8 * 48), b(8 * 48);
    unsigned count = 0;
    check(
        launch({8, 48, 4 * 48, true}, pass_on<kClean>, a.data(), b.data(), &count) == 0, "launch");
    for (int i = 0; i < 8 * 48; ++i) {
      int expected = (i + 2 * 49) % (8 * 48) - i;
      check_equal(a[std::size_t(i)], expected, "passed on");
    }
  });
}

__global__ void take_tickets(unsigned* tickets, unsigned* next) {
  tickets[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1u);
}

// Seeds give different orders, and a seed always the same.
void seeds_give_orders() {
  auto order = [](unsigned seed) {
    simt::set_seed(seed);
    std::vector<unsigned> tickets(128);
    unsigned next = 0;
    launch({4, 32}, take_tickets, tickets.data(), &next);
    return tickets;
  };
  std::vector<unsigned> in_order(128);
  std::iota(in_order.begin(), in_order.end(), 0u);
  check(order(0) == in_order, "seed 0 is in order");
  std::set<std::vector<unsigned>> orders;
  for (unsigned seed = 0; seed < 5; ++seed) orders.insert(order(seed));
  check_equal(orders.size(), std::size_t(5), "number of orders");
  check(order(3) == order(3), "a seed gives one order");
  simt::set_seed(0);
}

template <typename T>
__global__ void copy(const T* from, T* to) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  __stcs(to + i, __ldg(from + i));
  __stcg(to + i, __ldcs(from + i));
  __stwb(to + i, __ldcg(from + i));
  __stwt(to + i, __ldca(from + i));
}

template <typename T>
void check_copy() {
  std::vector<T> from(64), to(64);
  auto* bytes = reinterpret_cast<unsigned char*>(from.data());
  for (std::size_t i = 0; i < 64 * sizeof(T); ++i) bytes[i] = static_cast<unsigned char>(i * 37);
  for (bool registered : {false, true}) {
    if (registered) simt::register_memory(from.data(), 64 * sizeof(T));
    if (registered) simt::register_memory(to.data(), 64 * sizeof(T));
    simt::reset_counters();
    check(launch({2, 32}, copy<T>, from.data(), to.data()) == 0, "launch");
    simt::Counters found = simt::counters();
    simt::clear_memory();
    check(
        std::equal(bytes, bytes + 64 * sizeof(T), reinterpret_cast<unsigned char*>(to.data())),
        "copy");
    check_equal(found.bytes_loaded, 4ull * 64 * sizeof(T), "bytes loaded");
    check_equal(found.bytes_stored, 4ull * 64 * sizeof(T), "bytes stored");
    bool wide = sizeof(T) == 16;
    check_equal(found.loads_16, wide ? 256ull : 0, "loads of 16 bytes");
    check_equal(found.stores_16, wide ? 256ull : 0, "stores of 16 bytes");
    check_equal(found.loads_smaller, wide ? 0 : 256ull, "smaller loads");
    check_equal(found.stores_smaller, wide ? 0 : 256ull, "smaller stores");
    check_equal(found.blocks, 2ull, "blocks");
  }
}

void traffic_is_counted() {
  check_copy<unsigned char>();
  check_copy<unsigned short>();
  check_copy<__half>();
  check_copy<__nv_bfloat16>();
  check_copy<float>();
  check_copy<double>();
  check_copy<long long>();
  check_copy<float2>();
  check_copy<uint2>();
  check_copy<uint4>();
  check_copy<int4>();
  check_copy<float4>();
  check_copy<double2>();
}

__global__ void count_up(unsigned* count) {
  atomicAdd(count, 1u);
}

void threads_of_the_host() {
  unsigned counts[4] = {};
  std::vector<std::thread> threads;
  for (unsigned& count : counts) {
    threads.emplace_back([&count] {
      for (int i = 0; i < 20; ++i) launch({2, 64}, count_up, &count);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (unsigned count : counts) check_equal(count, 20u * 128, "count");
}

void intrinsics() {
  check(__popc(0xf0fu) == 8 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31, "bits");
  check(__umulhi(0x80000000u, 6) == 3 && __mul24(-3, 5) == -15, "products");
  check(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f, "bits");
  check(__byte_perm(0x33221100u, 0x77665544u, 0x7632) == 0x77663322u, "bytes");
  check(__fmaf_rn(2, 3, 4) == 10 && __frcp_rn(4) == 0.25f && rsqrtf(4) == 0.5f, "float");
  check(max(2u, 3u) == 3 && min(-1, 2) == -1 && max(__int_as_float(-1), 1.0f) == 1, "min, max");
}

void occupancy() {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, rotate, 256, 0) == 0, "query");
  check_equal(blocks, 8, "by threads");
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, rotate, 64, 40 << 10);
  check_equal(blocks, 4, "by shared memory");
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, rotate, 32, 0);
  check_equal(blocks, 32, "by blocks");
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0) == 0, "attribute");
  check_equal(sms, simt::device().sm_count, "multiprocessors");
}

}  // namespace

std::vector<Case> primitive_cases() {
  return {
      {"builtin_variables", builtin_variables},
      {"all_shuffles", all_shuffles},
      {"all_votes", all_votes},
      {"all_atomics", all_atomics},
      {"barriers", barriers},
      {"shared_memory_starts_as_nan", shared_memory_starts_as_nan},
      {"last_block_reduction", last_block_reduction},
      {"cooperative_grid_barrier", cooperative_grid_barrier},
      {"seeds_give_orders", seeds_give_orders},
      {"traffic_is_counted", traffic_is_counted},
      {"threads_of_the_host", threads_of_the_host},
      {"intrinsics", intrinsics},
      {"occupancy", occupancy},
  };
}

}  // namespace executor_cases
