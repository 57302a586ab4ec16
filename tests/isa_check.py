"""Compares bnext with nn.BatchNorm under the ISA named by ATEN_CPU_CAPABILITY.

`test_determinism.py` runs this in a process of its own, as the ISA is chosen once per process:
ATEN_CPU_CAPABILITY=avx2 python tests/isa_check.py avx2
"""

from __future__ import annotations

import sys
from itertools import product

import torch
from cases import ACTIVATIONS, DTYPES, Case, Mode
from layers import make_layer
from oracle import assert_matches_torch

import bnext

# Channels and planes around every vector width (2 doubles to 64 bytes of half), with tails.
SHAPES = ((33, 13), (9, 67), (64, 128), (4, 13, 7, 7), (3, 33, 5, 3), (2, 3, 33, 17), (6, 5, 1, 64))
LAYOUTS = ("contiguous", "channels_last", "offset")


def main(isa: str) -> int:
    in_use = bnext.config.build_info()["isa"].lower()
    if in_use != isa:
        print(f"asked for {isa}, but bnext uses {in_use}")
        return 1
    torch.set_num_threads(1)
    count = 0
    for shape, layout, dtypes in product(SHAPES, LAYOUTS, DTYPES):
        if layout == "channels_last" and len(shape) == 2:
            continue
        # Every activation and residual meets every shape, layout and dtype; train, ghosts and eval
        # take turns.
        for i, (activation, residual) in enumerate(product(ACTIVATIONS, (False, True))):
            training, ghost = ((True, None), (True, 3), (False, None))[(i + count) % 3]
            if ghost and len(shape) == 2 and shape[0] % 3 == 1:
                ghost = 4
            case = Case(shape, layout).with_dtypes(*dtypes)
            layer = make_layer(
                case, training=training, act=True, activation=activation, ghost_batch_size=ghost
            )
            assert_matches_torch(
                layer,
                case,
                Mode(),
                activation=activation,
                with_residual=residual,
                ghost_batch_size=ghost,
            )
            count += 1
    print(f"checked with {in_use}: {count} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
