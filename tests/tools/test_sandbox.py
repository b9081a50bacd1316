"""`remend sandbox` as a user calls it."""

from __future__ import annotations

import json

import pytest

from sandbox.probe import check_backend
from tests.sandbox.box import BACKENDS, Box
from tools import cli

RUN = ["sandbox", "run", "--backend", BACKENDS[0]] if BACKENDS else []


def test_run_tells_all_in_json(tmp_path, capfd) -> None:
    (tmp_path / "file").write_text("x")
    script = "cat file; echo err >&2; echo new > file; exit 3"
    assert cli.main([*RUN, "--dir", str(tmp_path), "--json", "--", "sh", "-c", script]) == 1
    told = json.loads(capfd.readouterr().out)
    assert told.pop("seconds") > 0
    assert told == {
        "exit_code": 3, "stdout": "x", "stderr": "err\n", "timed_out": False, "killed_by": None,
    }  # fmt: skip
    assert (tmp_path / "file").read_text() == "x"  # it worked on a copy


def test_run_passes_output_on(capfd) -> None:
    assert cli.main([*RUN, "--", "sh", "-c", "pwd -P; ls -A; echo err >&2"]) == 0
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and err == "err\n"


def test_run_says_what_killed_a_command(capfd) -> None:
    assert cli.main([*RUN, "--timeout", "0.3", "--", "sleep", "9"]) == 1
    assert "killed: deadline" in capfd.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--dir", "/no/such"], ["--timeout", "-1"], ["--timeout", "nan"]]
)
def test_bad_input_is_refused(wrong, capfd) -> None:
    assert cli.main([*RUN, *wrong, "--", "true"]) == 2
    assert wrong[0] in capfd.readouterr().err


@pytest.mark.skipif("bwrap" not in BACKENDS, reason="bubblewrap does not work here")
def test_bubblewrap_contains_everything() -> None:
    box = Box("bwrap")  # for its loop
    checks = box.run(check_backend("bwrap"))
    box.close()
    assert len(checks) == 8 and all(check.contained for check in checks), checks


def test_plain_contains_what_it_can_and_the_check_is_honest() -> None:
    box = Box("plain")
    checks = {check.name: check.contained for check in box.run(check_backend("plain"))}
    box.close()
    contained = ("network", "fork bomb", "memory", "daemon", "deadline")
    assert all(checks[name] for name in contained), checks
    assert not checks["reading outside"] and not checks["writing outside"]
