"""The metrics of a run in TensorBoard or Weights & Biases besides `metrics.jsonl`, which stays the
one record: a tracker is told of what was written there, and at the start of a phase of all that is
kept there, so that steps which a resumed run does again are in neither twice.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs.errors import InputError, MissingExtra
from configs.files import write_atomic


@dataclass(frozen=True)
class TrackingConfig:
    """Attributes:
    tensorboard: event files in `RUN/tensorboard/PHASE`.
    wandb: a Weights & Biases project, "" for none. Each phase is a run there, and they are one
      group; who is logged in, entity and mode are as W&B has them (`wandb login`, WANDB_ENTITY,
      WANDB_MODE=offline).
    """

    tensorboard: bool = False
    wandb: str = ""


class Tracker(Protocol):
    """Somewhere else that metrics go."""

    def start(self, phase: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A phase begins, or goes on behind the `rows` of metrics.jsonl that it has already."""
        ...

    def write(self, row: Mapping[str, Any]) -> None:
        """One more row of that phase: `phase`, `step`, and numbers."""
        ...

    def close(self) -> None:
        """Hand over what is still on its way."""
        ...


def open_trackers(config: TrackingConfig, run: Path) -> list[Tracker]:
    """What the config asks for, for a run folder; nothing is written before a phase starts.

    Raises InputError where W&B knows no login, MissingExtra without its package or TensorBoard's.
    """
    found: list[Tracker] = []
    if config.tensorboard:
        _package("tensorboardX", "tensorboard")
        found.append(TensorBoard(run / "tensorboard"))
    if config.wandb:
        wandb = _package("wandb", "wandb")
        try:
            if os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
                wandb.login()
        except Exception as error:  # its own classes, and those of its HTTP client
            raise InputError(
                f"tracking.wandb: {error}: log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        found.append(WandB(wandb, config.wandb, run))
    return found


class TensorBoard:
    """Scalars by step, one folder of event files a phase.

    The folder is made anew from metrics.jsonl when its phase goes on: event files can only grow.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, phase: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.close()
        shutil.rmtree(self._folder / phase, ignore_errors=True)
        # a TensorBoard that is open on the folder forgets what it has read of it
        writer = _package("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(str(self._folder / phase), purge_step=0, flush_secs=5)
        for row in rows:
            self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """One W&B run a phase, found again by the id in `RUN/wandb-id`.

    W&B keeps the first numbers of a step. Offline, what a resumed run leaves is whole by itself: of
    several offline folders of a phase sync the newest alone.
    """

    def __init__(self, wandb: Any, project: str, run: Path) -> None:
        self._wandb, self._project, self._folder = wandb, project, run
        self._run: Any = None

    def start(self, phase: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.close()
        path, config = self._folder / "wandb-id", self._folder / "config.yaml"
        if not path.exists():
            write_atomic(path, secrets.token_hex(8))
        self._run = self._wandb.init(
            project=self._project,
            id=f"{path.read_text()}-{phase}",
            name=f"{self._folder.name} {phase}",
            group=self._folder.name,
            dir=str(self._folder),
            config=str(config) if config.exists() else None,
            resume=None if self._wandb.setup().settings.mode == "offline" else "allow",
            settings=self._wandb.Settings(console="off", silent=True),
        )
        for row in rows:
            if row["step"] >= self._run.step:
                self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "/" in name}


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise MissingExtra(name, extra) from None
