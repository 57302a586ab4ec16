"""bnext.convert: which norms are fused, with what; that nothing else of a model changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convert_cases import (
    ODD,
    Branching,
    ConvNorm,
    Counting,
    ListOrTensor,
    Methods,
    Noisy,
    OptionalPlaces,
    OptionalSkip,
    Reaching,
    Registers,
    Shared,
    ThroughSubmodules,
    TwoNorms,
    block,
    small,
)
from convert_forwards import FOLLOWED
from convert_not_fused import WITHOUT_GRAD
from torch import Tensor, nn

import bnext
from bnext import conversion_report, convert, revert


def steps(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Outputs, gradients and buffers over two training steps and in eval."""
    found = []
    model.train()
    for _ in range(2):
        xs = [x.clone().requires_grad_() for x in inputs]
        model.zero_grad()
        output = model(*xs)
        (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
        found += [output, *(x.grad for x in xs)]
        found += [p.grad for p in model.parameters() if p.grad is not None]
        found += [b.clone() for b in model.buffers()]
    model.eval()
    return [t.detach() for t in (*found, model(*inputs))]


def assert_same_function(converted: nn.Module, plain: nn.Module, *inputs: Tensor) -> None:
    for found, expected in zip(steps(converted, *inputs), steps(plain, *inputs), strict=True):
        assert found.dtype == expected.dtype
        # float64 and few operations: only the order of summation differs.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_a_norm(name: str) -> None:
    plain = block(name).double()
    converted = convert(plain)
    (entry,) = conversion_report(converted)
    expected = FOLLOWED[name][1]
    if expected is None:
        assert (entry.action, bool(entry.reason)) == ("swapped", True)
    else:
        assert (entry.action, entry.activation, entry.residual) == ("fused", *expected)
    x = torch.randn(5, 4, 6, 7, dtype=torch.float64)
    if name not in WITHOUT_GRAD:
        assert_same_function(converted, plain, x)
    with torch.no_grad():
        for mode in (True, False):
            found, expected = (m.train(mode)(x.clone()) for m in (converted, plain))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_nothing_else_changes() -> None:
    plain = small()
    before = copy.deepcopy(plain)
    converted = convert(plain, inplace=True)
    assert converted is plain
    assert [e.action for e in conversion_report(converted)] == ["fused", "fused", "swapped"]
    assert list(converted.state_dict()) == list(before.state_dict())
    assert [n for n, _ in converted.named_modules()] == [n for n, _ in before.named_modules()]
    for (_, new), (name, old) in zip(
        converted.named_modules(), before.named_modules(), strict=True
    ):
        if bnext.is_batch_norm(old):
            for attribute in ("eps", "momentum", "affine", "track_running_stats", "num_features"):
                assert getattr(new, attribute) == getattr(old, attribute), name
        assert isinstance(new, type(old)), name
        assert new.training == old.training, name
    for new, old in zip(converted.parameters(), before.parameters(), strict=True):
        assert new.requires_grad == old.requires_grad


def test_parameters_stay_the_same_objects_in_place_only() -> None:
    plain = small()
    ids = [id(p) for p in plain.parameters()]
    kinds = [type(m) for m in plain.modules()]
    converted = convert(plain)
    assert [type(m) for m in plain.modules()] == kinds
    assert not {id(p) for p in converted.parameters()} & {*ids}
    assert [id(p) for p in convert(plain, inplace=True).parameters()] == ids


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: revert(m),
        lambda m: convert(revert(m)),
        lambda m: convert(m),
    ],
    ids=["deepcopy", "pickle", "revert", "convert again", "convert twice"],
)
def test_copies_compute_the_same(through: Callable[[nn.Module], nn.Module]) -> None:
    plain = small().double()
    assert_same_function(through(convert(plain)), plain, images())


def test_revert_gives_the_plain_model_back() -> None:
    plain = small()
    back = revert(convert(plain, ghost_batch_size=2))
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    for new, old in zip(back.modules(), plain.modules(), strict=True):
        assert vars(new).keys() == vars(old).keys()
    assert str(back) == str(plain)


def test_checkpoints_load_both_ways() -> None:
    plain, other = small(0), small(1)
    converted = convert(small(2))
    converted.load_state_dict(plain.state_dict())
    other.load_state_dict(converted.state_dict())
    for found, expected in zip(
        other.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected)


def test_ghost_batch_size_is_that_of_every_norm() -> None:
    converted = convert(small(), ghost_batch_size=2)
    norms = [m for m in converted.modules() if bnext.is_batch_norm(m)]
    assert [m.ghost_batch_size for m in norms] == [2, 2, 2]


