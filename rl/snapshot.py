"""Policy snapshots: the weights of one version, as a folder that any server can load."""

from __future__ import annotations

import errno
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax

from configs.errors import InputError
from model.config import Qwen3Config
from model.export_folder import MANIFEST, check_manifest
from model.hf import checked_tensors, fetched, read_config, save_hf
from model.hosts import agree, host_count, host_index
from model.qwen3 import Params
from model.tokenizer import Tokenizer

_SLACK_BYTES = 16 << 20  # tokenizer, config, manifest, and what the file system needs itself


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot. `label` is its name on servers: the version and the head of its manifest's
    hash, for versions of two runs, or of a run before and after a crash, may share a number."""

    folder: Path
    version: int
    label: str


class Snapshots:
    """Snapshot folders `v000000`, `v000001`, … under `root`; up to the one written last, the newest
    `keep` are kept. Later ones, which a run that was resumed before them left, go.

    Args:
      dtype: "bfloat16" halves the bytes that servers read; None keeps the learner's bits.
      budget_bytes: of all snapshots together; older ones than the newest go first. 0: no limit.
    """

    def __init__(
        self,
        root: Path,
        config: Qwen3Config,
        tokenizer: Tokenizer,
        keep: int = 2,
        *,
        dtype: str | None = None,
        budget_bytes: int = 0,
    ) -> None:
        self._root, self._config, self._tokenizer, self._keep = root, config, tokenizer, keep
        self._dtype, self._budget = dtype, budget_bytes

    def copy(self, params: Params) -> Params:
        """What `write` takes, out of the learner's reach, in the host's memory: hosts copy
        together, and may then write beside what the learner does next."""
        return fetched(params, self._config, dtype=self._dtype)

    def write(self, params: Params, version: int) -> Snapshot:
        """Write one version, whole or not at all, and drop versions that are too old.

        Hosts write it together; it is whole when this returns, on any of them. The newest earlier
        version stays until then: a server that comes back meanwhile may need it.

        Raises InputError if the disk or the budget has no room for it.
        """
        folder = self._root / f"v{version:06d}"
        self._make_room(params, folder)
        try:
            self._save(folder, params)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if host_count() > 1:  # the others are in the middle of it
                raise InputError(_no_room(folder)) from None
            self._drop(keep=1, before=folder)
            try:
                self._save(folder, params)
            except OSError:
                raise InputError(_no_room(folder)) from None
        if host_index() == 0:
            self._drop(keep=self._keep - 1, before=folder)
        label = agree(label_of(folder, version) if host_index() == 0 else None)[0]
        return Snapshot(folder, version, label)

    def _save(self, folder: Path, params: Params) -> None:
        save_hf(folder, params, self._config, self._tokenizer, dtype=self._dtype)

    def _make_room(self, params: Params, folder: Path) -> None:
        """Drop what must go before `folder` can be written."""
        if host_index() != 0:
            return
        itemsize = 2 if self._dtype == "bfloat16" else 4
        wanted = sum(leaf.size for leaf in jax.tree.leaves(params)) * itemsize + _SLACK_BYTES
        self._root.mkdir(parents=True, exist_ok=True)
        for later in self._root.glob("v[0-9]*"):
            if later.name > folder.name:
                shutil.rmtree(later)
        for keep in range(self._keep, 0, -1):
            self._drop(keep=keep, before=folder)
            held = sum(map(_bytes, self._versions()))
            fits = not self._budget or held + wanted <= self._budget
            if fits and shutil.disk_usage(self._root).free >= wanted:
                return
        if self._budget and sum(map(_bytes, self._versions())) + wanted > self._budget:
            raise InputError(
                f"snapshots: {folder.name} and the one before it need more than the budget of "
                f"{self._budget / 2**30:.3g} GiB: raise server.sglang.snapshot_gib"
            )
        if shutil.disk_usage(self._root).free < wanted:
            raise InputError(_no_room(folder))

    def _versions(self) -> list[Path]:
        return sorted(self._root.glob("v[0-9]*"))

    def _drop(self, keep: int, before: Path) -> None:
        """Drop those before a version, but for the newest `keep` of them."""
        earlier = [folder for folder in self._versions() if folder.name < before.name]
        for old in earlier[::-1][keep:]:
            shutil.rmtree(old)


def label_of(folder: Path, version: int) -> str:
    """The name that a whole snapshot has on servers."""
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return f"v{version:06d}-{digest[:12]}"


def version_of(label: str) -> int | None:
    """The version in a label of ours; None for any other text."""
    number, dash, _ = label.removeprefix("v").partition("-")
    return int(number) if dash and label.startswith("v") and number.isdecimal() else None


def validate(snapshot: Snapshot, config: Qwen3Config) -> None:
    """Check a snapshot before any server is told of it, for servers do not: one with a tensor that
    is missing or has another shape is loaded "successfully", and served.

    Raises InputError naming the file or tensor: no manifest, a file that differs from its checksum,
    a tensor missing, extra, or of another shape or dtype than `config` says.
    """
    folder = snapshot.folder
    if check_manifest(folder) is None:
        raise InputError(f"{folder} has no manifest of ours: it is not a whole snapshot")
    if label_of(folder, snapshot.version) != snapshot.label:
        raise InputError(f"{folder} was replaced: it is no longer {snapshot.label}")
    stored = read_config(folder).to_hf()
    for key, value in config.to_hf().items():
        if key != "torch_dtype" and stored.get(key) != value:
            raise InputError(f"{folder}/config.json: {key} is {stored.get(key)}, not {value}")
    checked_tensors(folder, config)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _no_room(folder: Path) -> str:
    free = shutil.disk_usage(folder.parent).free / 2**30
    return (
        f"no room to write {folder} ({free:.3g} GiB free): free some disk; the checkpoint is kept "
        "and the same command goes on"
    )
