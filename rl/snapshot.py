"""Policy snapshots: the weights of one version, as a folder that any server can load."""

from __future__ import annotations

import shutil
from pathlib import Path

from model.config import Qwen3Config
from model.hf import save_hf
from model.hosts import host_index
from model.qwen3 import Params
from model.tokenizer import Tokenizer


class Snapshots:
    """Snapshot folders `v000000`, `v000001`, … under `root`; the newest `keep` are kept."""

    def __init__(
        self, root: Path, config: Qwen3Config, tokenizer: Tokenizer, keep: int = 2
    ) -> None:
        self._root, self._config, self._tokenizer, self._keep = root, config, tokenizer, keep

    def write(self, params: Params, version: int) -> Path:
        """Write one version, whole or not at all, and drop versions that are too old.

        Hosts write it together; it is whole when this returns, on any of them.
        """
        folder = self._root / f"v{version:06d}"
        save_hf(folder, params, self._config, self._tokenizer)
        for old in sorted(self._root.glob("v[0-9]*"))[: -self._keep]:
            if host_index() == 0 and old != folder:
                shutil.rmtree(old)
        return folder
