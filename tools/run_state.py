"""What a run folder says of its job right now, read piece by piece while the job writes it."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError
from rl.report_charts import printable

KEPT = 400  # values of a metric that are kept for its curve
TAIL_BYTES = 1 << 20  # how much of the newest trajectory file is looked at for the last episodes
LAST = 8  # episodes shown


@dataclass
class Tail:
    """New whole records of a JSON-lines file at each call of `read`.

    A file that was replaced or cut (a resumed run takes back steps) is read anew: `rewound` is then
    true until the next read. A line that is no record is left out: a live view goes on.
    """

    path: Path
    rewound: bool = False
    _inode: int = -1
    _offset: int = 0

    def read(self) -> list[dict[str, Any]]:
        self.rewound = False
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self.rewound = self._inode >= 0
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return list(_records(data[:whole].split(b"\n")))


@dataclass
class RunState:
    """A run as it stands; `update` reads what is new.

    Attributes:
      phase, step: of the last line of `metrics.jsonl`.
      values: metric -> its last value, of the phase under way.
      curves: metric -> its last values, oldest first.
      stage: what is under way: a phase, a set of episodes such as "eval-rl", or "done".
      episodes: finished episodes of that set.
      changed: when anything last changed, seconds since the epoch; None before anything has.
      last: the newest episodes, newest first.
    """

    run: Path
    phase: str = ""
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, deque[float]] = field(default_factory=dict)
    stage: str = "not started"
    episodes: int = 0
    changed: float | None = None
    last: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    _metrics: Tail | None = None
    _partials: dict[Path, tuple[Tail, int]] = field(default_factory=dict)
    _seen: tuple[Path, int, int] | None = None

    def __post_init__(self) -> None:
        if not self.run.is_dir():
            raise InputError(f"no run folder at {self.run}")
        self._metrics = Tail(self.run / "metrics.jsonl")

    @property
    def done(self) -> bool:
        return self.stage == "done"

    @property
    def steps(self) -> int | None:
        """The steps of the phase under way, where the configuration says how many."""
        steps = self.config.get(self.phase, {}).get("steps") if self.phase == self.stage else None
        return steps if isinstance(steps, int) else None

    @property
    def idle_s(self) -> float | None:
        """Seconds since anything changed."""
        return None if self.changed is None else max(0.0, time.time() - self.changed)

    def update(self) -> None:
        self._read_config()
        self._read_metrics()
        files = _by_age((self.run / "trajectories").glob("*.jsonl*"))
        self._read_stage(files)
        if files:
            self._read_last(files[-1])
        times = [self._time(name) for name in ("metrics.jsonl", "summary.json")]
        times += [_mtime(path) for path in files[-1:]]
        self.changed = max((t for t in times if t), default=None)

    def _read_config(self) -> None:
        path = self.run / "config.yaml"
        if self.config or not path.exists():
            return
        import yaml

        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return
        if isinstance(config, dict):
            self.config = {k: v for k, v in config.items() if isinstance(v, dict)}

    def _read_metrics(self) -> None:
        assert self._metrics is not None
        records = self._metrics.read()
        if self._metrics.rewound:
            self.phase, self.step = "", 0
            self.values.clear()
            self.curves.clear()
        for record in records:
            phase, step = str(record.get("phase", "")), record.get("step")
            if not isinstance(step, (int, float)):
                continue
            if phase != self.phase:
                self.values = {}
            self.phase, self.step = phase, int(step)
            for key, value in record.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and key not in ("step", "seed"):
                    self.values[key] = float(value)
                    self.curves.setdefault(key, deque(maxlen=KEPT)).append(float(value))
        self._derive()

    def _derive(self) -> None:
        """Tokens that the policy sampled a second, which no metric of a synchronous run holds."""
        rl = self.config.get("rl", {})
        sizes = [rl.get("tasks_per_step"), rl.get("group_size")]
        tokens, seconds = (self.values.get(k) for k in ("rl/tokens", "time/rollout_s"))
        known = all(isinstance(size, int) for size in sizes)
        if known and tokens and seconds and "time/server/tokens_per_s" not in self.values:
            self.values["rollout/tokens_per_s"] = tokens * sizes[0] * sizes[1] / seconds
        if seconds is not None and "time/learner_idle" not in self.values:
            learn = self.values.get("time/learn_s", 0.0)
            self.values["time/rollout_share"] = seconds / max(seconds + learn, 1e-9)

    def _read_stage(self, files: list[Path]) -> None:
        summary, metrics = self._time("summary.json"), self._time("metrics.jsonl")
        newest = _mtime(files[-1]) if files else 0.0
        partial = [path for path in files if path.name.endswith(".partial")]
        if summary and summary >= max(metrics, newest):
            self.stage = "done"
            self.summary = _json(self.run / "summary.json")
        elif partial and _mtime(partial[-1]) >= metrics:
            self.stage = partial[-1].name.partition(".jsonl")[0]
        elif self.phase:
            self.stage = self.phase
        elif files:
            self.stage = files[-1].name.partition(".jsonl")[0]
        same = [path for path in files if path.name.partition(".jsonl")[0] == self.stage]
        self.episodes = sum(self._count(path) for path in same)

    def _count(self, path: Path) -> int:
        tail, count = self._partials.get(path) or (Tail(path), 0)
        fresh = len(tail.read())
        count = fresh if tail.rewound else count + fresh
        self._partials[path] = (tail, count)
        return count

    def _read_last(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                seen = (path, status.st_ino, status.st_size)
                if seen == self._seen:
                    return
                self._seen = seen
                start = max(0, status.st_size - TAIL_BYTES)
                file.seek(start)
                lines = file.read().split(b"\n")
        except FileNotFoundError:  # a partial file that has just become whole
            return
        whole = lines[1 if start else 0 : -1]
        records = [r for r in _records(whole[-LAST:]) if "task" in r]
        self.last = [_short(record, path) for record in reversed(records)]

    def _time(self, name: str) -> float:
        return _mtime(self.run / name)


def _short(record: dict[str, Any], path: Path) -> dict[str, Any]:
    verdict = record.get("verdict")
    verdict = verdict if isinstance(verdict, dict) else {}
    turns, tools = record.get("turns"), record.get("tool_counts")
    seconds = record.get("seconds")
    return {
        "task": plain(record["task"]),
        "policy": plain(record.get("policy", "")),
        "outcome": plain(verdict.get("verdict", "none")),
        "flags": [plain(flag) for flag in verdict.get("flags") or []],
        "turns": len(turns) if isinstance(turns, list) else 0,
        "tools": {plain(k): v for k, v in tools.items()} if isinstance(tools, dict) else {},
        "seconds": seconds if isinstance(seconds, (int, float)) else None,
        "file": path.name.partition(".jsonl")[0],
    }


def plain(text: object) -> str:
    """`text` without what a terminal would obey: agents choose names of tools."""
    return printable(str(text)[:200])


def _records(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _by_age(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (_mtime(path), path.name))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
