"""What differs between SGLang and sglang-jax, one class each: how new weights get in, and how a
server says which it has.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, Protocol

from rl.generate_api import Generation, read_sample
from rl.replica import Refused, Replica, Unreachable
from rl.snapshot import Snapshot

_SHORT_S = 10.0

Update = Literal["drain", "retract", "in_place"]


class Engine(Protocol):
    """The dialect of one kind of server."""

    one_by_one: bool  # an update takes a server away for long: the others must serve meanwhile

    async def label(self, replica: Replica) -> str | None:
        """The weight version that the server says it has."""
        ...

    async def update(self, replica: Replica, snapshot: Snapshot) -> None:
        """Put the snapshot's weights in. Raises Unreachable or Refused."""
        ...

    async def disown(self, replica: Replica) -> None:
        """Keep a server with wrong weights from answering under a version's name."""
        ...

    def read(self, data: Any, **about: Any) -> Generation:
        """Check an answer of `/generate` (``rl/generate_api.py``)."""
        ...


class SGLang:
    """SGLang loads a snapshot while it runs.

    `update`, what becomes of turns that are under way: "drain" lets them end first; "retract" stops
    them, and computes their keys and values anew under the new weights; "in_place" keeps those, as
    the in-process engine does, and those of cached prefixes, which new turns then build upon.
    """

    one_by_one = False

    def __init__(self, update: Update, drain_s: float, load_s: float) -> None:
        self._update, self._drain_s, self._load_s = update, drain_s, load_s

    async def label(self, replica: Replica) -> str | None:
        info = await replica.call("/model_info", timeout_s=_SHORT_S)
        return info.get("weight_version") if isinstance(info, dict) else None

    async def update(self, replica: Replica, snapshot: Snapshot) -> None:
        drain = self._update == "drain"
        if drain and not await replica.drained(self._drain_s):
            # what is cut off is sampled anew, by the client that waits for it
            await replica.call("/abort_request", {"abort_all": True}, timeout_s=_SHORT_S)
        if not drain:
            await replica.call("/pause_generation", {"mode": self._update}, timeout_s=_SHORT_S)
        body = {
            "model_path": str(snapshot.folder.absolute()),
            "weight_version": snapshot.label,
            # SGLang does not flush while requests hold old keys and values
            "flush_cache": self._update != "in_place" or not replica.running,
        }
        try:
            answer = await replica.call("/update_weights_from_disk", body, timeout_s=self._load_s)
        finally:
            if not drain:  # a server that stays paused is found out by the probe
                with contextlib.suppress(Unreachable, Refused):
                    await replica.call("/continue_generation", {}, timeout_s=_SHORT_S)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise Refused(f"{replica.url}: weights not updated: {str(answer)[:300]}")

    async def disown(self, replica: Replica) -> None:
        with contextlib.suppress(Unreachable, Refused):
            body = {"new_version": "rejected", "abort_all_requests": True}
            await replica.call("/update_weight_version", body, timeout_s=_SHORT_S)

    def read(self, data: Any, **about: Any) -> Generation:
        return read_sample(data, **about)


class SGLangJax:
    """sglang-jax has no route for new weights and no version: a server is started anew for each.

    Which weights it has is known from the folder that it was started with. A request cannot outlive
    its server, so that all tokens of an answer are of the version that it began with.
    """

    one_by_one = True

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._labels: dict[str, tuple[str, str]] = {}  # url: folder, label

    async def label(self, replica: Replica) -> str | None:
        info = await replica.call("/get_model_info", timeout_s=_SHORT_S)
        folder, label = self._labels.get(replica.url, ("", ""))
        return label if isinstance(info, dict) and info.get("model_path") == folder else None

    async def update(self, replica: Replica, snapshot: Snapshot) -> None:
        if replica.launcher is None:
            raise Refused(
                f"{replica.url}: sglang-jax takes new weights by a restart only: set "
                "server.sglang.restart to the command that does it"
            )
        await replica.drained(self._drain_s)
        replica.verified.clear()
        await replica.launcher.restart(snapshot)
        self._labels[replica.url] = str(snapshot.folder.absolute()), snapshot.label

    async def disown(self, replica: Replica) -> None:
        self._labels.pop(replica.url, None)

    def read(self, data: Any, **about: Any) -> Generation:
        return read_sample(data, **about, ids_listed=False)
