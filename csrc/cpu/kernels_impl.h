// All CPU kernels, compiled once per instruction set by kernels_*.cpp.
#pragma once

#include "kernels_apply.h"
#include "kernels_backward.h"
#include "kernels_fold.h"
#include "kernels_reduce.h"

namespace bnext::cpu {
namespace CPU_CAPABILITY {
namespace {

template <typename scalar_t>
constexpr Kernels<scalar_t> kernels_of = {
    reduce<scalar_t>,     apply<scalar_t>,     grad_reduce<scalar_t>, grad_apply<scalar_t>,  merge,
    statistics<scalar_t>, constants<scalar_t>, grad_fold<scalar_t>,   coefficients<scalar_t>};

constexpr KernelTable kTable = {
    kernels_of<float>, kernels_of<double>, kernels_of<c10::Half>, kernels_of<c10::BFloat16>};

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu
