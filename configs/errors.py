"""Errors meant for people: the command line prints them as one line and exits with code 2."""

from __future__ import annotations


class InputError(Exception):
    """Bad input. The message says what was wrong, where, and what to do about it."""


class MissingExtra(InputError):
    """An optional package is needed for what was asked, and it is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'remend[{extra}]'")
        self.package = package
        self.extra = extra


class Preempted(Exception):
    """Stopped on request with everything kept. The message says what; the same command goes on."""
