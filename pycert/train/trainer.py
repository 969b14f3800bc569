"""A short trainer: clean warm-up, growing eps with interval bounds, then a share of CROWN-IBP."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pycert
from pycert._progress import progress_bar
from pycert.train.loss import mixed_margins, worst_case_loss
from pycert.train.schedules import Ramp


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run beside the network and the data.

    Attributes:
        eps: radius at the end of the ramp, in units of the input.
        p, clip: norm of the ball, and the valid range of an input (None: no limits).
        method: bounds after the interval phase: ``"crown-ibp"`` (or ``"ibp"`` to stay with intervals).
        epochs: in total; ``warmup_epochs`` of clean training, then ``ramp_epochs`` in which eps grows, and
            from epoch ``mix_start`` on ``mix_epochs`` in which the share of ``method`` changes.
        kappa: share of the clean loss, (at the start of the ramp, at its end).
        beta: share of ``method`` in the margins, the rest is intervals: (before ``mix_start``, after the
            change).
        batch_size, learning_rate: of Adam; the rate falls by 5 at each of ``milestones`` (parts of
            ``epochs``).
        l1: weight of the sum of absolute weights; ``clip_gradient`` limits the gradient's L2 norm.
        seed: of the order of the samples.

    The loss of one batch is ``kappa * CE(clean) + (1 - kappa) * CE(worst case)`` (Zhang et al., ICLR 2020).
    """

    eps: float
    p: float = float("inf")
    clip: tuple[float, float] | None = (0.0, 1.0)
    method: str = "crown-ibp"
    epochs: int = 60
    warmup_epochs: int = 1
    ramp_epochs: int = 24
    mix_start: int = 6
    mix_epochs: int = 24
    kappa: tuple[float, float] = (1.0, 0.3)
    beta: tuple[float, float] = (0.0, 0.9)
    batch_size: int = 64
    learning_rate: float = 2e-3
    milestones: tuple[float, ...] = (0.75, 0.9)
    l1: float = 0.0
    clip_gradient: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"Recipe: epochs and batch_size must be >= 1, got {self.epochs} and {self.batch_size}"
            )
        phases = (self.warmup_epochs, self.ramp_epochs, self.mix_start, self.mix_epochs)
        if min(phases) < 0:
            raise ValueError(f"Recipe: warmup, ramp and mix epochs must be >= 0, got {phases}")
        if self.warmup_epochs + self.ramp_epochs > self.epochs:
            raise ValueError(
                f"Recipe: warmup_epochs + ramp_epochs must not exceed epochs, got {self.warmup_epochs} + "
                f"{self.ramp_epochs} > {self.epochs}"
            )
        if not self.eps >= 0:
            raise ValueError(f"Recipe: eps must be >= 0, got {self.eps}")


