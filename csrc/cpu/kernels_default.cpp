// The baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "kernels_impl.h"

namespace bnext::cpu {
const KernelTable kKernelsDefault = CPU_CAPABILITY::kTable;
}  // namespace bnext::cpu
