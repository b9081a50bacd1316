"""Commands in the documentation are commands that there are."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from configs.schema import load
from tools import cli
from tools.run_config import RunConfig
from tools.simulate import SimulateConfig

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line
    for page in ("tpu.md", "serving.md", "sft.md")
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    for line in block.splitlines()
    if line.startswith("remend ")
]


class Parsed(Exception):
    """Thrown where a verb has read its arguments and would begin."""


def test_there_are_some() -> None:
    assert {line.split()[1] for line in LINES} >= {"plan", "sft", "report"}


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_one_that_the_command_line_takes(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb, *argv = shlex.split(line)[1:]
    for name in ("parse_args", "parse_intermixed_args"):
        read = getattr(argparse.ArgumentParser, name)

        def stop(self: argparse.ArgumentParser, args: list[str], read: Any = read) -> None:
            raise Parsed(read(self, args))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(Parsed):
        cli.entry(verb)(argv)
    configs = [ROOT / word for word in argv if word.endswith(".yaml")]
    overrides = [word for word in argv if "=" in word and not word.startswith("-")]
    for path in configs:
        load(SimulateConfig if verb == "simulate" else RunConfig, path, overrides)