def train(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    recipe: Recipe,
    *,
    checkpoint: str | Path | None = None,
    history: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train ``net`` in place so that its robustness can be certified.

    Args:
        net: a classifier of supported layers; a :class:`pycert.BoundedModule` of it is made here.
        data: ``(x, y)``: inputs ``[N, *in]`` and int64 classes ``[N]``.
        recipe: see :class:`Recipe`.
        checkpoint: a file written after every epoch; where it exists, training goes on from it. It loads with
            ``torch.load(..., weights_only=True)``, so it can hold no code.
        history: a file of JSON lines, one per epoch, written as they come.
        progress: show a progress bar on standard error.

    Returns:
        One dict per epoch: ``epoch, eps, kappa, beta, loss, clean, certified, seconds``; the accuracies are
        running averages over the batches of the epoch, ``certified`` at that epoch's eps and with the bounds
        trained on.

    Raises:
        ValueError: shapes that do not fit, or a checkpoint of another recipe.
        FloatingPointError: the loss is no longer finite.
    """
    x, y = data
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"train: y must have shape [{len(x)}] with at least one sample, got {list(y.shape)}")
    run = _Run(net, data, recipe)
    rows = run.load(Path(checkpoint)) if checkpoint is not None and Path(checkpoint).exists() else []
    if history is not None:
        Path(history).write_text("".join(json.dumps(row) + "\n" for row in rows))
    was_training = net.training
    net.train()
    bar = progress_bar(
        recipe.epochs * run.batches,
        initial=len(rows) * run.batches,
        description="training",
        unit="batch",
        show=progress,
    )
    try:
        for epoch in range(len(rows), recipe.epochs):
            rows.append(run.epoch(epoch, bar))
            if history is not None:
                with open(history, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if checkpoint is not None:
                run.save(Path(checkpoint), rows)
    finally:
        bar.close()
        net.train(was_training)
    return rows


class _Run:
    """A network in training: what one epoch needs, and what a checkpoint holds."""

    def __init__(self, net: nn.Module, data: tuple[Tensor, Tensor], recipe: Recipe) -> None:
        self.net, self.recipe = net, recipe
        self.x, self.y = data
        self.bounded = pycert.BoundedModule(net, self.x[:1])
        self.batches = -(-len(self.x) // recipe.batch_size)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
        self.order = torch.Generator().manual_seed(recipe.seed)
        begin, end = recipe.warmup_epochs, recipe.warmup_epochs + recipe.ramp_epochs
        mix = recipe.mix_start, recipe.mix_start + recipe.mix_epochs
        self.eps = Ramp(begin, end, 0.0, recipe.eps, kind="smooth")
        self.kappa = Ramp(begin, end, recipe.kappa[0], recipe.kappa[1])
        self.beta = Ramp(mix[0], mix[1], recipe.beta[0], recipe.beta[1])

    def epoch(self, epoch: int, bar: Any) -> dict[str, Any]:
        """One pass over the data; returns its row of the history."""
        started, recipe = time.perf_counter(), self.recipe
        falls = sum(epoch >= part * recipe.epochs for part in recipe.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.2**falls
        samples, total, clean, certified = len(self.x), 0.0, 0, 0
        indices = torch.randperm(samples, generator=self.order).split(recipe.batch_size)
        for number, index in enumerate(indices, start=1):
            now = epoch + number / self.batches
            loss, right, proved = self._step(self.x[index], self.y[index], now)
            total += loss * len(index)
            clean += right
            certified += proved
            bar.update()
        row = {
            "epoch": epoch,
            "eps": self.eps(epoch + 1),
            "kappa": self.kappa(epoch + 1),
            "beta": self.beta(epoch + 1),
            "loss": total / samples,
            "clean": clean / samples,
            "certified": certified / samples,
            "seconds": time.perf_counter() - started,
        }
        bar.set_postfix_str(
            f"eps {row['eps']:.3f}, clean {row['clean']:.1%}, certified {row['certified']:.1%}"
        )
        return row

    def _step(self, x: Tensor, y: Tensor, now: float) -> tuple[float, int, int]:
        """One step of the optimizer; returns the loss and how many samples are right, and certified."""
        eps, kappa, recipe = self.eps(now), self.kappa(now), self.recipe
        outputs = self.net(x)
        right, proved = outputs.argmax(1) == y, 0
        loss = kappa * functional.cross_entropy(outputs, y)
        if eps > 0:
            region = pycert.LpBall(x, eps=eps, p=recipe.p, clip=recipe.clip)
            margins = mixed_margins(self.bounded, region, y, recipe.method, self.beta(now))
            loss = loss + (1 - kappa) * worst_case_loss(margins)
            proved = int((right & (margins > 0).all(1)).sum())
        if recipe.l1 > 0:
            loss = loss + recipe.l1 * sum(p.abs().sum() for p in self.net.parameters() if p.dim() > 1)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip_gradient)
        if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
            raise FloatingPointError(
                f"train: loss or gradient is not finite in epoch {int(now)} (eps {eps:.4g})"
            )
        self.optimizer.step()
        return float(loss.detach()), int(right.sum()), proved

    def save(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Write to a new file and rename it, so that an interruption never leaves half a checkpoint."""
        content = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "recipe": dataclasses.asdict(self.recipe),
            "rows": rows,
        }
        temporary = path.with_name(path.name + ".new")
        torch.save(content, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> list[dict[str, Any]]:
        """Take over a checkpoint; returns the history so far."""
        content = torch.load(path, weights_only=True, map_location="cpu")
        wanted, found = dataclasses.asdict(self.recipe), content["recipe"]
        if found != wanted:
            changed = [
                f"{key} {found.get(key)} -> {wanted[key]}" for key in wanted if found.get(key) != wanted[key]
            ]
            raise ValueError(f"train: checkpoint {path} belongs to another recipe ({', '.join(changed)})")
        self.net.load_state_dict(content["net"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.order.set_state(content["order"])
        rows: list[dict[str, Any]] = content["rows"]
        return rows
