"""Converted models in what their users already run: autocast, GradScaler, EMA and SWA, functional
calls, threads and processes, torch's fusers, Lightning, skorch, Opacus-like scans."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bnext


class Network(nn.Module):
    """A residual block with all that is fused, between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.tail = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.norm(self.conv(x)) + x)
        return self.head(self.tail(x).mean((2, 3)))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Network()


def converted() -> nn.Module:
    model = bnext.convert(plain())
    assert len(bnext.conversion_report(model).fused) == 2
    return model


def images(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(8) % 4


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), LABELS[: len(x)])


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    results = []
    for model in (converted(), plain()):
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, images())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    # Both round to 8 (bfloat16) or 11 bits, at other places.
    assert_close(*results, tolerance=0.1 if dtype == torch.bfloat16 else 0.02)


def test_grad_scaler_and_a_batch_that_overflows() -> None:
    model = bnext.skip_nonfinite(converted())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step(images())
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    step(images() * 1e6)  # beyond float16
    kept = {id(b) for b in (m.nonfinite_batches for m in model.modules() if bnext.is_batch_norm(m))}
    after = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in kept]
    for tensor in after:
        assert tensor.isfinite().all()
    assert sum(int(m.nonfinite_batches) for m in model.modules() if bnext.is_batch_norm(m)) == 3
    assert scaler.get_scale() == 2.0**9
    assert_close(after, [t for t in before if t.dim() or t.dtype != torch.long or int(t)], 0)
    step(images())
    assert all(p.isfinite().all() for p in model.parameters())


# --- copies and functional calls


def test_functional_call() -> None:
    model = converted()
    state = {k: v.clone() for k, v in plain().state_dict().items()}
    output = torch.func.functional_call(model, state, (images(),))
    reference = plain()
    torch.testing.assert_close(output, reference(images()), rtol=1e-4, atol=1e-5)
    # The state that was handed in is updated, the model's own is not.
    torch.testing.assert_close(state["norm.running_mean"], reference.norm.running_mean)
    assert not model.norm.running_mean.any()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_copies_and_update_bn(average: object) -> None:
    results = []
    for model in (converted(), plain()):
        averaged = AveragedModel(model, multi_avg_fn=average)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(model, images(seed=seed)).backward()
            optimizer.step()
            averaged.update_parameters(model)
        bnext.update_bn([images(seed=s) for s in range(2)], averaged)
        results.append([averaged.eval()(images(seed=9)), *averaged.module.buffers()])
        assert {m.momentum for m in averaged.modules() if bnext.is_batch_norm(m)} == {0.1}
    assert_close(*results)


def test_torchs_update_bn() -> None:
    """Takes converted norms, and passes layers by that have an activation: these are no
    ``_BatchNorm``, or tools that replace those would drop it."""
    model = converted()
    model.own = bnext.BatchNormAct2d(8)
    model.stem.append(model.own)
    model(images())
    for update, own in ((update_bn, 2), (bnext.update_bn, 1)):
        update([images()], model)
        norms = (model.tail, model.norm, model.own)
        assert [int(m.num_batches_tracked) for m in norms] == [1, 1, own]


# --- threads and processes


def test_replicas_in_threads() -> None:
    """As DataParallel runs them: shared parameters, buffers of their own."""
    model = converted().double()
    replicas = [copy.deepcopy(model) for _ in range(4)]
    outputs: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(5):
            outputs[i] = replicas[i](images(seed=i).double())
            outputs[i].sum().backward()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, copy.deepcopy(model)(images(seed=i).double()))


def _evaluate(model: bytes, results: multiprocessing.Queue[bytes]) -> None:
    output = pickle.loads(model).eval()(images())
    results.put(pickle.dumps(output.detach().numpy()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(method: str) -> None:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    model = converted().eval()
    if method == "fork":
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=_evaluate, args=(pickle.dumps(model), results))
        child.start()
    found = torch.from_numpy(pickle.loads(results.get(timeout=120)))
    child.join()
    torch.testing.assert_close(found, model(images()), rtol=1e-5, atol=1e-5)


# --- tools that look for batch norms


def test_torch_fusers_take_plain_norms_and_refuse_fused_ones() -> None:
    from torch.ao.quantization import fuse_modules
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = bnext.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh())).eval()
    fused = fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(images()).tanh(), model(images()), rtol=1e-4, atol=1e-5)

    act = bnext.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    with pytest.raises((NotImplementedError, AssertionError, KeyError)):
        fuse_modules(act, [["0", "1"]])
    reverted = fuse_modules(bnext.revert(act), [["0", "1", "2"]])
    torch.testing.assert_close(reverted(images()), act(images()), rtol=1e-4, atol=1e-5)


def test_scans_by_isinstance() -> None:
    """As Opacus' validator, precise_bn and others do: a converted norm is torch's too."""
    model = converted()
    found = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert found == ["stem.1", "norm", "tail"]
    assert found == [n for n, m in model.named_modules() if bnext.is_batch_norm(m)]


# --- training loops of others


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(bnext.param_groups(self.model, 1e-4), lr=0.1)

    data = torch.utils.data.TensorDataset(images(16), torch.cat([LABELS, LABELS]))
    results = []
    for model in (converted(), plain()):
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Module(model), torch.utils.data.DataLoader(data, batch_size=8))
        results.append([*model.parameters(), *model.buffers()])
    assert_close(*results, tolerance=1e-3)


def test_skorch() -> None:
    skorch = pytest.importorskip("skorch")
    results = []
    for model in (converted(), plain()):
        net = skorch.NeuralNetClassifier(
            model, criterion=nn.CrossEntropyLoss, max_epochs=2, lr=0.1, batch_size=8, verbose=0,
            train_split=None, iterator_train__shuffle=False,
        )  # fmt: skip
        net.fit(images(16).numpy(), torch.cat([LABELS, LABELS]).numpy())
        results.append([torch.from_numpy(net.predict_proba(images(4).numpy()))])
    assert_close(*results, tolerance=1e-3)


# --- compilers


def test_a_whole_network_compiles_into_one_graph() -> None:
    models = pytest.importorskip("torchvision").models
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = bnext.convert(models.resnet18(num_classes=4))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 32, 32)
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole(training: bool) -> None:
    torch._dynamo.reset()
    results = []
    for model in (torch.compile(converted().train(training), fullgraph=True), plain()):
        model.train(training)
        loss = loss_of(model, images())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    assert_close(*results, tolerance=1e-3)
