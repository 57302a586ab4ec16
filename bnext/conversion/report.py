"""What ``bnext.convert`` did with every batch norm of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["fused", "swapped", "left"]


@dataclass(frozen=True)
class Entry:
    """One batch norm of the model.

    Attributes:
        name: as in ``named_modules()``.
        action: "fused": it computes the activation or addition after it too, where it is called;
            "swapped": replaced alone; "left" as it was.
        activation: of a fused one; None if it only adds a residual.
        residual: whether a fused one adds a residual before the activation.
        reason: why it was only swapped, or left.
    """

    name: str
    action: Action
    activation: str | None = None
    residual: bool = False
    reason: str = ""

    @property
    def detail(self) -> str:
        """What is fused, or why nothing is."""
        if self.action != "fused":
            return self.reason
        parts = ["+ residual"] * self.residual + [self.activation] * (self.activation is not None)
        return ", ".join(map(str, parts))

    def __str__(self) -> str:
        return f"{self.action:8} {self.name or '(the model)'}: {self.detail}"


@dataclass(frozen=True)
class ConversionReport:
    """Entries of all batch norms, in the model's order; prints one a line below a summary."""

    entries: list[Entry] = field(default_factory=list)

    def of(self, action: Action) -> list[Entry]:
        return [entry for entry in self.entries if entry.action == action]

    @property
    def fused(self) -> list[Entry]:
        return self.of("fused")

    @property
    def swapped(self) -> list[Entry]:
        return self.of("swapped")

    @property
    def left(self) -> list[Entry]:
        return self.of("left")

    def summary(self) -> str:
        residuals = sum(entry.residual for entry in self.fused)
        return (
            f"{len(self.entries)} batch norms: {len(self.fused)} fused with what follows "
            f"({residuals} with a residual), {len(self.swapped)} swapped, {len(self.left)} left"
        )

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        return "\n".join([self.summary(), *map(str, self.entries)])
