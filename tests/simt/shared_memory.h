// The shared memory of the running block: its content changes with the block, its address does not.
#pragma once

#include <cstddef>
#include <vector>

#pragma GCC visibility push(hidden)

namespace simt::shared_memory {

// For a launch with so many dynamic bytes; AddressSanitizer then refuses the bytes behind them.
void open(std::size_t dynamic_bytes);
void close();
// A block starts: every byte is 0xff, which makes every float a NaN.
void clear();
void save(std::vector<unsigned char>& to);
void restore(const std::vector<unsigned char>& from);
// A write behind the dynamic bytes, of which some are watched without AddressSanitizer too.
bool overrun();

}  // namespace simt::shared_memory

#pragma GCC visibility pop
