"""Schedules of the training radius, with the options of auto_LiRPA's strings, as ``"start=3,length=60"``.

Epochs count from 1; a radius ramps from 0 to ``max_eps``.
"""

from __future__ import annotations

import math

from pycert.compat.auto_LiRPA.utils import logger


class BaseScheduler:
    """What all schedules have: options, the present radius, and counters of epochs and batches."""

    def __init__(self, max_eps: float, opt_str: str = "") -> None:
        self.parse_opts(opt_str)
        self.max_eps, self.eps = max_eps, 0.0
        self.loss = self.prev_loss = self.epoch_length = math.nan
        self.epoch, self.batch, self.is_training = 0, 0, True

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: eps {self.eps}, max_eps {self.max_eps}>"

    def parse_opts(self, s: str) -> None:
        """``key=value`` pairs, separated by commas."""
        pairs = (item.split("=") for item in s.split(",") if item.strip())
        self.params = {key.strip(): value for key, value in pairs}

    def get_max_eps(self) -> float:
        return self.max_eps

    def get_eps(self) -> float:
        return self.eps

    def reached_max_eps(self) -> bool:
        return abs(self.eps - self.max_eps) < 1e-3

    def step_batch(self, verbose: bool = False) -> None:
        """Before a batch; counts in training only."""
        if self.is_training:
            self.batch += 1

    def step_epoch(self, verbose: bool = False) -> None:
        """Before an epoch."""
        if self.is_training:
            self.epoch += 1

    def update_loss(self, new_loss: float) -> None:
        """After a batch, for the schedule that adapts to it."""
        self.prev_loss, self.loss = self.loss, new_loss

    def train(self) -> None:
        self.is_training = True

    def eval(self) -> None:
        self.is_training = False

    def set_epoch_length(self, epoch_length: int) -> None:
        """Batches of an epoch."""
        self.epoch_length = epoch_length


class FixedScheduler(BaseScheduler):
    """The full radius from the start."""

    def __init__(self, max_eps: float, opt_str: str = "") -> None:
        super().__init__(max_eps, opt_str)
        self.eps = max_eps


class LinearScheduler(BaseScheduler):
    """A linear ramp: 0 before epoch ``start``, the full radius ``length`` epochs later."""

    def __init__(self, max_eps: float, opt_str: str) -> None:
        super().__init__(max_eps, opt_str)
        self.schedule_start, self.schedule_length = int(self.params["start"]), int(self.params["length"])
        self.epoch_start_eps = self.epoch_end_eps = 0.0

    def _at(self, epochs: float) -> float:
        """The radius ``epochs`` after the ramp's start."""
        if self.schedule_length == 0:
            return self.max_eps
        return min(epochs * self.max_eps / self.schedule_length, self.max_eps)

    def step_epoch(self, verbose: bool = True) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        since = self.epoch - self.schedule_start
        self.epoch_start_eps = self._at(since) if since >= 0 else 0.0
        self.epoch_end_eps = self._at(since + 1) if since >= 0 else 0.0
        self.eps = self.epoch_start_eps
        if verbose:
            logger.info(
                "Epoch %3d eps start %7.5f end %7.5f", self.epoch, self.epoch_start_eps, self.epoch_end_eps
            )

    def step_batch(self, verbose: bool = False) -> None:
        if not self.is_training:
            return
        self.batch += 1
        step = (self.epoch_end_eps - self.epoch_start_eps) / self.epoch_length
        self.eps = self.epoch_start_eps + step * (self.batch - 1)
        if self.batch > self.epoch_length:
            logger.warning("batch %d of an epoch of %d batches", self.batch, self.epoch_length)
            self.eps = self.epoch_end_eps


class BiLinearScheduler(LinearScheduler):
    """Up to the full radius within half of ``length`` epochs, and down again."""

    def _at(self, epochs: float) -> float:
        half = self.schedule_length / 2
        if epochs <= half:
            return min(epochs * self.max_eps / half, self.max_eps)
        return max(0.0, self.max_eps - (epochs - half) * self.max_eps / half)


