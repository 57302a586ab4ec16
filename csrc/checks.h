// One named check per contract of the ops. They take meta tensors and symbolic sizes too, so that
// no shape, dtype, device or stride reaches a kernel unchecked, and compiled graphs fail as early.
#pragma once

#include "ops/calls.h"

namespace bnext {

// The whole contract of each op; sets what the call leaves to be found out.
void check(ForwardCall& call);
void check(ReduceCall& call);
void check(const MergeCall& call);
void check(const FoldCall& call);
void check(ApplyCall& call);
void check(BackwardCall& call);
void check(GradReduceCall& call);
void check(GradApplyCall& call);

}  // namespace bnext
