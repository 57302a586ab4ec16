#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "executor.h"
#include "shadow.h"

// The name under which kernels declare dynamic shared memory:
// extern __shared__ __align__(16) unsigned char bnext_shared[];
#if !defined(SIMT_SHARED)
#define SIMT_SHARED bnext_shared
#endif

namespace {
constexpr std::size_t kWatched = 256;  // behind the largest request
}

alignas(128) thread_local unsigned char SIMT_SHARED[simt::kSharedCapacity + kWatched];

namespace simt::shared_memory {
namespace {

struct Range {
  unsigned char* begin = nullptr;
  std::size_t bytes = 0;
};

// `__shared__` is thread_local, so static shared memory is the rest of this module's TLS segment.
struct Segments {
  Range before;  // the dynamic part
  Range after;
};

int find_segment(dl_phdr_info* info, std::size_t, void* data) {
  auto* segment = static_cast<Range*>(data);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
    if (header.p_type != PT_TLS || begin == nullptr) continue;
    if (SIMT_SHARED < begin || SIMT_SHARED >= begin + header.p_memsz) continue;
    // Initialised data comes first: shared memory has none.
    *segment = {begin + header.p_filesz, header.p_memsz - header.p_filesz};
    return 1;
  }
  return 0;
}

Segments find_static() {
  Range all;
  if (dl_iterate_phdr(find_segment, &all) == 0) throw std::logic_error("no TLS segment found");
  unsigned char* end = SIMT_SHARED + sizeof(SIMT_SHARED);
  return {
      {all.begin, std::size_t(SIMT_SHARED - all.begin)},
      {end, std::size_t(all.begin + all.bytes - end)}};
}

struct {
  Range ranges[3];  // static, dynamic, static
} now;

}  // namespace

void open(std::size_t dynamic_bytes) {
  Segments found = find_static();
  now = {{found.before, {SIMT_SHARED, dynamic_bytes}, found.after}};
  poison(SIMT_SHARED + dynamic_bytes, sizeof(SIMT_SHARED) - dynamic_bytes);
}

void close() {
  unpoison(SIMT_SHARED, sizeof(SIMT_SHARED));
}

void clear() {
  for (const Range& range : now.ranges) {
    fill_unseen(range.begin, 0xff, range.bytes);
    forget_accesses(range.begin, range.bytes);
  }
  if (!under_asan()) fill_unseen(now.ranges[1].begin + now.ranges[1].bytes, 0xff, kWatched);
}

void save(std::vector<unsigned char>& to) {
  to.resize(now.ranges[0].bytes + now.ranges[1].bytes + now.ranges[2].bytes);
  unsigned char* position = to.data();
  for (const Range& range : now.ranges) {
    copy_unseen(position, range.begin, range.bytes);
    position += range.bytes;
  }
}

void restore(const std::vector<unsigned char>& from) {
  const unsigned char* position = from.data();
  for (const Range& range : now.ranges) {
    copy_unseen(range.begin, position, range.bytes);
    forget_accesses(range.begin, range.bytes);
    position += range.bytes;
  }
}

bool overrun() {
  if (under_asan()) return false;
  const unsigned char* end = now.ranges[1].begin + now.ranges[1].bytes;
  return std::any_of(end, end + kWatched, [](unsigned char byte) { return byte != 0xff; });
}

}  // namespace simt::shared_memory
