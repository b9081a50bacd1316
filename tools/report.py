"""`remend report RUN`: a run or a study as a page, two runs beside each other, figures."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import util
from pathlib import Path
from typing import Any

from configs.errors import InputError
from rl.figures import write_figures
from rl.report import figures_of, write_comparison, write_report
from rl.report_study import figures_of_study, is_study, write_study


def main(argv: list[str]) -> int:
    """Write RUN/report.html; with --compare RUN_A/compare-RUN_B.html; with --figures SVG files."""
    parser = argparse.ArgumentParser(prog="remend report", description=__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a folder of a run or a study"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="two runs on one page: differences paired by task, RUN_A/compare-RUN_B.html",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the comparison")
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="write each figure there as SVG, and as PDF where matplotlib is installed",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.compare and len(args.runs) != 2:
        raise InputError(f"--compare takes two runs, got {len(args.runs)}")
    if not args.compare and len(args.runs) > 1:
        raise InputError("one run a page: for two beside each other add --compare")
    if args.compare and args.figures:
        raise InputError("--figures are of one run: leave out --compare")
    if args.out and not args.compare:
        raise InputError("--out is for --compare: the page of one run lies in its folder")
    found = _compare(args.runs, args.out) if args.compare else _report(args.runs[0], args.figures)
    print(json.dumps(found) if args.json else found["report"])
    return 0


def _report(run: Path, figures: Path | None) -> dict[str, Any]:
    study = is_study(run)
    found: dict[str, Any] = {"report": str(write_study(run) if study else write_report(run))}
    if figures is not None:
        written = write_figures(figures_of_study(run) if study else figures_of(run), figures)
        found["figures"] = [str(path) for path in written]
        kinds = "SVG and PDF" if util.find_spec("matplotlib") else "SVG"
        count = sum(path.suffix == ".svg" for path in written)
        print(f"{count} figures as {kinds} in {figures}", file=sys.stderr)
        if kinds == "SVG":
            print("for PDF too: pip install 'remend[figures]'", file=sys.stderr)
    return found


def _compare(runs: list[Path], out: Path | None) -> dict[str, Any]:
    path, differences = write_comparison(runs[0], runs[1], out)
    return {"report": str(path), "policies": differences}
