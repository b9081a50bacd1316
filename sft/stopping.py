"""When SFT leaves an update out, and when it ends early: functions of the metrics so far, so that a
resumed run, which reads them back, decides as an undisturbed one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ValidationConfig:
    """Attributes:
    share: of the tasks with verified episodes, held back from training; 0: none.
    every: updates between losses on them, the last one among them; 0: never.
    patience: end after so many of these without one lower than the lowest by `min_gain`; 0: never.
    best: checkpoints with the lowest loss to keep; then the lowest one's weights are the result.
      0: the last update's are.
    success_every: updates between episodes on held-out tasks, the first `success_tasks` of them;
      0: never. They are for the curve: nothing is chosen by them, or they were held out no more.
    """

    share: float = 0.0
    every: int = 20
    patience: int = 0
    min_gain: float = 0.0
    best: int = 0
    success_every: int = 0
    success_tasks: int = 32


@dataclass(frozen=True)
class SpikeConfig:
    """The guard against loss spikes: an update whose loss is not finite, or above `factor` times
    the median of the last `window` that were made, is left out: weights and moments stay as they
    are. After `stop` in a row SFT ends with an error. `factor` 0: no guard."""

    factor: float = 0.0
    window: int = 20
    stop: int = 5


@dataclass
class History:
    """What the rules need of the metrics; `see` takes the rows in their order."""

    spikes: SpikeConfig
    validation: ValidationConfig
    losses: list[float] = field(default_factory=list)  # of updates that were made
    skipped: int = 0  # in all
    skipped_now: int = 0  # in a row
    lowest: float = math.inf
    waited: int = 0  # validations since the lowest

    def read(self, rows: Iterable[Mapping[str, float]]) -> History:
        for row in rows:
            self.see(row)
        return self

    def see(self, row: Mapping[str, float]) -> None:
        """One update's metrics."""
        if row.get("sft/skipped"):
            self.skipped += 1
            self.skipped_now += 1
        else:
            self.skipped_now = 0
            self.losses = [*self.losses[1 - self.spikes.window :], row["sft/loss"]]
        loss = row.get("sft/validation_loss")
        if loss is None:
            return
        if loss < self.lowest - self.validation.min_gain:
            self.lowest, self.waited = loss, 0
        else:
            self.waited += 1

    @property
    def limit(self) -> float | None:
        """The loss above which the next update is left out; None without the guard. Before there
        is a window's worth of losses only what is not finite is."""
        if not self.spikes.factor:
            return None
        if len(self.losses) < self.spikes.window:
            return math.inf
        return self.spikes.factor * statistics.median(self.losses)

    @property
    def diverged(self) -> bool:
        return bool(self.spikes.factor) and self.skipped_now >= self.spikes.stop

    @property
    def trouble(self) -> str:
        """What `diverged` means, in words."""
        return (
            f"{self.skipped_now} updates in a row were left out: their loss was not finite, or "
            f"above {self.limit:.3g} (sft.spikes). Lower sft.optimizer.learning_rate or look at "
            "the data"
        )

    @property
    def done(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.validation.patience <= self.waited
