#include "memory_cpu.h"

#include <fstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bnext::cpu {

std::int64_t last_level_cache_bytes() {
  // sysconf(_SC_LEVEL3_CACHE_SIZE) adds up the caches of a whole socket on some virtual machines.
  static const std::int64_t bytes = [] {
    std::int64_t kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return kib > 0 ? kib * 1024 : std::int64_t{32} << 20;
  }();
  return bytes;
}

void advise_huge_pages(const at::Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  if (!output.defined() || output.nbytes() < 2 * kHugePage) {
    return;
  }
  const auto data = reinterpret_cast<std::uintptr_t>(output.mutable_data_ptr());
  const std::uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (data + output.nbytes()) / kHugePage * kHugePage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace bnext::cpu
