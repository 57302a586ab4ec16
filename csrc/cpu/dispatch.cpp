#include <ATen/Version.h>

#include <string>

#include "backend_cpu.h"
#include "tensors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BNEXT_X86_KERNELS 1
#else
#define BNEXT_X86_KERNELS 0
#endif

namespace bnext {
namespace cpu {
namespace {

const KernelTable& pick_table() {
#if BNEXT_X86_KERNELS
  // ATEN_CPU_CAPABILITY forces an instruction set here as it does for torch's own kernels.
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return kKernelsAvx512;
  }
  if (capability == "AVX2") {
    return kKernelsAvx2;
  }
#endif
  return kKernelsDefault;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = pick_table();
  return table;
}

}  // namespace cpu

const Backend* cpu_backend() {
  static const cpu::CpuBackend backend;
  return &backend;
}

std::string cpu_isa() {
#if BNEXT_X86_KERNELS
  const cpu::KernelTable* table = &cpu::kernel_table();
  return table == &cpu::kKernelsAvx512 ? "AVX512"
         : table == &cpu::kKernelsAvx2 ? "AVX2"
                                       : "DEFAULT";
#else
  return "DEFAULT";
#endif
}

std::vector<std::string> cpu_isas() {
#if BNEXT_X86_KERNELS
  return {"DEFAULT", "AVX2", "AVX512"};
#else
  return {"DEFAULT"};
#endif
}

}  // namespace bnext
