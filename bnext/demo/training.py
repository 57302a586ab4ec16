"""Training, evaluation and paired timing."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnext.demo.data import Dataset

_EVAL_BATCH = 8192


@dataclass(frozen=True)
class Batch:
    x: Tensor
    y: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.x.to(dtype), self.y)


@dataclass(frozen=True)
class Snapshot:
    """A model's parameters and buffers just before a training step, and that step's batch."""

    step: int
    state: dict[str, Tensor]
    batch: Batch


@dataclass(frozen=True)
class Score:
    loss: float  # mean cross-entropy, nats
    accuracy: float


@dataclass
class History:
    """What one training run left behind."""

    model: nn.Module
    steps: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)  # held-out, at those steps
    snapshots: list[Snapshot] = field(default_factory=list)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in eval mode; the model is left in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(_EVAL_BATCH)])


def score(model: nn.Module, dataset: Dataset) -> Score:
    """Held-out loss and accuracy."""
    logits = predict(model, dataset.test_x)
    loss = F.cross_entropy(logits, dataset.test_y).item()
    return Score(loss, (logits.argmax(1) == dataset.test_y).double().mean().item())


def constant_score(dataset: Dataset) -> Score:
    """The score of the best constant prediction: the class frequencies of the training set."""
    counts = torch.bincount(dataset.train_y, minlength=dataset.n_classes).double()
    log_frequency = (counts / counts.sum()).log()
    likeliest = int(counts.argmax())
    return Score(
        -log_frequency[dataset.test_y].mean().item(),
        (dataset.test_y == likeliest).double().mean().item(),
    )


def _optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=learning_rate)


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch.x), batch.y).backward()
    optimizer.step()


def n_steps(dataset: Dataset, epochs: int, batch_size: int) -> int:
    return epochs * (len(dataset.train_y) // batch_size)


def train(
    make_model: Callable[[], nn.Module],
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    scores_per_epoch: int = 1,
    snapshot_at: Collection[int] = (),
    on_step: Callable[[], object] = lambda: None,
) -> History:
    """Train with Adam, its learning rate falling linearly to 0. The seed fixes the initial weights
    and the order of the batches: models that differ in their normalisation layers only see the
    same."""
    torch.manual_seed(seed)
    history = History(make_model())
    model = history.model
    optimizer = _optimizer(model, learning_rate)
    total = max(1, n_steps(dataset, epochs, batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(dataset.train_y) // batch_size  # the rest of an epoch is dropped
    score_every = max(1, per_epoch // scores_per_epoch)
    step = 0

    def record() -> None:
        history.steps.append(step)
        history.scores.append(score(model, dataset))

    for _ in range(epochs):
        order = torch.randperm(len(dataset.train_y), generator=generator)
        for index in order[: per_epoch * batch_size].split(batch_size):
            batch = Batch(dataset.train_x[index], dataset.train_y[index])
            if step in snapshot_at:
                state = copy.deepcopy(model.state_dict())
                history.snapshots.append(Snapshot(step, state, batch))
            model.train()
            _train_step(model, optimizer, batch)
            schedule.step()
            step += 1
            if step % score_every == 0:
                record()
            on_step()
    if not history.steps or history.steps[-1] != step:
        record()
    return history


@dataclass(frozen=True)
class PairedTime:
    """Time of a whole training step: forward, loss, backward, optimizer."""

    seconds: float  # median
    ratio: float  # median over pairs of (this model / the baseline run right beside it)


def paired_time(
    model: nn.Module,
    baseline: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int,
    pairs: int,
    on_pair: Callable[[], object] = lambda: None,
) -> PairedTime:
    """Steps of both models in turn, on the same batch, each first in half of the pairs: what else
    the machine is doing hits both alike. Works on copies of the models."""
    models = [copy.deepcopy(model).train(), copy.deepcopy(baseline).train()]
    optimizers = [_optimizer(each, 1e-3) for each in models]
    batch = Batch(dataset.train_x[:batch_size].clone(), dataset.train_y[:batch_size].clone())

    def seconds(which: int) -> float:
        start = time.perf_counter()
        _train_step(models[which], optimizers[which], batch)
        return time.perf_counter() - start

    for which in (0, 1, 0, 1, 0, 1):  # first calls allocate
        seconds(which)
    times, ratios = [], []
    for pair in range(pairs):
        if pair % 2:
            other = seconds(1)
            own = seconds(0)
        else:
            own = seconds(0)
            other = seconds(1)
        times.append(own)
        ratios.append(own / other)
        on_pair()
    return PairedTime(statistics.median(times), statistics.median(ratios))
