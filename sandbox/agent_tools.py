"""The tools a policy may call, their JSON schemas, and what each one returns.

Nothing else reaches the sandbox. A wrong call (unknown tool, bad argument, text that is not in the
file) is answered with an observation that says so; only trouble of the harness itself raises.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import InputError
from sandbox.base import ExecResult, Sandbox, SandboxError, TestReport
from sandbox.checks import Checks
from sandbox.environments import Environment
from sandbox.mutate import FunctionSpan, functions
from sandbox.source import OUTSIDE

# what differs from run to run: addresses, and the names that `tempfile` draws
_VOLATILE = re.compile(r"(?<=0x)[0-9a-fA-F]+|(?<=\btmp)[a-z0-9_]{8}(?![a-z0-9_])")

EDITED, STILL_FAILING = "edited", "still failing, same errors"
MAX_VIEW_LINES = 40
MAX_MATCHES = 12
MAX_LINE_CHARS = 160
MAX_FRAMES, MAX_FRAMES_LATER = 3, 1  # of a traceback: in the first test run, and in later ones


def _tool(name: str, description: str, required: tuple[str, ...] = (), **properties: str) -> dict:
    """One tool in the OpenAI function format that Qwen3's chat template expects."""
    kinds = {"line": "integer", "undo": "boolean"}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": kinds.get(key, "string"), "description": text}
                    for key, text in properties.items()
                },
                "required": list(required),
            },
        },
    }


TOOLS: tuple[dict, ...] = (
    _tool(
        "view",
        "Show numbered lines: the function under repair, another one, or the lines around `line`.",
        path="file, relative to the repository; the one under repair by default",
        symbol="function, as `name` or `Class.name`",
        line="line to centre on",
    ),
    _tool(
        "search",
        "Find a literal text in the Python files of the repository.",
        ("text",),
        text="text to find",
    ),
    _tool(
        "edit",
        "Put `new` in the place of `old`, a piece of code that occurs exactly once.",
        ("old", "new"),
        path="file, relative to the repository; by default the function under repair alone",
        symbol="function that is searched for `old`; without it, all of `path` is",
        old="text to replace, without line numbers; it may run over several lines",
        new="text to put there",
        undo="first take back every earlier edit",
    ),
    _tool("run_tests", "Run the tests of this task."),
    _tool("submit", "Hand in the repository as it is now and end the task."),
)
BASH = _tool(
    "bash",
    "Run a command line in the repository's root, without network; files it changes stay changed.",
    ("command",),
    command="what `bash -c` is given",
)
_TYPES: dict[str, type] = {"string": str, "integer": int, "boolean": bool}


@dataclass(frozen=True)
class ToolCall:
    """One parsed call: `{"name": …, "arguments": {…}}`."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Observation:
    """What the policy is told, and whether the episode ends here, or the tests passed."""

    text: str
    done: bool = False
    passed: bool = False


class CallError(ValueError):
    """The policy's own mistake; its text becomes the observation."""


def tools_of(environment: Environment) -> tuple[dict, ...]:
    """The schemas of the tools that a policy has there."""
    return (*TOOLS[:-1], BASH, TOOLS[-1]) if environment == "full" else TOOLS


