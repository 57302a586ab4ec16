// apply on the CPU: activation((input - mean) * scale + shift + residual).
#pragma once

#include "kernels.h"
#include "pack.h"
#include "tiles.h"

namespace bnext::cpu {
namespace CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Act, bool kResidual>
BNEXT_KERNEL void apply_slab(const ApplyArgs<scalar_t>& given, const Slab& slab) {
  const ApplyArgs<scalar_t> args = given;
  using P = Pack<scalar_t>;
  for_each_strip<scalar_t, kStripPacks<scalar_t>>(
      slab, args.ahead, [&](auto packs, const Strip& strip, auto constants) {
    constexpr int K = packs();
    P mean[K], scale[K], shift[K];
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      mean[k] = constants.template get<P>(args.mean, k);
      scale[k] = constants.template get<P>(args.scale, k);
      shift[k] = constants.template get<P>(args.shift, k);
    }
    std::int64_t at = strip.at;
    for (std::int64_t i = 0; i < strip.lines; ++i, at += strip.stride) {
      BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
        const std::int64_t here = at + k * P::kSize;
        if (args.stream) {
          fetch<decltype(constants)::template kFetchFar<scalar_t>>(args.input, strip, i, k);
        } else {
          fetch<FetchInto::kL1>(args.input, strip, i, k);
          fetch<FetchInto::kL1ToWrite>(args.output, strip, i, k);
        }
        P z = normalize(P::load(args.input + here, strip.lanes), mean[k], scale[k], shift[k]);
        if constexpr (kResidual) {
          z = z + P::load(args.residual + here, strip.lanes);
        }
        z = Act::forward(z);
        if (args.stream) {
          z.stream(args.output + here);
        } else {
          z.store(args.output + here, strip.lanes);
        }
      }
    }
  });
}

template <typename scalar_t>
void apply(const ApplyArgs<scalar_t>& args, const Slab& slab) {
  for_each_part<scalar_t>(slab, [&](const Slab& part, std::int64_t offset, std::int64_t repeat) {
    Constants<AccType<scalar_t>> mean, scale, shift;
    ApplyArgs<scalar_t> expanded = args;
    expanded.advance(offset);
    expanded.mean = mean.expand(args.mean, part, repeat);
    expanded.scale = scale.expand(args.scale, part, repeat);
    expanded.shift = shift.expand(args.shift, part, repeat);
    dispatch_activation(args.activation, [&](auto act) {
      if (args.residual != nullptr) {
        apply_slab<scalar_t, decltype(act), true>(expanded, part);
      } else {
        apply_slab<scalar_t, decltype(act), false>(expanded, part);
      }
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu
