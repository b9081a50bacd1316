"""Why a test fails: a bug, something the older release did not have yet, or the surroundings."""

from __future__ import annotations

import re

from sandbox.base import TestCase

# names and parameters that came with the newer release: its tests cannot fail otherwise
_API = re.compile(
    r"(ImportError|ModuleNotFoundError|NameError|fixture '|"
    r"AttributeError: (module|type object|<module|.* does not have the attribute)|"
    r"AttributeError: '(?!NoneType|str'|int'|list'|dict'|tuple'|bytes'|bool'|float'|set')\w+'"
    r" object has no attribute|"
    r"TypeError: .*(unexpected keyword argument|takes no (keyword )?arguments|"
    r"takes (from )?\d+ (to \d+ )?positional arguments?|got multiple values for|"
    r"is not subscriptable.*type)|SyntaxError|IndentationError)"
)
_NETWORK = re.compile(
    r"gaierror|Name or service not known|Temporary failure in name resolution|"
    r"Network is unreachable|URLError|NewConnectionError|ConnectTimeout|ConnectError|"
    r"Max retries exceeded|ConnectionError|Connection refused|ClientConnectorError",
)
_CLOCK = re.compile(
    r"(?:^|[_\W])(timeout|perf|performance|benchmark|slow|speed|elapsed|under_\d+m?s)(?:$|[_\W])",
    re.I,
)


def kind(case: TestCase, versions: tuple[str, str]) -> str:
    """What the failure of one test on the older source says: "bug", "api" (it asks for what was
    not there), "collection", "version" (it looks at the version number), "network" or "missing".
    """
    if case.outcome == "missing":
        return "missing"
    if needs_network(case):
        return "network"
    if any(re.search(rf"(?<![\d.]){re.escape(v)}(?![\d.])", case.error) for v in versions):
        return "version"
    if "version" in case.id.rpartition("::")[2].lower() and "__version__" in case.error:
        return "version"
    if case.outcome == "error" and not case.frames:
        return "collection"
    return "api" if _API.search(case.error) else "bug"


def needs_network(case: TestCase) -> bool:
    """Whether a test failed for want of a network."""
    return bool(_NETWORK.search(case.error))


def looks_at_clock(test: str) -> bool:
    """Whether a test's name says that it measures time: its outcome is the machine's, too."""
    return bool(_CLOCK.search(test.rpartition("::")[2]))