def test_layers_that_are_bnexts_keep_their_ghosts() -> None:
    model = nn.Sequential(bnext.BatchNorm2d(4, ghost_batch_size=2), nn.ReLU())
    converted = convert(model)
    assert type(converted[0]) is bnext.BatchNorm2d
    assert converted[0].ghost_batch_size == 2
    assert convert(converted, ghost_batch_size=3)[0].ghost_batch_size == 3


@pytest.mark.parametrize("dims", [1, 3])
def test_other_ranks(dims: int) -> None:
    torch.manual_seed(0)
    plain = block("sum_in_place", dims).double()
    converted = convert(plain)
    assert len(conversion_report(converted).fused) == 1
    assert_same_function(converted, plain, torch.randn(3, 4, *[5] * dims, dtype=torch.float64))


def test_memory_format_and_dtype() -> None:
    converted = convert(small().to(memory_format=torch.channels_last).bfloat16())
    x = images(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    output = converted(x)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert converted[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_sum_that_promotes() -> None:
    plain = block("promotion")
    converted = convert(plain)
    x = torch.randn(5, 4, 6, 7)
    assert converted(x).dtype == plain(x).dtype == torch.float64
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [Shared, Reaching, Counting, Noisy, Methods, Branching, ThroughSubmodules, ConvNorm],
)
def test_other_containers(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = kind().double()
    converted = convert(plain)
    shape = (8, 4, 5) if kind in (ThroughSubmodules, ConvNorm) else (8, 4)
    x = torch.randn(shape, dtype=torch.float64)
    for mode in (True, False):
        torch.manual_seed(1)
        expected = plain.train(mode)(x.clone())
        torch.manual_seed(1)
        torch.testing.assert_close(converted.train(mode)(x.clone()), expected, rtol=1e-9, atol=1e-9)
    assert not hasattr(converted, "calls") or converted.calls == plain.calls == 2
    fused = len(conversion_report(converted).fused)
    assert fused == (0 if kind is ConvNorm else 4 if kind is ThroughSubmodules else 1)


@pytest.mark.parametrize("kind", ODD)
def test_what_a_trace_would_not_see(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = kind().double()
    before = list(Registers.made)
    converted = convert(plain)
    assert Registers.made == before
    x = torch.randn(8, 4, dtype=torch.float64)
    for model in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        reference = copy.deepcopy(plain)
        for mode in (True, False):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    expected = reference.train(mode)(x.clone())
                    found = model.train(mode)(x.clone())
                assert type(found) is type(expected)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
                first = next(iter(found.values())) if isinstance(found, dict) else found
                other = next(iter(expected.values())) if isinstance(found, dict) else expected
                assert first.requires_grad == other.requires_grad
        for new, old in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)
        assert [type(t) for t in model.kept] == [type(t) for t in reference.kept]
    assert conversion_report(converted).fused or kind.__name__ in ("Aliased", "AsksForClass")


def test_a_pair_whatever_the_input_is() -> None:
    plain = ListOrTensor().double()
    converted = convert(plain)
    assert len(conversion_report(converted).fused) == 1
    x = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(converted(x), plain(x))
    torch.testing.assert_close(converted([x[:, :2], x[:, 2:]]), plain([x[:, :2], x[:, 2:]]))


@pytest.mark.parametrize(("kind", "residuals"), [(OptionalSkip, 1), (OptionalPlaces, 1)])
def test_arguments_that_may_be_none(kind: type[nn.Module], residuals: int) -> None:
    plain = kind().double()
    converted = convert(plain)
    fused = conversion_report(converted).fused
    assert len(fused) == sum(map(bnext.is_batch_norm, plain.modules()))
    assert sum(entry.residual for entry in fused) == residuals
    x, skip = (torch.randn(8, 4, dtype=torch.float64) for _ in range(2))
    pickled = pickle.loads(pickle.dumps(converted))
    for model in (converted, pickled, torch.compile(converted, backend="eager")):
        for kwargs in ({}, {"skip": skip}, {"skip": None}):
            torch.testing.assert_close(model(x, **kwargs), plain(x, **kwargs), rtol=1e-9, atol=1e-9)
    if kind is OptionalPlaces:
        expected = plain(x, skip, scale=None)
        torch.testing.assert_close(converted(x, skip, scale=None), expected, rtol=1e-9, atol=1e-9)


def test_a_sum_of_two_norms() -> None:
    plain = TwoNorms().double()
    converted = convert(plain)
    assert [e.action for e in conversion_report(converted)] == ["fused", "swapped"]
    assert_same_function(converted, plain, torch.randn(8, 4, dtype=torch.float64))


@pytest.mark.parametrize("which", ["bn", "relu"])
def test_hooks_see_what_they_saw(which: str) -> None:
    plain = block("module")
    assert conversion_report(convert(plain)).fused
    seen: list[Tensor] = []
    plain.get_submodule(which).register_forward_hook(lambda m, args, output: seen.append(output))
    converted = convert(plain)
    assert "hooks" in conversion_report(converted).swapped[0].reason
    x = torch.randn(2, 4, 3, 3)
    plain(x), converted(x)
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("which", ["bn", "relu"])
def test_hooks_of_later_see_what_they_would(which: str) -> None:
    plain = block("module")
    converted = convert(plain)
    seen: list[Tensor] = []
    for model in (plain, converted):
        hooked = model.get_submodule(which)
        hooked.register_forward_hook(lambda m, args, output: seen.append(output))
    x = torch.randn(2, 4, 3, 3)
    plain(x), converted(x)
    torch.testing.assert_close(seen[1], seen[0])


def test_modules_that_are_replaced_later() -> None:
    plain = block("sum_in_place").double()
    converted = convert(plain)
    for model in (plain, converted):
        model.relu = nn.Tanh()
    assert_same_function(converted, plain, images()[:, :1].expand(-1, 4, -1, -1))
    for model in (plain, converted):
        model.bn = nn.Identity()
    assert_same_function(converted, plain, images()[:, :1].expand(-1, 4, -1, -1))


def test_a_norm_alone_computes_what_it_did() -> None:
    """Whoever calls the parts of a model gets what they were."""
    plain = small().double()
    converted = convert(plain)
    x = images()
    for part, expected in zip(converted[0], plain[0], strict=True):
        torch.testing.assert_close(part(x), expected(x), rtol=1e-9, atol=1e-9)
        x = expected(x)


def test_what_is_left_and_why() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    norms = [Own(4), nn.LazyBatchNorm1d(), bnext.BatchNormAct1d(4)]
    norms.append(torch.nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(4)))
    model = nn.Sequential(*norms)
    kinds = [type(m) for m in model]
    converted = convert(model, inplace=True)
    assert [e.action for e in conversion_report(converted)] == ["left"] * 4
    assert all(e.reason for e in conversion_report(converted))
    assert [type(m) for m in converted] == kinds


@pytest.mark.parametrize("name", ["module", "sum_in_place"])
def test_a_graph_of_fx(name: str) -> None:
    """Its copies are made from the graph, without the edits."""
    plain = torch.fx.symbolic_trace(block(name)).double()
    converted = convert(plain)
    assert [e.action for e in conversion_report(converted)] == ["fused"]
    x = images()[:, :1].expand(-1, 4, -1, -1)
    for same in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert_same_function(same, copy.deepcopy(plain), x)


def test_synchronised_norms() -> None:
    plain = nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU())
    converted = convert(plain)
    assert isinstance(converted[0], bnext.BatchNorm2d) and isinstance(
        converted[0], nn.SyncBatchNorm
    )
    assert converted[0].process_group == "default"
    assert len(conversion_report(converted).fused) == 1
    for shape in ((8, 3), (8, 3, 5), (8, 3, 2, 2), (8, 3, 2, 2, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(converted(x), plain(x))
    back = revert(converted)
    assert type(back[0]) is nn.SyncBatchNorm and back[0].process_group is None
    assert vars(back[0]).keys() == vars(plain[0]).keys()


def test_tensors_that_see_what_is_done_with_them() -> None:
    class Logged(torch.Tensor):
        seen: list[str] = []

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    converted = convert(block("sum_first"))
    converted(torch.randn(2, 4, 3, 3).as_subclass(Logged))
    assert "relu" in Logged.seen and "add" in Logged.seen


def test_wrappers_are_not_followed() -> None:
    model = nn.DataParallel(small().double())
    converted = convert(model)
    assert len(conversion_report(converted).fused) == 2
    torch.testing.assert_close(converted(images()), model(images()), rtol=1e-9, atol=1e-9)


def test_a_norm_alone() -> None:
    converted = convert(nn.BatchNorm2d(3))
    assert type(converted) is bnext.BatchNorm2d
    assert type(revert(converted)) is nn.BatchNorm2d


def test_compiled_without_a_graph_break() -> None:
    converted = convert(small().double())
    expected = copy.deepcopy(converted)(images())
    output = torch.compile(converted, fullgraph=True, backend="aot_eager")(images())
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