class RangeScheduler(BaseScheduler):
    """The full radius in ``length`` epochs from ``start`` on, 0 else."""

    def __init__(self, max_eps: float, opt_str: str) -> None:
        super().__init__(max_eps, opt_str)
        self.schedule_start, self.schedule_length = int(self.params["start"]), int(self.params["length"])

    def step_epoch(self, verbose: bool = True) -> None:
        self.epoch += 1
        inside = self.schedule_start <= self.epoch < self.schedule_start + self.schedule_length
        self.eps = self.max_eps if inside else 0.0

    def step_batch(self, verbose: bool = False) -> None:
        """The radius changes with epochs only."""


class SmoothedScheduler(BaseScheduler):
    """A power of the step up to ``mid`` of the ramp, a straight line with the same slope from there on.

    Options: ``start`` and ``length`` in epochs, ``mid`` (0.25), ``beta``, the power (4). Source: the schedule
    of Gowal et al., "On the Effectiveness of Interval Bound Propagation", 2018, as certified training uses it.
    """

    def __init__(self, max_eps: float, opt_str: str) -> None:
        super().__init__(max_eps, opt_str)
        self.schedule_start, self.schedule_length = int(self.params["start"]), int(self.params["length"])
        self.mid_point = float(self.params.get("mid", 0.25))
        self.beta = float(self.params.get("beta", 4.0))
        if self.beta < 2 or not 0 <= self.mid_point <= 1:
            raise ValueError(
                f"SmoothedScheduler: beta must be at least 2 and mid between 0 and 1, got beta={self.beta}, "
                f"mid={self.mid_point}"
            )

    def set_epoch_length(self, epoch_length: int) -> None:
        if not math.isnan(self.epoch_length) and self.epoch_length != epoch_length:
            raise ValueError(
                f"SmoothedScheduler: the length of an epoch was {self.epoch_length}, got {epoch_length}"
            )
        self.epoch_length = epoch_length

    def step_batch(self, verbose: bool = False) -> None:
        if not self.is_training:
            return
        self.batch += 1
        start = (self.schedule_start - 1) * self.epoch_length
        total = self.schedule_length * self.epoch_length
        done = self.batch - 1 - start
        if done <= 0:
            self.eps = 0.0
            return
        power_part = int(total * self.mid_point)
        # alpha * s^beta meets a line to (total, max_eps) at s = power_part with its own slope there
        scale = power_part ** (self.beta - 1)
        alpha = self.max_eps / (((total - power_part) * self.beta + power_part) * scale)
        if done < power_part:
            self.eps = alpha * done**self.beta
            return
        middle = alpha * power_part**self.beta
        along = (done - power_part) / (total - power_part)
        self.eps = min(middle + (self.max_eps - middle) * along, self.max_eps)


class AdaptiveScheduler(BaseScheduler):
    """Larger steps while the loss falls or is small, smaller ones where it rises.

    Options: ``start``; ``min_step``, ``max_step`` of the radius; ``increase_thresh``, ``increase_factor``,
    ``decrease_thresh``, ``decrease_factor``; ``small_loss_thresh``.
    """

    def __init__(self, max_eps: float, opt_str: str) -> None:
        super().__init__(max_eps, opt_str)

        def number(name: str, default: float) -> float:
            return float(self.params.get(name, default))

        self.schedule_start = int(self.params["start"])
        self.min_eps_step, self.max_eps_step = number("min_step", 1e-9), number("max_step", 1e-4)
        self.eps_increase_thresh = number("increase_thresh", 1.0)
        self.eps_increase_factor = number("increase_factor", 1.5)
        self.eps_decrease_thresh = number("decrease_thresh", 1.5)
        self.eps_decrease_factor = number("decrease_factor", 2.0)
        self.small_loss_thresh = number("small_loss_thresh", 0.05)
        self.eps_step = self.min_eps_step

    def step_batch(self, verbose: bool = False) -> None:
        if self.eps >= self.max_eps or self.epoch < self.schedule_start or not self.is_training:
            return
        if math.isnan(self.loss) or math.isnan(self.prev_loss):  # the first two steps
            self.eps += self.min_eps_step
            return
        if self.loss < self.eps_increase_thresh * self.prev_loss or self.loss < self.small_loss_thresh:
            self.eps_step = min(self.eps_step * self.eps_increase_factor, self.max_eps_step)
        elif self.loss > self.eps_decrease_thresh * self.prev_loss:
            self.eps_step = max(self.eps_step / self.eps_decrease_factor, self.min_eps_step)
        self.eps = min(self.eps + self.eps_step, self.max_eps)
