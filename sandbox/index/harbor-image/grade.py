"""Did every test pass? Exit code 0 if so, 1 otherwise.

    python3 grade.py OUTPUT TESTS

OUTPUT is what pytest (-rA), Django's runner (verbose) or SymPy's (verbose) printed; TESTS names the
tests, as in the dataset. Runs on whatever Python an image has, from 3.5 on.
"""

import json
import re
import sys

GOOD = ("PASSED", "XFAIL", "ok", "expected failure")
LINES = (
    re.compile(r"(?P<outcome>PASSED|XFAIL|FAILED|ERROR|XPASS) (?P<test>[^\s:]+\.py(::.*)?)"),
    re.compile(r"(?P<test>\w+ \([\w.]+\)).* \.\.\. (?P<outcome>ok|FAIL|ERROR|expected failure)"),
    re.compile(r"(?P<test>test_\w+) (?P<outcome>ok|F|E|f|s)( |$)"),
)
COLOUR = re.compile(r"\x1b\[\d+m")


def outcomes(output: str) -> dict:
    """What became of each test, by its names: as printed, and without its file."""
    found = {}
    for line in COLOUR.sub("", output).splitlines():
        for pattern in LINES:
            match = pattern.match(line)
            if match:
                test, outcome = match.group("test"), match.group("outcome")
                if outcome != "PASSED":
                    test = test.partition(" - ")[0]
                found[test] = outcome
                found[test.partition("::")[2].replace("::", ".")] = outcome
                break
    return found


def main() -> int:
    output = open(sys.argv[1], encoding="utf-8", errors="replace").read()
    tests = json.load(open(sys.argv[2], encoding="utf-8"))
    seen = outcomes(output)
    bad = [
        "{}: {}".format(test, seen.get(test, "not seen"))
        for test in tests["fail_to_pass"] + tests["pass_to_pass"]
        if seen.get(test) not in GOOD
    ]
    print("\n".join(bad) or "all passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
