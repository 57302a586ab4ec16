"""Tools of others see bnext's layers as they see torch's: graphs, hooks, scripts, scans."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from convert_cases import OptionalSkip, ThroughSubmodules, small
from torch import Tensor, fx, nn

import bnext


def network(act: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = bnext.BatchNormAct2d(4) if act else bnext.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm)


def trained() -> nn.Module:
    """A network as others write it, with statistics of its own."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        resnet.BasicBlock(8, 8),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU()),
    )
    model(images() + 1)
    return model


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 3


@pytest.mark.parametrize("act", [False, True])
def test_a_traced_graph_follows_the_module(act: bool) -> None:
    model = network(act)
    graph = fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes].count("call_module") == 2
    for setting in ("train", "eval", "momentum", "ghosts", "frozen"):
        if setting in ("train", "eval"):
            model.train(setting == "train"), graph.train(setting == "train")
        else:
            model.train(), graph.train()
        if setting == "momentum":
            model[1].momentum = None
        elif setting == "ghosts":
            model[1].ghost_batch_size = 2
        elif setting == "frozen":
            bnext.freeze(model)
        reference = copy.deepcopy(model)
        assert torch.equal(graph(images()), reference(images())), setting
        assert torch.equal(graph.get_submodule("1").running_var, reference[1].running_var)


def test_a_residual_in_a_traced_graph() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bnext.BatchNormAct2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x * 2, x)

    model = Residual().eval()
    assert torch.equal(fx.symbolic_trace(model)(images()), model(images()))


@pytest.mark.parametrize("make", [small, OptionalSkip, ThroughSubmodules])
def test_a_converted_network_is_traced_as_the_plain_one(make: Any) -> None:
    plain = make().eval()
    converted = bnext.convert(plain)
    found, expected = fx.symbolic_trace(converted), fx.symbolic_trace(plain)
    assert [str(n.target) for n in found.graph.nodes] == [
        str(n.target) for n in expected.graph.nodes
    ]
    assert not any(isinstance(v, fx.Proxy) for m in converted.modules() for v in vars(m).values())


