"""How many batch norms bnext.convert fuses in networks of torchvision and timm: those whose call
asks for an addition or activation too, beside those that one follows in the plain network.

Both are counted as the networks run, in training mode, on the meta device: no claim of
``conversion_report`` is taken.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import bnext
from bnext.activations import ACTIVATIONS
from bnext.conversion.calls import module_activation
from bnext.modules import _FusedBatchNorm

_ADDITIONS = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__,
}  # fmt: skip
_ACTIVATIONS = {Tensor.relu, Tensor.relu_}.union(*(a.functions for a in ACTIVATIONS.values()))


@dataclass
class Survey:
    """Of one network; names of batch norms.

    Attributes:
        norms: how many there are.
        possible: an addition or an activation that bnext has follows.
        fused: their call asked for it.
        missed: possible and not fused, and why not.
    """

    norms: int = 0
    possible: set[str] = field(default_factory=set)
    fused: set[str] = field(default_factory=set)
    missed: dict[str, str] = field(default_factory=dict)


class _Followers(TorchFunctionMode):
    """Which norms' outputs are added to, or activated, next."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.followed: set[str] = set()
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # tensors are kept: ids are not reused
        self._uses: Counter[str] = Counter()
        self._hooks = [
            module.register_forward_hook(self._remember(name))
            for name, module in model.named_modules()
            if bnext.is_batch_norm(module)
        ]

    def _remember(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if module_activation(getattr(module, "act", None)) is not None:
                self.followed.add(name)  # timm's norm with an activation in it
            self._outputs[id(output)] = name, output

        return hook

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        limits = {"min_val": 0.0, "max_val": 6.0}  # nn.ReLU6 calls hardtanh
        relu6 = func is F.hardtanh and limits.items() <= (kwargs or {}).items()
        if func in _ADDITIONS or func in _ACTIVATIONS or relu6:
            for argument in args:
                if id(argument) in self._outputs and all(isinstance(a, Tensor) for a in args[:2]):
                    self.followed.add(self._outputs[id(argument)][0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _fused_calls(model: nn.Module) -> Iterator[set[str]]:
    """The names of the norms whose call asks for more than the norm."""
    names = {module: name for name, module in model.named_modules()}
    found: set[str] = set()
    original = _FusedBatchNorm._fused

    def wrapper(self: Any, input: Tensor, residual: Tensor | None, activation: Any) -> Tensor:
        if residual is not None or activation is not None:
            found.add(names[self])
        return original(self, input, residual, activation)

    _FusedBatchNorm._fused = wrapper  # type: ignore[method-assign]
    try:
        yield found
    finally:
        _FusedBatchNorm._fused = original  # type: ignore[method-assign]


def survey(model: nn.Module, *inputs: Any) -> Survey:
    model.train()
    converted = bnext.convert(model)
    reasons = {entry.name: entry.detail for entry in bnext.conversion_report(converted)}
    with torch.no_grad():
        with _Followers(model) as followers:
            model(*inputs)
        with _fused_calls(converted) as fused:
            converted(*inputs)
    missed = {name: reasons[name] for name in sorted(followers.followed - fused)}
    return Survey(len(reasons), followers.followed, fused, missed)


# A small network of each family that has batch norms.
TIMM = [
    "bat_resnext26ts", "botnet26t_256", "coat_lite_tiny", "convit_tiny", "crossvit_tiny_240",
    "cs3darknet_s", "cspdarknet53", "cspresnet50", "darknet53", "densenet121", "dla34",
    "dm_nfnet_f0", "dpn68", "eca_resnet33ts", "edgenext_xx_small", "efficientformer_l1",
    "efficientformerv2_s0", "efficientnet_b0", "efficientnet_lite0", "efficientvit_b0",
    "efficientvit_m0", "ese_vovnet19b_dw", "fasternet_t0", "fastvit_t8", "fbnetc_100",
    "fbnetv3_b", "gernet_s", "ghostnet_100", "ghostnetv2_100", "gcresnet33ts", "halonet26t",
    "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0", "hrnet_w18_small", "inception_next_atto",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lambda_resnet26t", "lcnet_050",
    "legacy_senet154", "legacy_seresnet18", "legacy_xception", "levit_128s", "mixnet_s",
    "mnasnet_small", "mobilenet_edgetpu_v2_xs", "mobilenetv1_100", "mobilenetv2_050",
    "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs",
    "mobilevitv2_050", "nasnetalarge", "pnasnet5large", "rdnet_tiny", "regnetx_002",
    "regnety_002", "regnetz_b16", "repghostnet_050", "repvgg_a0", "repvit_m0_9",
    "res2net50_26w_4s", "resnest14d", "resnet18", "resnet26d", "resnet50", "resnetv2_50x1_bit",
    "resnext26ts", "rexnet_100", "rexnetr_100", "sehalonet33ts", "selecsls42b", "semnasnet_050",
    "seresnet33ts", "seresnext26d_32x4d", "sknet18", "skresnet18", "spnasnet_100", "starnet_s1",
    "tf_efficientnetv2_b0", "tf_mixnet_s", "tiny_vit_5m_224", "tinynet_e", "tresnet_m",
    "vgg11_bn", "visformer_tiny", "vovnet39a", "wide_resnet50_2", "xception41",
]  # fmt: skip


def networks() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Names, how to build them, and the shape of an input."""
    from torchvision import models

    for name in models.list_models(module=models):
        size = 299 if name == "inception_v3" else 224
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield (
            f"torchvision {name}",
            partial(models.get_model, name, weights=None, **options),
            (2, 3, size, size),
        )
    import timm

    for name in TIMM:
        if not timm.is_model(name):
            continue
        config: Any = timm.get_pretrained_cfg(name)
        size = config.input_size[-1]
        yield f"timm {name}", partial(timm.create_model, name), (2, 3, size, size)


def surveys(only: str) -> Iterator[tuple[str, Survey]]:
    for name, build, shape in networks():
        if only in name:
            model = build().to("meta")
            if any(map(bnext.is_batch_norm, model.modules())):
                yield name, survey(model, torch.empty(shape, device="meta"))


def page(found: dict[str, Survey]) -> str:
    """docs/fusion.md."""
    lines = [
        "# What bnext.convert fuses",
        "",
        "Written by `make matrix`. *Possible*: in the plain network an addition of a tensor or an",
        "activation that bnext has follows the norm. *Fused*: in the converted one the norm's call",
        "asks for it. Both are counted as the networks run, in training mode, on the meta device.",
        "",
    ]
    for package in ("torchvision", "timm"):
        of = [s for name, s in found.items() if name.startswith(package)]
        possible = sum(len(s.possible) for s in of)
        fused = sum(len(s.possible & s.fused) for s in of)
        lines.append(
            f"{package}: {len(of)} networks, {fused:,} of {possible:,} fused "
            f"({fused / possible:.0%})."
        )
    lines += ["", "| network | batch norms | possible | fused |", "|---|---|---|---|"]
    for name, of_one in found.items():
        possible, fused = len(of_one.possible), len(of_one.possible & of_one.fused)
        lines.append(f"| {name} | {of_one.norms} | {possible} | {fused} |")
    reasons = Counter(reason for s in found.values() for reason in s.missed.values())
    lines += ["", "Why those that are possible are not fused (the report's words):", ""]
    lines += ["| norms | reason |", "|---|---|"]
    lines += [f"| {count} | {reason} |" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="", help="networks whose names contain this")
    parser.add_argument("--output", type=Path, help="where to write the page")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {}
    for name, of_one in surveys(arguments.only):
        found[name] = of_one
        possible, fused = len(of_one.possible), len(of_one.possible & of_one.fused)
        print(f"{name}: {of_one.norms} norms, {possible} possible, {fused} fused", flush=True)
        for norm, reason in of_one.missed.items() if arguments.only else ():
            print(f"    {norm}: {reason}")
    if arguments.output:
        arguments.output.write_text(page(found))


if __name__ == "__main__":
    main()
