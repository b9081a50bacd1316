"""`remend report RUN`: write the run folder's report.html and say where it lies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rl.report import write_report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="remend report", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, for example runs/quickstart")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    path = write_report(arguments.run)
    print(json.dumps({"report": str(path)}) if arguments.json else path)
    return 0
