"""`remend watch RUN`: a running job in the terminal, read from its folder."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tools.run_state import RunState, plain

# shown in this order where a run has them; what is not here is in metrics.jsonl and the report
METRICS = {
    "rl/reward": "reward",
    "rl/success": "success",
    "rl/informative": "informative groups",
    "sft/loss": "loss",
    "rl/loss": "loss",
    "pretrain/loss": "loss",
    "sft/lr": "learning rate",
    "rl/lr": "learning rate",
    "sft/grad_norm": "gradient norm",
    "rl/grad_norm": "gradient norm",
    "rl/entropy": "entropy",
    "rl/kl_ref": "KL to reference",
    "mismatch/mean": "mismatch",
    "time/tokens_per_s": "tokens/s trained",
    "rollout/tokens_per_s": "tokens/s sampled",
    "time/server/tokens_per_s": "tokens/s sampled",
    "stale/mean": "staleness, mean",
    "stale/max": "staleness, max",
    "stale/dropped": "dropped as stale",
    "time/learner_idle": "learner idle",
    "time/server/idle": "servers idle",
    "time/server/serving": "servers serving",
    "time/rollout_share": "time in rollouts",
    "time/rollout_s": "rollout, s",
    "time/learn_s": "learning, s",
}
SHARES = {"rl/success", "rl/informative", "time/rollout_share"}
SHARES |= {"time/learner_idle", "time/server/idle"}
STYLES = {"pass": "green", "fail": "red", "quarantine": "yellow", "error": "yellow"}
BARS = "▁▂▃▄▅▆▇█"


def main(argv: list[str]) -> int:
    """Show a run folder until it is done or Ctrl-C; one frame where stdout is no terminal."""
    parser = argparse.ArgumentParser(prog="remend watch", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, also one that is finished")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds (1.0)")
    parser.add_argument("--json", action="store_true", help="one frame as one JSON object")
    args = parser.parse_args(argv)
    if not 0.1 <= args.every <= 3600:
        parser.error("--every must be between 0.1 and 3600 seconds")
    state = RunState(args.run)
    state.update()
    if args.json:
        print(json.dumps(as_json(state)))
        return 0
    console = Console(file=sys.stdout)
    if args.once or not console.is_terminal:
        console.print(frame(state))
        return 0
    try:
        with Live(frame(state), console=console, auto_refresh=False) as live:
            while not state.done:
                time.sleep(args.every)
                state.update()
                live.update(frame(state), refresh=True)
    except KeyboardInterrupt:  # the way to leave a job that goes on
        pass
    return 0


def as_json(state: RunState) -> dict[str, Any]:
    """What a frame shows, as plain data; times in seconds."""
    idle = state.idle_s
    return {
        "run": str(state.run),
        "stage": state.stage,
        "done": state.done,
        "step": state.step,
        "steps": state.steps,
        "episodes": state.episodes,
        "since_change_s": None if idle is None else round(idle, 1),
        "metrics": {k: v if math.isfinite(v) else None for k, v in state.values.items()},
        "sandboxes": _sandboxes(state),
        "success": _success(state),
        "last": state.last,
    }


def frame(state: RunState) -> RenderableType:
    """The view as it stands."""
    parts: list[RenderableType] = [_head(state)]
    success = _success(state)
    if success:
        rates = "   ".join(f"{policy} {rate:.1%}" for policy, rate in success.items())
        parts.append(Text(f"held-out success   {rates}", style="bold"))
    if state.values:
        parts.append(_metrics(state))
    if state.last:
        parts.append(_episodes(state))
    return Panel(Group(*parts), title=Text(plain(state.run.resolve().name)), title_align="left")


def _head(state: RunState) -> Text:
    line = Text(plain(state.stage), style="bold")
    if state.phase == state.stage:
        steps = state.steps
        line.append(f"   step {state.step}" + (f" of {steps}" if steps else ""), style="default")
    elif state.phase:
        line.append(f"   last step: {plain(state.phase)} {state.step}", style="dim")
    if state.episodes:
        line.append(f"   {state.episodes} episodes", style="default")
    sandboxes = _sandboxes(state)
    if sandboxes is not None:
        line.append(f"   {sandboxes} sandboxes", style="default")
    idle = state.idle_s
    if idle is not None and not state.done:
        line.append(f"   last change {_ago(idle)} ago", style="yellow" if idle > 120 else "dim")
    return line


def _metrics(state: RunState) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("metric", "left"), ("now", "right"), ("mean of 10", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("so far", no_wrap=True)
    for key, name in METRICS.items():
        if key not in state.values:
            continue
        curve = list(state.curves.get(key, ()))
        recent = [value for value in curve[-10:] if math.isfinite(value)]
        mean = _value(key, sum(recent) / len(recent)) if recent else "–"
        style = "" if math.isfinite(state.values[key]) else "bold red"
        table.add_row(name, Text(_value(key, state.values[key]), style), mean, spark(curve))
    return table


def _episodes(state: RunState) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("last episodes", ratio=1, no_wrap=True, overflow="ellipsis")
    for name, width in (("policy", 7), ("outcome", 10), ("turns", 5), ("s", 5)):
        table.add_column(name, no_wrap=True, min_width=width)
    table.add_column("tools, flags", ratio=1, no_wrap=True, overflow="ellipsis")
    for episode in state.last:
        tools = Text(" ".join(f"{name}×{n}" for name, n in episode["tools"].items()))
        for flag in episode["flags"]:
            tools.append(f" ⚑{flag}", style="yellow")
        outcome, seconds = episode["outcome"], episode["seconds"]
        table.add_row(
            Text(episode["task"]),
            Text(episode["policy"]),
            Text(outcome, STYLES.get(outcome, "dim")),
            str(episode["turns"]),
            "–" if seconds is None else f"{seconds:.1f}",
            tools,
        )
    return table


def spark(values: list[float], width: int = 32) -> str:
    """A curve in one line of text; values that are not finite are gaps. At most `width` signs."""
    if len(values) > width:
        cuts = [n * len(values) // width for n in range(width + 1)]
        parts = [values[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        values = [sum(part) / len(part) for part in parts]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def _success(state: RunState) -> dict[str, float]:
    """Held-out success by policy, once the run has its summary."""
    table = state.summary.get("success")
    rows = table.items() if isinstance(table, dict) else ()
    return {
        plain(policy): float(row["mean"])
        for policy, row in rows
        if isinstance(row, dict) and isinstance(row.get("mean"), (int, float))
    }


def _sandboxes(state: RunState) -> int | None:
    slots = state.config.get("sandbox", {}).get("slots")
    return slots if isinstance(slots, int) else None


def _value(key: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1%}" if key in SHARES else f"{value:.4g}"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
