"""For serving: folded into the layer before, in ONNX as standard ops, in an AOTInductor package."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnext
from tools import model_matrix


class Residual(nn.Module):
    """bnext's own layers, in a forward of its own."""

    def __init__(self, activation: str | None = "relu") -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.norm1 = bnext.BatchNormAct2d(4, activation="silu")
        self.norm2 = bnext.BatchNormAct2d(4, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


def spread(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model_matrix.spread_statistics(model)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(map(bnext.is_batch_norm, model.modules()))


SHARED = nn.Conv2d(4, 4, 1)

# A network, the shape of its input, and the norms that stay.
FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "residual": (Residual, (2, 4, 5, 6), 0),
    "leaky": (lambda: Residual("leaky_relu"), (2, 4, 5, 6), 0),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), bnext.BatchNormAct1d(4)), (5, 3), 0),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)), (5, 3, 6), 0),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 3, 4, 5), 0),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 2, groups=2), nn.BatchNorm2d(8, affine=False)),
        (2, 4, 5, 6),
        0,
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6), nn.SiLU()),
        (2, 4, 5, 6),
        0,
    ),
    "grouped transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 5, 6),
        1,
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), (2, 4, 5, 6), 1),
    "pooling between": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(2), nn.BatchNorm2d(4)),
        (2, 4, 6, 6),
        1,
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 4, 5, 6),
        1,
    ),
    "shared layer": (
        lambda: nn.Sequential(SHARED, nn.BatchNorm2d(4), SHARED, nn.BatchNorm2d(4)),
        (2, 4, 5, 6),
        2,
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded_layers_compute_the_same(name: str) -> None:
    build, shape, left = FOLDED[name]
    model = spread(build()).double()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    for source in (model, bnext.convert(model)):
        folded = bnext.fold(source)
        assert norms(folded) == left
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_layer_with_hooks_or_tied_weights_stays() -> None:
    hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda m, args, output: output * 2)
    tied = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    tied[2].weight = tied[0].weight
    x = torch.randn(2, 4, 5, 6)
    for model in (hooked, tied):
        folded = bnext.fold(spread(model))
        assert norms(folded) == 1
        torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_folding_is_for_eval() -> None:
    with pytest.raises(ValueError, match="eval"):
        bnext.fold(Residual())
    with pytest.raises(TypeError, match="model must be"):
        bnext.fold(torch.relu)


@pytest.mark.parametrize("of", ["layers", "exported program", "no running statistics"])
def test_onnx_has_standard_ops_only(of: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = spread(nn.Sequential(Residual(), Residual("leaky_relu"), bnext.BatchNorm2d(4)))
    if of == "no running statistics":
        model.append(bnext.BatchNormAct2d(4, track_running_stats=False).eval())
    x = torch.randn(3, 4, 5, 6)
    batch = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    source: Any = model
    if of == "exported program":
        source = torch.export.export(model, (x,), dynamic_shapes=batch)
    program = torch.onnx.export(source, (x,), dynamo=True, dynamic_shapes=batch, verbose=False)
    assert all(node.domain in ("", "ai.onnx") for node in program.model.graph)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for n in (3, 7):
        x = torch.randn(n, 4, 5, 6)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


def test_an_aot_inductor_package_runs(tmp_path: Path) -> None:
    model = spread(bnext.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())))
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        packaged = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(packaged(x), model(x), rtol=1e-5, atol=1e-5)
