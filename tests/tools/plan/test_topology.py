"""What is asked for where libtpu is not installed."""

from __future__ import annotations

import sys

import pytest

from configs.errors import MissingExtra
from tools.plan.chips import parse
from tools.plan.topology import devices


def test_without_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(MissingExtra, match=r"pip install 'remend\[tpu\]'"):
        devices(parse("v5e:2x4"))
