"""``make matrix``: bnext.convert on real networks, written down in docs/models.md."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnext

TABLE = Path(__file__).parent.parent / "docs" / "models.md"
CLASSES = 10


class PointNet(nn.Module):
    """As Qi et al. 2017: shared layers over points, a maximum, layers over clouds. (N, 3, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 32, 1), nn.Conv1d(32, 64, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(32), nn.BatchNorm1d(64)
        self.head = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES)
        )

    def forward(self, points: Tensor) -> Tensor:
        points = F.relu(self.bn1(self.conv1(points)))
        points = self.bn2(self.conv2(points))
        return self.head(points.amax(2))


class VideoBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(channels)

    def forward(self, clip: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(clip)))
        return self.relu(torch.add(self.bn2(self.conv2(out)), clip))


def video() -> nn.Module:
    stem = (nn.Conv3d(3, 8, 3, stride=2), nn.BatchNorm3d(8), nn.ReLU())
    head = (nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    return nn.Sequential(*stem, VideoBlock(8), VideoBlock(8), *head)


def torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, num_classes=CLASSES, **options)

    return build


def timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES)

    return build


def tabnet() -> nn.Module:
    from pytorch_tabnet.tab_network import TabNetNoEmbeddings

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            groups = torch.eye(16, dtype=torch.float64)
            self.net = TabNetNoEmbeddings(
                16, CLASSES, virtual_batch_size=16, group_attention_matrix=groups
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0]

    return Logits()


@dataclass(frozen=True)
class Model:
    """A network, what convert shall find in it, and the shape of its input.

    Attributes:
        counts: norms that are fused with an activation, with a residual too, and only swapped.
    """

    name: str
    build: Callable[[], nn.Module]
    counts: tuple[int, int, int]
    shape: tuple[int, ...] = (4, 3, 64, 64)


MODELS = [
    Model("torchvision resnet18", torchvision("resnet18"), (17, 8, 3)),
    Model("torchvision resnet50", torchvision("resnet50"), (49, 16, 4)),
    Model("torchvision mobilenet_v3_small", torchvision("mobilenet_v3_small"), (11, 6, 23)),
    Model("torchvision densenet121", torchvision("densenet121"), (121, 0, 0)),
    Model("torchvision efficientnet_b0", torchvision("efficientnet_b0"), (33, 0, 16)),
    Model("torchvision googlenet", torchvision("googlenet", init_weights=False), (59, 0, 0)),
    Model("torchvision regnet_y_400mf", torchvision("regnet_y_400mf"), (49, 16, 4)),
    Model("torchvision mnasnet0_5", torchvision("mnasnet0_5"), (45, 10, 7)),
    Model("timm resnet18", timm("resnet18"), (17, 8, 3)),
    Model("timm efficientnet_b0", timm("efficientnet_b0"), (42, 9, 7)),
    Model("timm mobilenetv3_small_050", timm("mobilenetv3_small_050"), (12, 7, 22)),
    Model("timm convnext_atto", timm("convnext_atto"), (0, 0, 0)),
    Model("timm resnest14d", timm("resnest14d"), (19, 4, 4)),
    Model("timm dla34", timm("dla34"), (33, 12, 4)),
    Model("PointNet", PointNet, (2, 0, 1), (8, 3, 40)),
    Model("video", video, (5, 2, 0), (2, 3, 5, 16, 16)),
    Model("pytorch-tabnet", tabnet, (0, 0, 21), (64, 16)),
]


@dataclass(frozen=True)
class Result:
    """What the converted model does beside the original, in float64.

    Attributes:
        report: of convert.
        checkpoints: whether the originals' loads into the converted model, and back.
        output: largest difference of the outputs in eval, over the largest output.
        loss: largest relative difference of the losses of three training steps.
        buffers: largest difference of a buffer after them, over its largest value.
    """

    report: bnext.conversion.ConversionReport
    checkpoints: bool
    output: float
    loss: float
    buffers: float


def compare(model: Model) -> Result:
    torch.manual_seed(0)
    plain = model.build().double()
    spread_statistics(plain)
    converted = bnext.convert(plain)
    x = torch.randn(model.shape, dtype=torch.float64)
    plain.eval(), converted.eval()
    with torch.no_grad():
        output = difference(converted(x), plain(x))
    losses = [train(copy.deepcopy(m), x) for m in (plain, converted)]
    differences = [
        difference(found, losses[0][1][name])
        for name, found in losses[1][1].items()
        if found.is_floating_point()
    ]
    return Result(
        bnext.conversion_report(converted),
        checkpoints_load(plain, converted),
        output,
        max(abs(a - b) / abs(a) for a, b in zip(losses[0][0], losses[1][0], strict=True)),
        max(differences, default=0.0),
    )


def checkpoints_load(plain: nn.Module, converted: nn.Module) -> bool:
    """Both ways: what was different before is equal after."""
    before, after = plain.state_dict(), converted.state_dict()
    if list(before) != list(after):
        return False
    for source, target in ((plain, converted), (converted, plain)):
        changed = copy.deepcopy(source)
        for tensor in changed.state_dict().values():
            tensor.add_(1)
        loaded = copy.deepcopy(target)
        loaded.load_state_dict(changed.state_dict())
        pairs = zip(loaded.state_dict().values(), changed.state_dict().values(), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True


def spread_statistics(model: nn.Module) -> None:
    """Parameters and buffers as of a trained model: with those of a fresh one much looks right."""
    for module in model.modules():
        if bnext.is_batch_norm(module):
            norm: Any = module
            for tensor in (norm.weight, norm.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.2)


def difference(found: Tensor, expected: Tensor) -> float:
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / scale


def train(model: nn.Module, x: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps: the losses, and the buffers after them."""
    torch.manual_seed(1)  # of dropout
    model.train()
    labels = torch.arange(x.shape[0]) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = model(x)
        output = output if isinstance(output, Tensor) else output[0]
        loss = F.cross_entropy(output, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.named_buffers())


HEADING = (
    "network", "batch norms", "fused", "of these with a residual", "swapped", "left",
    "eval output", "losses", "buffers",
)  # fmt: skip


def row(model: Model, result: Result) -> str:
    report = result.report
    cells = [model.name, len(report.entries), len(report.fused)]
    cells += [sum(e.residual for e in report.fused), len(report.swapped), len(report.left)]
    cells += [f"{d:.0e}" for d in (result.output, result.loss, result.buffers)]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Converts real networks, and compares.")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--only", help="Models whose names contain this; nothing is written.")
    arguments = parser.parse_args()
    lines = ["| " + " | ".join(HEADING) + " |", "|---" * len(HEADING) + "|"]
    for model in MODELS:
        if not arguments.only or arguments.only in model.name:
            lines.append(row(model, compare(model)))
            print(lines[-1], flush=True)
    if not arguments.only:
        arguments.output.write_text("\n".join([*INTRODUCTION, *lines]) + "\n")


INTRODUCTION = [
    "# bnext.convert on real networks",
    "",
    "Written by `make matrix`, held by `tests/conversion/test_convert_models.py`. In float64,",
    "with parameters and buffers of the norms spread as in a trained network: the largest",
    "difference of an output in eval, of the losses of three training steps, and of a buffer",
    "after them, relative to the largest value. (The running statistics of pytorch-tabnet's GBN",
    "follow every chunk of a batch, those of bnext the whole batch once, as docs/math.md says.)",
    "",
]


if __name__ == "__main__":
    main()
