"""Which rows of a batch each host feeds, on meshes of every form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.errors import InputError
from model import share
from model.parallel import AXES


def _shares(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], hosts: list[int]) -> list[Any]:
    """Of every host, on a mesh (slice, data, fsdp, context, tensor) whose devices are theirs."""
    devices = np.array([SimpleNamespace(process_index=h) for h in hosts]).reshape(shape)
    mesh: Any = SimpleNamespace(devices=devices, axis_names=AXES)
    found = []
    for host in range(max(hosts) + 1):
        monkeypatch.setattr(share, "host_index", lambda host=host: host)
        monkeypatch.setattr(share, "host_count", lambda: max(hosts) + 1)
        found.append(share.share_of(mesh))
    return found


def test_one_host_feeds_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share.share_of(None) == share.Share(0, 1, (0,))
    assert _shares(monkeypatch, (1, 2, 2, 1, 1), [0] * 4) == [share.Share(0, 1, (0,))]


def test_rows_are_dealt_out_by_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _shares(monkeypatch, (1, 2, 2, 1, 2), [0, 0, 0, 0, 1, 1, 1, 1])
    assert found == [share.Share(0, 2, (0,)), share.Share(1, 2, (1,))]


def test_a_torus_may_give_a_host_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _shares(monkeypatch, (1, 1, 4, 1, 1), [0, 1, 0, 1])
    assert found == [share.Share(0, 2, (0,)), share.Share(1, 2, (1,))]


def test_hosts_that_split_a_model_feed_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _shares(monkeypatch, (1, 2, 1, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3])
    assert [(s.part, s.parts, s.peers) for s in found] == [
        *((0, 2, (0, 1)), (0, 2, (0, 1))),
        *((1, 2, (2, 3)), (1, 2, (2, 3))),
    ]


def test_rows_that_overlap_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="dealt out evenly"):
        _shares(monkeypatch, (1, 1, 3, 1, 2), [0, 0, 0, 1, 1, 1])
