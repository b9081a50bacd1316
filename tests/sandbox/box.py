"""What the sandbox tests share: a small tree, and a pool in an event loop of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from sandbox.base import Limits, Tree
from sandbox.docker import DockerHost
from sandbox.isolation import Launch
from sandbox.local import LocalPool
from sandbox.memo import TestMemo
from sandbox.pool import DockerPool

LIMITS = Limits(memory_mib=256, processes=24, wall_s=5.0, output_bytes=20_000, file_mib=8)

MODULE = '''\
"""A module."""


def add(a, b):
    return a + b


def boom(n):
    raise KeyError(n)
'''

TESTS = """\
import os
import unittest

import pytest

import mod


def test_add():
    assert mod.add(1, 2) == 3


def test_wrong():
    assert mod.add(1, 1) == 3


def test_deep():
    mod.boom(7)


@pytest.mark.parametrize("n", [1, 2, "a::b[c]"])
def test_many(n):
    assert n != 2


@pytest.fixture
def broken():
    raise OSError("no fixture")


def test_setup(broken):
    pass


def test_from_conftest(seven):
    assert seven == 7


def test_skip():
    pytest.skip("not now")


@pytest.mark.xfail
def test_expected():
    assert 0


class TestGroup:
    def test_in(self, tmp_path, capsys, monkeypatch, recwarn, caplog):
        print("x")
        assert capsys.readouterr().out == "x\\n"
        (tmp_path / "f").write_text("f")


class TestOld(unittest.TestCase):
    def test_unit(self):
        self.assertEqual(mod.add(1, 1), 2)

    def test_unit_wrong(self):
        self.assertEqual(mod.add(1, 1), 3)

    def test_unit_parts(self):
        for n in range(3):
            with self.subTest(n=n):
                self.assertNotEqual(n, 1)

    @unittest.skip("not now")
    def test_unit_skip(self):
        pass

    @unittest.expectedFailure
    def test_unit_expected(self):
        self.fail()


def test_parts(subtests):
    for n in range(3):
        with subtests.test(n=n):
            assert n != 1


def test_teardown(request):
    request.addfinalizer(lambda: 1 / 0)
"""


def make_tree(root: Path) -> Tree:
    """A package of one module, with tests."""
    (root / "tests").mkdir(parents=True)
    (root / "src").mkdir()
    (root / "src/mod.py").write_text(MODULE)
    (root / "tests/test_mod.py").write_text(TESTS)
    (root / "tests/conftest.py").write_text(
        "import pytest\n\n\n@pytest.fixture\ndef seven():\n    return 7\n"
    )
    (root / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (root / "data.bin").write_bytes(bytes(range(256)))
    (root / "link").symlink_to("src/mod.py")
    return Tree(root, {}, ("src",))


class BarePool(LocalPool):
    """The plain backend where the kernel refuses namespaces, as it does in most containers."""

    def _launch(self, *how: Any) -> Launch:
        made = super()._launch(*how)
        return dataclasses.replace(made, setup={**made.setup, "enter_namespaces": False})


class Box:
    """A pool of two slots, and the loop to run its coroutines in.

    `kind`: a backend, or "bare" for a plain one without namespaces. "docker" is the engine that
    DOCKER_HOST tells of.
    """

    def __init__(
        self,
        kind: str,
        limits: Limits = LIMITS,
        memo: TestMemo | None = None,
        shell: bool = False,
    ) -> None:
        self.runner = asyncio.Runner()
        self.namespaces = kind != "bare"
        self.pool: Any
        if kind == "docker":
            self.pool = DockerPool([DockerHost()], 2, limits, memo=memo)
        else:
            pool = BarePool if kind == "bare" else LocalPool
            self.pool = pool(2, limits, "plain" if kind == "bare" else kind, memo, shell=shell)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def close(self) -> None:
        self.run(self.pool.close())
        self.runner.close()


def bwrap_works() -> bool:
    """Whether this machine lets bubblewrap make what the backend needs."""
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


BACKENDS = [*(["bwrap"] if bwrap_works() else []), "plain"] if sys.platform == "linux" else []
# for the parameters of fixtures: where a Docker engine has been started, as .ci/run does
DOCKER = [pytest.param("docker", marks=pytest.mark.service)]
# where processes and signals, rather than files, are at stake
KINDS = [*BACKENDS, *(["bare"] if BACKENDS else [])]
