// Stands for -mavx2 -mfma -mf16c on this file alone: the pragma sets the code generation; the
// compiler's macros, which g++ does not derive from it, and ATen's select the headers' AVX2 parts.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define __AVX__ 1
#define __AVX2__ 1
#define __FMA__ 1
#define __F16C__ 1
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#include "kernels_impl.h"

namespace bnext::cpu {
const KernelTable kKernelsAvx2 = CPU_CAPABILITY::kTable;
}  // namespace bnext::cpu
#endif