def check_arguments(call: ToolCall, tools: Sequence[dict] = TOOLS) -> None:
    """Raise `CallError` unless the call names one of `tools` and fits that tool's schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    schema = schemas.get(call.name)
    if schema is None:
        raise CallError(f"no tool {call.name!r}; tools: {', '.join(schemas)}")
    for key in schema["required"]:
        if key not in call.arguments:
            raise CallError(f"{call.name} needs {key!r}")
    for key, value in call.arguments.items():
        if key not in schema["properties"]:
            raise CallError(f"{call.name} has no argument {key!r}")
        kind = schema["properties"][key]["type"]
        # bool is an int in Python, not in JSON
        if not isinstance(value, _TYPES[kind]) or (kind == "integer" and value is True):
            raise CallError(f"{key!r} must be {'an' if kind == 'integer' else 'a'} {kind}")


class ToolBox:
    """The tools of one episode, acting on one leased sandbox.

    `checks` are what `run_tests` runs, the build first if there is one; `module` and `function`
    name what is under repair. Which tools there are depends on `environment`.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        checks: Checks,
        module: str,
        function: str,
        environment: Environment = "simplified",
    ) -> None:
        self._sandbox, self._checks = sandbox, checks
        self._tools = tools_of(environment)
        self._module = module
        # a bug between functions: all of the module is under repair
        self._function = function if function != OUTSIDE else None
        self._before_edit: dict[str, bytes] = {}
        self._last_failure: str | None = None

    async def call(self, call: ToolCall) -> Observation:
        """Carry out one call. The policy's mistakes come back as text, never as exceptions."""
        try:
            check_arguments(call, self._tools)
            match call.name:
                case "view":
                    text = await self._view(**call.arguments)
                case "search":
                    text = await self._search(**call.arguments)
                case "edit":
                    text = await self._edit(**call.arguments)
                case "run_tests":
                    return await self._run_tests()
                case "bash":
                    text = await self._bash(**call.arguments)
                case _:
                    return Observation("submitted", done=True)
        except (CallError, SandboxError) as error:
            text = f"error: {error}"
        return Observation(text)

    async def _source(self, path: str) -> str:
        data = await self._sandbox.read(path)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise CallError(f"{path} is not UTF-8 text") from None

    async def _view(
        self, path: str | None = None, symbol: str | None = None, line: int | None = None
    ) -> str:
        if path is None and symbol is None and line is None:
            symbol = self._function
        path = path or self._module
        source = await self._source(path)
        lines = source.removesuffix("\n").split("\n")
        first, last = 1, len(lines)
        if symbol is not None:
            span = _span(source, symbol, path)
            first, last = span.line, span.end_line
        if line is not None:
            if not 1 <= line <= len(lines):
                raise CallError(f"{path} has {len(lines)} lines")
            first = max(first, line - MAX_VIEW_LINES // 2)
        shown = lines[first - 1 : min(last, first - 1 + MAX_VIEW_LINES)]
        text = "\n".join(f"{n} {_clip(text)}" for n, text in enumerate(shown, first))
        rest = last - first + 1 - len(shown)
        return f"{text}\n({rest} more lines)" if rest > 0 else text

    async def _search(self, text: str) -> str:
        if not text.strip() or "\n" in text:
            raise CallError("search needs one line of text")
        argv = ["grep", "-rnIF", "--include=*.py", "-m", "4", "-e", text, "."]
        result = await self._sandbox.exec(argv)
        found = [line.removeprefix("./") for line in result.stdout.splitlines()]
        if not found:
            return "nothing found"
        shown = [_clip(line) for line in found[:MAX_MATCHES]]
        if len(found) > MAX_MATCHES:
            shown.append(f"({len(found) - MAX_MATCHES} more)")
        return "\n".join(shown)

    async def _edit(
        self,
        old: str,
        new: str,
        path: str | None = None,
        symbol: str | None = None,
        undo: bool = False,
    ) -> str:
        if undo:
            for edited, data in self._before_edit.items():
                await self._sandbox.write(edited, data)
            self._before_edit.clear()
        if path is None and symbol is None:
            symbol = self._function
        path = path or self._module
        source = await self._source(path)
        if not old:
            raise CallError("old is empty: give some text to replace")
        if old == new:
            raise CallError("old and new are the same")
        start, stop = _extent(source, symbol, path)
        found = occurrences(source, old, start, stop)
        if len(found) != 1:
            raise CallError(f"old occurs {len(found)} times in {symbol or path}")
        changed = source[: found[0]] + new + source[found[0] + len(old) :]
        self._before_edit.setdefault(path, source.encode())
        await self._sandbox.write(path, changed.encode())
        return EDITED

    async def _run_tests(self) -> Observation:
        if not self._checks.tests and not self._checks.build:
            return Observation("no test of this task can be run here")
        unbuilt, report = await self._checks.run(self._sandbox)
        if report is not None and report.passed(self._checks.tests):
            return Observation(f"all {len(self._checks.tests)} tests pass", passed=True)
        if report is None:
            whole = brief = f"the build fails\n{_clip(_VOLATILE.sub('', unbuilt))}"
        else:
            whole, brief = (describe_failure(report, n) for n in (MAX_FRAMES, MAX_FRAMES_LATER))
        last, self._last_failure = self._last_failure, whole
        if last == whole:
            return Observation(STILL_FAILING)
        return Observation(whole if last is None else brief)

    async def _bash(self, command: str) -> str:
        if not command.strip() or "\0" in command:
            raise CallError("bash needs a command, without NUL bytes")
        done = await self._sandbox.exec(["bash", "-c", command])
        return describe_command(done)


def describe_command(done: ExecResult) -> str:
    """What a command wrote, the middle cut out where it is long, and how it ended if not well."""
    output = "\n".join(filter(None, (done.stdout.rstrip(), done.stderr.rstrip())))
    lines = [_clip(line) for line in _VOLATILE.sub("", output).splitlines()]
    if len(lines) > MAX_VIEW_LINES:
        half = MAX_VIEW_LINES // 2
        left_out = f"({len(lines) - 2 * half} more lines)"
        lines = [*lines[:half], left_out, *lines[-half:]]
    if done.killed_by is not None:
        lines.append(f"killed: {done.killed_by}")
    elif done.exit_code:
        lines.append(f"exit code {done.exit_code}")
    return "\n".join(lines) or "no output"


def describe_failure(report: TestReport, frames: int = MAX_FRAMES) -> str:
    """The failing tests in a few lines: how many, and for the first the end of the call chain, at
    most `frames` calls, and the error.

    No durations, addresses or temporary paths: the same tree gives the same text.
    """
    if report.timed_out or report.killed_by:
        return f"test run ended early: {report.killed_by or 'deadline'}"
    bad = [case for case in report.cases if case.outcome not in ("passed", "skipped")]
    if not bad:
        tail = _VOLATILE.sub("", report.tail)
        return f"no test ran\n{_clip(tail[-MAX_LINE_CHARS:])}"
    first = next((case for case in bad if case.error), bad[0])
    lines = [f"{len(bad)} of {len(report.cases)} tests fail"]
    if not first.frames:
        lines.append(first.id)
    for frame in first.frames[-frames:]:
        lines.append(f"{frame.path}:{frame.line} {frame.function}: {_clip(frame.source_line)}")
    lines.append(_clip(_VOLATILE.sub("", first.error)) or first.outcome)
    return "\n".join(lines)


def _extent(source: str, symbol: str | None, path: str) -> tuple[int, int]:
    """Offsets of a function's first character and of the end of its last line; of the whole file
    without `symbol`, or when an edit has left a file in which functions cannot be told apart."""
    if symbol is None:
        return 0, len(source)
    try:
        functions(source)
    except InputError:
        return 0, len(source)
    span = _span(source, symbol, path)
    starts = [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
    return starts[span.line - 1], starts[span.end_line]


def occurrences(text: str, part: str, start: int = 0, stop: int | None = None) -> list[int]:
    """Where `part` lies in `text` between two offsets, overlaps counted."""
    found = []
    at = text.find(part, start, stop)
    while at >= 0:
        found.append(at)
        at = text.find(part, at + 1, stop)
    return found


def _span(source: str, symbol: str, path: str) -> FunctionSpan:
    try:
        spans = {span.name: span for span in functions(source)}
    except InputError as error:
        raise CallError(str(error)) from None
    if symbol not in spans:
        raise CallError(f"no function {symbol!r} in {path}")
    return spans[symbol]


def _clip(text: str) -> str:
    text = text.rstrip()
    return text if len(text) <= MAX_LINE_CHARS else text[: MAX_LINE_CHARS - 1] + "…"
