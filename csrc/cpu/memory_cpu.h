// What the launchers ask of the machine's memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace bnext::cpu {

// The size of the cache that the processor's cores share.
std::int64_t last_level_cache_bytes();

// Asks for huge pages under a large output that was just allocated: a page fault for 2 MiB instead
// of one for each 4 KiB. A hint; the memory is used no differently, and never more of it.
void advise_huge_pages(const at::Tensor& output);

}  // namespace bnext::cpu