@pytest.mark.parametrize("node", ["layer2", "layer1.0.relu", "layer1.0.bn2"])
def test_feature_extractors(node: str) -> None:
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain = models.resnet18().eval()
    extractors = [
        extraction.create_feature_extractor(m, {node: "out"}) for m in (plain, bnext.convert(plain))
    ]
    outputs = [extract(images(2))["out"] for extract in extractors]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_timm_features() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", features_only=True).eval()
    converted = bnext.convert(plain)
    for found, expected in zip(converted(images(2)), plain(images(2)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grad_cam_on_any_module() -> None:
    """Activations and their gradients by hooks, on the norm, the activation and the block."""
    plain = small().double()
    for name in ("0.0", "0.1", "0.2", "1.conv", "1.relu", "1"):
        seen = []
        for model in (copy.deepcopy(plain), bnext.convert(plain)):
            kept: list[Tensor] = []
            hooked = model.get_submodule(name)
            hooked.register_forward_hook(lambda m, args, output, kept=kept: kept.append(output))
            hooked.register_full_backward_hook(lambda m, i, o, kept=kept: kept.append(o[0]))
            model(images().double()).square().sum().backward()
            seen.append(kept)
        for found, expected in zip(*seen, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_loops_over_modules_select_by_class() -> None:
    """`norm_eval` of detection frameworks, precise_bn, freezing by class."""
    converted = bnext.convert(small())
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 3
    for norm in norms:
        norm.eval()
    before = [norm.running_mean.clone() for norm in norms]
    converted(images(4))
    assert all(torch.equal(n.running_mean, b) for n, b in zip(norms, before, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_torch_jit_script(training: bool) -> None:
    plain = small().train(training)
    converted = bnext.convert(plain)
    with pytest.warns((DeprecationWarning, FutureWarning)):
        scripted = torch.jit.script(copy.deepcopy(converted))
    torch.testing.assert_close(scripted(images(4)), plain(images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        bnext.BatchNormAct2d(4),
        bnext.BatchNorm2d(4, ghost_batch_size=2),
        bnext.freeze(bnext.BatchNorm2d(4)),
    ],
)
def test_torch_jit_script_says_the_way_out(layer: nn.Module) -> None:
    with (
        pytest.warns((DeprecationWarning, FutureWarning)),
        pytest.raises(RuntimeError, match="torch.compile or torch.export, or script bnext.revert"),
    ):
        torch.jit.script(layer)


def test_tools_that_replace_modules() -> None:
    """torch.ao knows its own classes alone; convert_sync_batchnorm takes subclasses too."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    converted = bnext.convert(plain)
    names = [["0", "1", "2"]]
    with pytest.raises(AssertionError, match="BatchNorm2d"):
        torch.ao.quantization.fuse_modules(converted, names)
    fused = torch.ao.quantization.fuse_modules(bnext.revert(converted), names)
    torch.testing.assert_close(fused(images()), plain(images()), rtol=1e-4, atol=1e-5)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(converted))
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    torch.testing.assert_close(synchronised(images()), plain(images()), rtol=1e-4, atol=1e-5)


def test_a_program_exported_in_training_moves_to_eval() -> None:
    """torchao rewrites torch's operator; it would pass one of bnext's by."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    x = images()
    for model in (bnext.convert(trained()), network(), network(act=True)):
        model(x + 1)
        program = torch.export.export(copy.deepcopy(model), (x,)).module()
        program(x)
        model(x)
        pt2e.move_exported_model_to_eval(program)
        torch.testing.assert_close(program(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_opacus_finds_and_replaces_batch_norms() -> None:
    validators = pytest.importorskip("opacus.validators")
    engine = pytest.importorskip("opacus").PrivacyEngine()
    validator = validators.ModuleValidator
    plain = trained()
    converted = bnext.convert(plain)
    assert len(validator.validate(converted)) == len(validator.validate(plain)) == 4
    assert len(validator.validate(network(act=True))) == 1
    fixed, expected = validator.fix(converted), validator.fix(plain)
    assert not any(bnext.is_batch_norm(m) for m in fixed.modules())
    fixed.load_state_dict(expected.state_dict())
    torch.testing.assert_close(fixed(images()), expected(images()))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images()))
    with pytest.raises(validators.errors.UnsupportedModuleError, match="BatchNorm"):
        engine.make_private(
            module=converted,
            optimizer=torch.optim.SGD(converted.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_torch_pruning_cuts_the_same_channels() -> None:
    pruning = pytest.importorskip("torch_pruning")
    plain = trained().eval()
    outputs = []
    for model in (copy.deepcopy(plain), bnext.convert(plain)):
        pruner = pruning.pruner.MagnitudePruner(
            model, images(), pruning.importance.MagnitudeImportance(), pruning_ratio=0.5
        )
        pruner.step()
        outputs.append(model(images()))
    assert model.get_submodule("0.1").num_features < plain.get_submodule("0.1").num_features
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_fvcores_precise_bn() -> None:
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    plain = trained()
    models = [copy.deepcopy(plain), bnext.convert(plain)]
    for model in models:
        assert len(precise_bn.get_bn_modules(model)) == 4
        precise_bn.update_bn_stats(model, [images(), images() + 1, images(4)], 3)
    for a, b in zip(*(m.buffers() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_lightnings_averaging_and_freezing() -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    converted = bnext.convert(trained())
    assert callbacks.StochasticWeightAveraging(1e-3).pl_module_contains_batch_norm(converted)
    callbacks.BackboneFinetuning.freeze(converted, train_bn=True)
    assert all(m.weight.requires_grad for m in converted.modules() if bnext.is_batch_norm(m))
    callbacks.BackboneFinetuning.freeze(converted, train_bn=False)
    assert not any(p.requires_grad for p in converted.parameters())
    assert not any(m.track_running_stats for m in converted.modules() if bnext.is_batch_norm(m))
