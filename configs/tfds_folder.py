"""Rows of plain values as a TFDS dataset: ArrayRecord files, with no need of TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError


def free_place(folder: Path, name: str, version: str) -> Path:
    """Where `write_tfds` would write. Raises InputError if there is such a dataset already, and
    ModuleNotFoundError where TFDS is not installed: before the work that the rows are."""
    importlib.import_module("tensorflow_datasets")
    path = folder / name / version
    if path.exists():
        raise InputError(f"{path} is a dataset already: choose another folder, or delete it")
    return path


def write_tfds(
    folder: Path,
    name: str,
    version: str,
    description: str,
    features: Callable[[Any], Any],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
) -> Path:
    """Write `folder`/`name`/`version`, whole or not at all; the rows of a split keep their order.

    `features` makes a FeaturesDict, given TFDS; rows have its keys. Read it by
    ``tfds.data_source(name, data_dir=folder, split=…)``, or ``tfds.load`` where TensorFlow is.
    Raises InputError if there is such a dataset already.
    """
    import tensorflow_datasets as tfds

    path = free_place(folder, name, version)
    dataset, release = name, version

    class Builder(
        tfds.core.GeneratorBasedBuilder,
        skip_registration=True,  # type: ignore[call-arg]
    ):
        name = dataset
        VERSION = tfds.core.Version(release)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=features(tfds),
                disable_shuffling=True,
            )

        def _split_generators(self, manager: Any) -> Any:
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(
            self, rows: Iterable[Mapping[str, Any]]
        ) -> Iterator[tuple[int, Mapping[str, Any]]]:
            yield from enumerate(rows)

    tfds.disable_progress_bar()
    # TFDS writes beside the folder and renames it in the end; what it says is no answer of ours
    with (
        contextlib.redirect_stdout(sys.stderr),
        tempfile.TemporaryDirectory(prefix="remend-tfds-") as downloads,  # nothing is, yet it asks
    ):
        builder = Builder(data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return path
