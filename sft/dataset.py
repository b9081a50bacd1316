"""Trajectories as a TFDS dataset: written, and read in any order, without TensorFlow.

ArrayRecord files and their description, which ``tfds.data_source`` and Grain read. Its features
are the fields of `Trajectory`, and the weight of each token in the loss of SFT; turns and verdicts,
which have no fixed form, are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from configs.errors import InputError
from configs.tfds_folder import write_tfds
from sft.examples import Examples
from sft.trajectory import Trajectory, from_record, to_record

NAME = "remend_trajectories"
VERSION = "1.0.0"
SPLIT = "train"
_DESCRIPTION = "Episodes of an agent that repaired code, token by token."
_IDS = {"ids": np.int32, "author": np.int32, "logprobs": np.float32, "versions": np.int32}
_TEXT = (
    *("task", "package", "operator", "split", "policy"),
    *("prompt", "patch", "stop", "environment"),
)
_WHOLE = ("seed", "weight_version")  # int64
_REAL = ("reward", "seconds", "sandbox_s")  # float32
_JSON = ("turns", "verdict", "other_verdict")


def write_dataset(
    folder: Path, examples: Examples, on_done: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """Write `folder`/remend_trajectories/1.0.0, whole or not at all, in their order.

    Read it by ``tfds.data_source("remend_trajectories", data_dir=folder, split="train")``.
    `on_done` is told (trajectories written, of how many). Raises InputError if there is such a
    dataset already, or if there are no examples.
    """
    if not examples:
        raise InputError("there is no trajectory to keep: look at what teach.keep leaves out")

    def rows() -> Iterator[dict[str, Any]]:
        for number, (trajectory, weight) in enumerate(examples.weighted(), 1):
            yield _entry(trajectory, weight)
            on_done(number, len(examples))

    return write_tfds(folder, NAME, VERSION, _DESCRIPTION, _features, {SPLIT: rows()})


class Published(Sequence[Trajectory]):
    """The trajectories of a dataset that `write_dataset` wrote, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError if there is none."""
        import tensorflow_datasets as tfds

        if not (folder / NAME / VERSION / "dataset_info.json").exists():
            raise InputError(f"{folder} holds no {NAME}/{VERSION}: `remend teach --dataset` does")
        self._folder = folder
        self._source = tfds.data_source(NAME, data_dir=str(folder), split=SPLIT)

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, at: int) -> Trajectory: ...
    @overload
    def __getitem__(self, at: slice) -> list[Trajectory]: ...
    def __getitem__(self, at: int | slice) -> Trajectory | list[Trajectory]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        return from_record(_record(self._source[number]), f"{self._folder}, number {number}")


def _features(tfds: Any) -> Any:
    tensor, text = tfds.features.Tensor, tfds.features.Text()
    return tfds.features.FeaturesDict(
        {name: tensor(shape=(None,), dtype=kind) for name, kind in _IDS.items()}
        | {"weight": tensor(shape=(None,), dtype=np.float32)}
        | {name: tfds.features.Scalar(dtype=np.int64) for name in _WHOLE}
        | {name: tfds.features.Scalar(dtype=np.float32) for name in _REAL}
        | {name: text for name in (*_TEXT, *_JSON)}
    )


def _entry(trajectory: Trajectory, weight: Sequence[float]) -> dict[str, Any]:
    record = to_record(trajectory)
    return (
        {name: np.asarray(record[name], kind) for name, kind in _IDS.items()}
        | {"weight": np.asarray(weight, np.float32)}
        | {name: record[name] for name in (*_WHOLE, *_REAL)}
        | {name: _utf8(record[name]) for name in _TEXT}
        | {name: json.dumps(record[name]) for name in _JSON}
    )


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    """The JSON form of a trajectory that was an `_entry`."""
    return (
        {name: entry[name].tolist() for name in _IDS}
        | {name: int(entry[name]) for name in _WHOLE}
        | {name: round(float(entry[name]), 3) for name in _REAL}  # float32, of milliseconds
        | {name: entry[name].decode() for name in _TEXT}
        | {name: json.loads(entry[name]) for name in _JSON}
    )


def _utf8(text: str) -> str:
    """As the files of trajectories do, keep a lone surrogate as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()
