"""From tracks to rows: tokens a second, ratios, and whether a peer computes the same at all."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.bench.peer import OURS, REFERENCE, Call
from tools.bench.rounds import Track

# How far a measure's results may lie from the reference's: nats of the loss of the first steps,
# nats of any log-probability, share of sampled ids. One near-tie in float32 turns all that follows
# in its row into other ids; a library that rounds to bfloat16 turns most rows.
TOLERANCE = {"train": 1e-3, "logprobs": 1e-3, "sample": 0.25}
FIRST_STEPS = 3


@dataclass(frozen=True)
class Row:
    """One peer in one measure.

    value: tokens a second of wall time, the median over rounds; low, high: its quartiles.
    ratio: remend's speed over this peer's in the same round, the median over rounds, so more than
    1 where remend is faster; ratio_low, ratio_high: its quartiles. None without remend.
    per_cpu_s: tokens a second of processor time, the median.
    first_call_s: the first call, compilation included. peak_mib: of the process that did this.
    difference: largest distance of its results from the reference's, see TOLERANCE; None for the
    reference itself. same: whether that, and the peer's log-probabilities, are within tolerance.
    """

    name: str
    measure: str
    value: float
    low: float
    high: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    per_cpu_s: float
    first_call_s: float
    peak_mib: float
    difference: float | None
    same: bool


def rows(measured: Mapping[str, Mapping[str, Track]], tokens: Mapping[str, int]) -> list[Row]:
    """All rows.

    Args:
        measured: tracks by measure, then peer.
        tokens: by measure, the tokens of one call.
    """
    out = []
    apart = differences(measured)
    odd = {peer for (what, peer), d in apart.items() if what == "logprobs" and not _ok(what, d)}
    for measure, tracks in measured.items():
        ours = _seconds(tracks[OURS]) if OURS in tracks else None
        for name, track in tracks.items():
            seconds, count = _seconds(track), tokens[measure]
            low, value, high = quartiles([count / s for s in seconds])
            ratios = [s / o for s, o in zip(seconds, ours, strict=True)] if ours else []
            ratio = quartiles(ratios) if ratios else (None, None, None)
            difference = apart.get((measure, name))
            out.append(
                Row(
                    name=name,
                    measure=measure,
                    value=value,
                    low=low,
                    high=high,
                    ratio=ratio[1],
                    ratio_low=ratio[0],
                    ratio_high=ratio[2],
                    per_cpu_s=statistics.median(count / c.cpu_seconds for c in track.timed),
                    first_call_s=track.calls[0].seconds,
                    peak_mib=track.calls[-1].peak_mib,
                    difference=difference,
                    same=name not in odd and (difference is None or _ok(measure, difference)),
                )
            )
    return out


def reference(tracks: Mapping[str, Track]) -> str | None:
    """The peer whose results the others' are compared with."""
    return next((name for name in (REFERENCE, OURS) if name in tracks), None)


def differences(
    measured: Mapping[str, Mapping[str, Track]],
) -> dict[tuple[str, str], float]:
    """By measure and peer, how far its results lie from the reference's."""
    out = {}
    for measure, tracks in measured.items():
        judge = reference(tracks)
        if judge is None:
            continue
        for name, track in tracks.items():
            if name != judge:
                out[measure, name] = _difference(measure, track.calls, tracks[judge].calls)
    return out


def _difference(measure: str, theirs: Sequence[Call], judge: Sequence[Call]) -> float:
    if measure == "train":
        steps = zip(theirs[:FIRST_STEPS], judge[:FIRST_STEPS], strict=False)
        return _largest(a.result - b.result for a, b in steps)
    pairs = list(zip(_flat(theirs[0].result), _flat(judge[0].result), strict=True))
    if measure == "logprobs":
        return _largest(a - b for a, b in pairs)
    return sum(a != b for a, b in pairs) / len(pairs)


def _largest(values: Iterator[float]) -> float:
    """Largest magnitude; the largest float if any value is not a number, which `max` may lose."""
    return max(abs(v) if math.isfinite(v) else sys.float_info.max for v in values)


def _ok(measure: str, difference: float) -> bool:
    return difference <= TOLERANCE[measure]


def _flat(result: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for row in result for value in row]


def _seconds(track: Track) -> list[float]:
    return [call.seconds for call in track.timed]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, between the values where they fall between."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
