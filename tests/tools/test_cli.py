"""The dispatcher: instant help, one line an error, the right exit code."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from configs.errors import InputError, MissingExtra
from tools import cli

ROOT = Path(__file__).resolve().parents[2]


def remend(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, and list what it imported on stderr."""
    program = """
import sys
from tools.cli import main
try:
    code = main()
except SystemExit as exit:
    code = exit.code or 0
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""
    return subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(done.stderr.splitlines()[-1].split()[1:])


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    done = remend("--help")
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)
    heavy = {"jax", "flax", "numpy", "pydantic", "yaml", "rich", "asyncio"}
    assert not imported(done) & heavy


def test_tasks_never_needs_jax() -> None:
    done = remend("tasks", "--help")
    assert done.returncode == 0, done.stderr
    assert not imported(done) & {"jax", "flax", "numpy"}


def test_no_verb_shows_help_and_is_an_error() -> None:
    done = remend()
    assert done.returncode == 2
    assert "quickstart" in done.stdout


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["taks"], "remend: error: unknown verb taks: did you mean tasks?"),
        (["xyzzy"], "remend: error: unknown verb xyzzy: see remend --help"),
    ],
)
def test_unknown_verb(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (InputError("a.yaml:\n  bad"), 2, "remend: error: a.yaml: bad"),
        (
            MissingExtra("docker", "docker"),
            2,
            "remend: error: docker is not installed: pip install 'remend[docker]'",
        ),
        (
            ModuleNotFoundError("no", name="transformers.models"),
            2,
            "remend: error: transformers is not installed: pip install 'remend[parity]'",
        ),
        (
            ModuleNotFoundError("no", name="unearth"),
            2,
            "remend: error: unearth is not installed: pip install 'remend'",
        ),
        (KeyboardInterrupt(), 130, "remend: interrupted"),
    ],
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    line: str,
) -> None:
    _verb_that_raises(monkeypatch, raised)
    assert cli.main(["fails", "x"]) == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _verb_that_raises(monkeypatch, ModuleNotFoundError("no", name="tools.gone"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["fails"])


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_main(verb: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.entry(verb)(["--help"])
    assert left.value.code == 0


def test_every_extra_that_an_error_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = {
        requirement.removeprefix("remend").strip("[]") for requirement in cli.INSTALLS.values()
    }
    assert named - {""} <= extras


def _verb_that_raises(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
    module = types.ModuleType("tools.fails")

    def main(argv: list[str]) -> int:
        raise raised

    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tools.fails", module)
    monkeypatch.setitem(cli.VERBS, "fails", ("tools.fails", "fails"))
