"""The table of bad calls: what is wrong, with which arguments, and what the error must say.

Every entry changes some arguments of a good call; values are made by functions, fresh for each
test. The tests are in test_bad_calls.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
SHAPE = (4, 3, 5)
C = 3


@dataclass(frozen=True)
class Bad:
    """One bad call."""

    name: str
    change: Callable[[], Arguments]
    match: str
    errors: tuple[type[Exception], ...] = (ValueError, RuntimeError)

    def __str__(self) -> str:
        return self.name


def vector(size: int = C, **options: Any) -> Tensor:
    return torch.ones(size, **options)


def overlapping() -> Tensor:
    """C elements that are one element: writing them is a race."""
    return torch.ones(1).expand(C)


ANY = (ValueError, RuntimeError, TypeError)


def functional_call() -> Arguments:
    """A good call of bnext.batch_norm."""
    return {
        "input": torch.randn(SHAPE),
        "running_mean": torch.zeros(C),
        "running_var": torch.ones(C),
        "weight": torch.ones(C),
        "bias": torch.zeros(C),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "activation": "relu",
        "residual": torch.randn(SHAPE),
        "ghost_batch_size": None,
    }


def size_errors(name: str) -> list[Bad]:
    return [
        Bad(f"{name}_too_short", lambda: {name: vector(C - 1)}, name),
        Bad(f"{name}_too_long", lambda: {name: vector(C + 1)}, name),
        Bad(f"{name}_of_rank_2", lambda: {name: torch.ones(1, C)}, name),
        Bad(f"{name}_of_rank_0", lambda: {name: torch.ones(())}, name),
        Bad(f"{name}_of_a_wide_dtype", lambda: {name: vector().double()}, f"{name}.*dtype"),
        Bad(f"{name}_of_a_narrow_dtype", lambda: {name: vector().half()}, f"{name}.*dtype"),
        Bad(f"{name}_of_integers", lambda: {name: vector().long()}, f"{name}.*dtype"),
        Bad(f"{name}_on_meta", lambda: {name: vector(device="meta")}, f"{name}.*device"),
        Bad(f"{name}_a_list", lambda: {name: [1.0] * C}, name, ANY),
    ]


def input_of(dtype: torch.dtype) -> Arguments:
    return {"input": torch.ones(SHAPE).to(dtype), "residual": None}


FUNCTIONAL = [
    Bad(
        "input_of_rank_0",
        lambda: {"input": torch.tensor(1.0), "residual": None},
        "input.*at least 2 dimensions",
    ),
    Bad(
        "input_of_rank_1",
        lambda: {"input": torch.randn(C), "residual": None},
        "input.*at least 2 dimensions",
    ),
    Bad(
        "more_channels_than_parameters",
        lambda: {"input": torch.randn(4, C + 1, 5), "residual": None},
        "(weight|bias|running_mean|running_var)",
    ),
    Bad(
        "no_channels_but_parameters",
        lambda: {"input": torch.randn(4, 0, 5), "residual": None},
        "(weight|bias|running_mean|running_var)",
    ),
    Bad(
        "empty_batch_of_other_channels",
        lambda: {"input": torch.randn(0, C + 1, 5), "residual": None},
        "(weight|bias|running_mean|running_var)",
    ),
    Bad("input_of_int64", lambda: input_of(torch.int64), "input.*dtype"),
    Bad("input_of_uint8", lambda: input_of(torch.uint8), "input.*dtype"),
    Bad("input_of_bool", lambda: input_of(torch.bool), "input.*dtype"),
    Bad("input_of_complex", lambda: input_of(torch.complex64), "input.*dtype"),
    Bad("input_of_float8", lambda: input_of(torch.float8_e4m3fn), "input.*dtype"),
    Bad(
        "input_sparse", lambda: {"input": torch.ones(SHAPE).to_sparse(), "residual": None}, "input"
    ),
    Bad("input_a_list", lambda: {"input": [[1.0, 2.0, 3.0]], "residual": None}, "input", ANY),
    Bad(
        "input_on_meta_beside_cpu",
        lambda: {"input": torch.ones(SHAPE, device="meta"), "residual": None},
        "(weight|bias|running_mean|running_var).*device",
    ),
    *size_errors("weight"),
    *size_errors("bias"),
    *size_errors("running_mean"),
    *size_errors("running_var"),
    Bad(
        "double_input_with_float_parameters",
        lambda: {"input": torch.ones(SHAPE).double(), "residual": None},
        "(weight|bias|running_mean|running_var).*dtype",
    ),
    Bad(
        "half_input_with_bfloat16_parameters",
        lambda: {
            "input": torch.ones(SHAPE).half(),
            "residual": None,
            "weight": vector().bfloat16(),
            "bias": vector().bfloat16(),
        },
        "(weight|bias).*dtype",
    ),
    Bad("running_mean_alone", lambda: {"running_var": None}, "running_mean.*running_var"),
    Bad("running_var_alone", lambda: {"running_mean": None}, "running_mean.*running_var"),
    Bad(
        "eval_without_statistics",
        lambda: {"running_mean": None, "running_var": None, "training": False},
        "running_mean",
    ),
    Bad("eval_with_one_statistic", lambda: {"running_var": None, "training": False}, "running_"),
    Bad(
        "running_mean_requires_grad",
        lambda: {"running_mean": vector(requires_grad=True)},
        "running_mean.*requires? grad",
    ),
    Bad(
        "running_var_requires_grad",
        lambda: {"running_var": vector(requires_grad=True)},
        "running_var.*requires? grad",
    ),
    Bad("running_mean_overlapping", lambda: {"running_mean": overlapping()}, "running_mean"),
    Bad("running_var_overlapping", lambda: {"running_var": overlapping()}, "running_var"),
    Bad("residual_broadcasts", lambda: {"residual": torch.randn(1, 3, 5)}, "residual"),
    Bad("residual_of_another_shape", lambda: {"residual": torch.randn(4, 3, 6)}, "residual"),
    Bad("residual_of_another_rank", lambda: {"residual": torch.randn(4, 3, 5, 1)}, "residual"),
    Bad("residual_of_another_dtype", lambda: {"residual": torch.randn(SHAPE).half()}, "residual"),
    Bad(
        "residual_on_meta",
        lambda: {"residual": torch.ones(SHAPE, device="meta")},
        "residual.*device",
    ),
    Bad("residual_sparse", lambda: {"residual": torch.ones(SHAPE).to_sparse()}, "residual"),
    Bad("residual_a_number", lambda: {"residual": 1.0}, "residual", ANY),
    Bad("eps_zero", lambda: {"eps": 0.0}, "batch_norm eps must be positive during training"),
    Bad("eps_negative", lambda: {"eps": -1e-5}, "batch_norm eps must be positive during training"),
    Bad(
        "eps_negative_in_eval",
        lambda: {"eps": -1e-5, "training": False},
        "batch_norm eps must be non-negative",
    ),
    Bad("eps_nan", lambda: {"eps": float("nan")}, "eps"),
    Bad("eps_a_string", lambda: {"eps": "1e-5"}, "eps|'str'", ANY),
    Bad("momentum_a_string", lambda: {"momentum": "0.1"}, "momentum|'str'", ANY),
    Bad("momentum_none", lambda: {"momentum": None}, "momentum", ANY),
    Bad("activation_unknown", lambda: {"activation": "tanh"}, "activation.*relu.*leaky_relu.*silu"),
    Bad("activation_in_capitals", lambda: {"activation": "ReLU"}, "activation.*relu.*silu"),
    Bad("activation_a_function", lambda: {"activation": torch.relu}, "activation", ANY),
    Bad("ghost_size_zero", lambda: {"ghost_batch_size": 0}, "ghost_batch_size"),
    Bad("ghost_size_negative", lambda: {"ghost_batch_size": -2}, "ghost_batch_size"),
    Bad("ghost_size_float", lambda: {"ghost_batch_size": 2.0}, "ghost_batch_size", ANY),
    Bad("ghost_size_bool", lambda: {"ghost_batch_size": True}, "ghost_batch_size", ANY),
    Bad("ghost_size_string", lambda: {"ghost_batch_size": "2"}, "ghost_batch_size", ANY),
    Bad(
        "one_value_per_channel",
        lambda: {"input": torch.randn(1, C), "residual": None},
        r"Expected more than 1 value per channel when training, got input size "
        r"torch.Size\(\[1, 3\]\)",
        (ValueError,),
    ),
    Bad(
        "one_value_per_channel_of_a_ghost",
        lambda: {"input": torch.randn(3, C), "residual": None, "ghost_batch_size": 2},
        "Expected more than 1 value per channel when training.*ghost_batch_size",
        (ValueError,),
    ),
]
