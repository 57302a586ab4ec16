"""The tables of bad calls of the raw ops (see bad_calls.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
from bad_calls import (
    ANY,
    FUNCTIONAL,
    SHAPE,
    Arguments,
    Bad,
    C,
    functional_call,
    overlapping,
    vector,
)
from torch import Tensor

SPARSE = "must be a dense"
G = 2  # ghosts: save_* are (G, C), float32


def op_forward() -> Arguments:
    return functional_call() | {"num_batches_tracked": torch.zeros((), dtype=torch.int64)}


def saved() -> Arguments:
    return {
        "save_mean": torch.zeros(G, C),
        "save_mean_lo": torch.zeros(G, C),
        "save_invstd": torch.ones(G, C),
    }


def op_backward() -> Arguments:
    return {
        "grad_output": torch.randn(SHAPE),
        "input": torch.randn(SHAPE),
        "weight": torch.ones(C),
        "bias": torch.zeros(C),
        "output": None,
        "residual": None,
        **saved(),
        "training": True,
        "activation": "relu",
        "output_mask": [True, False],
    }


def op_grad_reduce() -> Arguments:
    call = op_backward()
    del call["training"], call["output_mask"]
    return call


def op_grad_apply() -> Arguments:
    return op_grad_reduce() | {
        "count": torch.full((G,), 10),
        "sum_dy": torch.zeros(G, C, dtype=torch.float64),
        "sum_dy_xmu": torch.zeros(G, C, dtype=torch.float64),
        "output_mask": [True, False],
    }


def op_apply() -> Arguments:
    call = op_grad_reduce()
    del call["grad_output"], call["output"]
    return call


def op_merge() -> Arguments:
    return {
        "count": torch.full((G,), 10),
        "mean": torch.zeros(G, C, dtype=torch.float64),
        "m2": torch.ones(G, C, dtype=torch.float64),
    }


def op_fold() -> Arguments:
    return op_merge() | {
        "running_mean": torch.zeros(C),
        "running_var": torch.ones(C),
        "num_batches_tracked": torch.zeros((), dtype=torch.int64),
        "momentum": 0.1,
        "eps": 1e-5,
        "dtype": torch.float32,
    }


def op_reduce() -> Arguments:
    return {"input": torch.randn(SHAPE), "ghost_batch_size": 2}


GOOD_OP_CALLS = {
    "batch_norm": op_forward,
    "batch_norm_backward": op_backward,
    "batch_norm_reduce": op_reduce,
    "batch_norm_merge": op_merge,
    "batch_norm_fold": op_fold,
    "batch_norm_apply": op_apply,
    "batch_norm_grad_reduce": op_grad_reduce,
    "batch_norm_grad_apply": op_grad_apply,
}


def f64(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


SAVED_ERRORS = [
    Bad("save_mean_too_narrow", lambda: {"save_mean": torch.zeros(G, C - 1)}, "save_mean"),
    Bad("save_mean_of_rank_1", lambda: {"save_mean": torch.zeros(C)}, "save_mean"),
    Bad("save_mean_of_half", lambda: {"save_mean": torch.zeros(G, C).half()}, "save_mean.*dtype"),
    Bad("save_mean_lo_one_ghost", lambda: {"save_mean_lo": torch.zeros(1, C)}, "save_mean_lo"),
    Bad("save_invstd_of_double", lambda: {"save_invstd": f64(G, C)}, "save_invstd.*dtype"),
    Bad("save_invstd_one_ghost", lambda: {"save_invstd": torch.ones(1, C)}, "save_invstd"),
    Bad(
        "save_invstd_on_meta",
        lambda: {"save_invstd": torch.ones(G, C, device="meta")},
        "save_invstd.*device",
    ),
    Bad(
        "more_ghosts_than_samples",
        lambda: {name: torch.ones(5, C) for name in saved()},
        "save_mean|ghost",
    ),
    Bad("no_ghosts", lambda: {name: torch.ones(0, C) for name in saved()}, "save_mean|ghost"),
    Bad("weight_too_short", lambda: {"weight": vector(C - 1)}, "weight"),
    Bad("bias_of_double", lambda: {"bias": vector().double()}, "bias.*dtype"),
    Bad("input_of_rank_1", lambda: {"input": torch.randn(C)}, "input|grad_output"),
    Bad("input_of_int64", lambda: {"input": torch.ones(SHAPE).long()}, "input.*dtype"),
    Bad("activation_unknown", lambda: {"activation": "gelu"}, "activation.*relu.*silu"),
    Bad("requires_grad", lambda: {"weight": vector(requires_grad=True)}, "not differentiable"),
]

GRAD_ERRORS = [
    *SAVED_ERRORS,
    Bad("grad_shape", lambda: {"grad_output": torch.randn(4, 3, 6)}, "grad_output"),
    Bad("grad_dtype", lambda: {"grad_output": torch.randn(SHAPE).double()}, "grad_output.*dtype"),
    Bad(
        "grad_device",
        lambda: {"grad_output": torch.ones(SHAPE, device="meta")},
        "grad_output.*device",
    ),
    Bad("grad_sparse", lambda: {"grad_output": torch.ones(SHAPE).to_sparse()}, SPARSE),
    Bad("output_shape", lambda: {"output": torch.ones(4, 3, 6)}, "output"),
    Bad("output_dtype", lambda: {"output": torch.ones(SHAPE).half()}, "output"),
    Bad(
        "residual_shape",
        lambda: {"residual": torch.ones(1, 3, 5), "activation": "silu"},
        "residual",
    ),
    Bad(
        "residual_for_relu",
        lambda: {"residual": torch.ones(SHAPE), "activation": "relu"},
        "residual is not needed.*'relu'",
    ),
    Bad(
        "output_for_silu",
        lambda: {"output": torch.ones(SHAPE), "activation": "silu"},
        "output does not determine.*'silu'",
    ),
    Bad(
        "output_and_residual",
        lambda: {"output": torch.ones(SHAPE), "residual": torch.ones(SHAPE)},
        "output.*residual|residual.*output",
    ),
]

# The dispatcher refuses a sparse tensor before the op sees it; the functional names the argument.
SPARSE_IN_OPS = ("input_sparse", "residual_sparse")
# A schema's int takes a bool, for torch's own ops too; the op can take a cumulative average.
ALLOWED_IN_OPS = ("ghost_size_bool", "momentum_none")

OPS: dict[str, list[Bad]] = {
    "batch_norm": [
        *[bad for bad in FUNCTIONAL if bad.name not in (*ALLOWED_IN_OPS, *SPARSE_IN_OPS)],
        *[replace(bad, match=SPARSE) for bad in FUNCTIONAL if bad.name in SPARSE_IN_OPS],
        Bad(
            "num_batches_tracked_of_float",
            lambda: {"num_batches_tracked": torch.zeros(())},
            "num_batches_tracked",
        ),
        Bad(
            "num_batches_tracked_of_int32",
            lambda: {"num_batches_tracked": torch.zeros((), dtype=torch.int32)},
            "num_batches_tracked",
        ),
        Bad(
            "num_batches_tracked_of_rank_1",
            lambda: {"num_batches_tracked": torch.zeros(1, dtype=torch.int64)},
            "num_batches_tracked",
        ),
        Bad(
            "num_batches_tracked_on_meta",
            lambda: {"num_batches_tracked": torch.zeros((), dtype=torch.int64, device="meta")},
            "num_batches_tracked",
        ),
        Bad(
            "cumulative_without_num_batches_tracked",
            lambda: {"momentum": None, "num_batches_tracked": None},
            "momentum|num_batches_tracked",
        ),
    ],
    "batch_norm_backward": [
        *GRAD_ERRORS,
        Bad("mask_too_long", lambda: {"output_mask": [True] * 3}, "output_mask|3", ANY),
    ],
    "batch_norm_grad_reduce": GRAD_ERRORS,
    "batch_norm_grad_apply": [
        *GRAD_ERRORS,
        Bad("sum_dy_shape", lambda: {"sum_dy": f64(G, C + 1)}, "sum_dy"),
        Bad("sum_dy_dtype", lambda: {"sum_dy": torch.ones(G, C)}, "sum_dy"),
        Bad("sum_dy_xmu_missing", lambda: {"sum_dy_xmu": None}, "sum_dy_xmu"),
        Bad("sum_dy_missing", lambda: {"sum_dy": None}, "sum_dy"),
        Bad("count_missing", lambda: {"count": None}, "count"),
        Bad("count_too_long", lambda: {"count": torch.full((G + 1,), 10)}, "count"),
        Bad("count_of_float", lambda: {"count": torch.full((G,), 10.0)}, "count"),
    ],
    "batch_norm_apply": [
        *SAVED_ERRORS,
        Bad("residual_shape", lambda: {"residual": torch.ones(1, 3, 5)}, "residual"),
        Bad("residual_dtype", lambda: {"residual": torch.ones(SHAPE).double()}, "residual"),
    ],
    "batch_norm_reduce": [
        Bad("input_of_rank_1", lambda: {"input": torch.randn(C)}, "input.*at least 2 dimensions"),
        Bad("input_of_int64", lambda: {"input": torch.ones(SHAPE).long()}, "input.*dtype"),
        Bad("input_sparse", lambda: {"input": torch.ones(SHAPE).to_sparse()}, SPARSE),
        Bad("ghost_size_zero", lambda: {"ghost_batch_size": 0}, "ghost_batch_size"),
        Bad("ghost_size_negative", lambda: {"ghost_batch_size": -1}, "ghost_batch_size"),
        Bad(
            "requires_grad",
            lambda: {"input": torch.randn(SHAPE, requires_grad=True)},
            "not differentiable",
        ),
    ],
    "batch_norm_merge": [
        Bad("count_of_float", lambda: {"count": torch.full((G,), 10.0)}, "count"),
        Bad("count_too_long", lambda: {"count": torch.full((G + 1,), 10)}, "count"),
        Bad("count_of_rank_2", lambda: {"count": torch.full((G, C), 10)}, "count"),
        Bad("count_negative", lambda: {"count": torch.tensor([10, -1])}, "count"),
        Bad("mean_of_float", lambda: {"mean": torch.zeros(G, C)}, "mean"),
        Bad("mean_of_rank_1", lambda: {"mean": f64(C)}, "mean"),
        Bad("m2_of_another_shape", lambda: {"m2": f64(G, C + 1)}, "m2"),
        Bad("m2_on_meta", lambda: {"m2": f64(G, C).to("meta")}, "m2.*device"),
    ],
    "batch_norm_fold": [
        Bad("count_too_long", lambda: {"count": torch.full((G + 1,), 10)}, "count"),
        Bad("count_negative", lambda: {"count": torch.tensor([-3, 10])}, "count"),
        Bad("m2_of_another_shape", lambda: {"m2": f64(G + 1, C)}, "m2"),
        Bad("running_mean_too_short", lambda: {"running_mean": vector(2)}, "running_mean"),
        Bad("running_var_of_half", lambda: {"running_var": vector().half()}, "running_var"),
        Bad("running_var_alone", lambda: {"running_mean": None}, "running_mean.*running_var"),
        Bad("running_mean_overlapping", lambda: {"running_mean": overlapping()}, "running_mean"),
        Bad("eps_zero", lambda: {"eps": 0.0}, "eps"),
        Bad("dtype_integer", lambda: {"dtype": torch.int64}, "dtype"),
        Bad(
            "num_batches_tracked_of_float",
            lambda: {"num_batches_tracked": torch.zeros(())},
            "num_batches_tracked",
        ),
        Bad(
            "cumulative_without_num_batches_tracked",
            lambda: {"momentum": None, "num_batches_tracked": None},
            "momentum|num_batches_tracked",
        ),
    ],
}
