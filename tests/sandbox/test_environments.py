"""One task in two environments: what decides in each, and what a shell may do."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import socket
from pathlib import Path

import pytest

from configs.errors import InputError
from sandbox import checks as checks_module
from sandbox import software
from sandbox.agent_tools import TOOLS, ToolBox, ToolCall, tools_of
from sandbox.agreement import agreement
from sandbox.base import Limits, Tree
from sandbox.checks import Checks, checks_of, suite_of
from sandbox.environments import ENVIRONMENTS, Setting, other
from sandbox.hidden import visible, without_tests
from sandbox.leased import LeasedSandbox
from sandbox.local import LocalPool
from sandbox.memo import TestMemo
from sandbox.patch import make_patch
from sandbox.verdict import Verdict, judge
from tests.sandbox.box import BACKENDS, DOCKER, Box
from tests.sandbox.test_verdict import Repair

LIMITS = Limits(memory_mib=512, processes=32, wall_s=4.0, output_bytes=20_000, file_mib=16)
PRISTINE = {
    "src/pkg/__init__.py": "from pkg.calc import add, double\n",
    "src/pkg/calc.py": (
        "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return add(a, a)\n\n\n"
        "def half(a):\n    return a // 2\n"
    ),
    "src/pkg/broken_template.py": "class {{ name }}:\n",
    "tests/test_calc.py": (
        "from pkg.calc import add, double\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
        "def test_double():\n    assert double(0) == 0\n"
    ),
    "tests/test_more.py": (
        "import pytest\nfrom pkg.calc import half\n\n\n"
        "def test_half():\n    assert half(5) == 2\n\n\n"
        "@pytest.mark.parametrize('n', [0, 2])\n"
        "def test_even(n):\n    assert half(n) * 2 == n\n\n\n"
        "def test_wrong():\n    assert half(5) == 2.5\n\n\n"
        "def test_speed():\n    assert half(1) == 0\n\n\n"
        "def test_skipped():\n    pytest.skip('no')\n"
    ),
    "tests/test_needs.py": "import package_that_is_not_there\n\n\ndef test_x():\n    pass\n",
    "tests/conftest.py": "",
}
BUGGY = {"src/pkg/calc.py": PRISTINE["src/pkg/calc.py"].replace("a + b", "a - b")}
SUITE = {
    "tests/test_calc.py::test_add",
    "tests/test_calc.py::test_double",
    "tests/test_more.py::test_half",
    "tests/test_more.py::test_even[0]",
    "tests/test_more.py::test_even[2]",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def task(tmp_path) -> Repair:
    for path, text in PRISTINE.items():
        file = tmp_path / "tree" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    overlay = {path: text.encode() for path, text in BUGGY.items()}
    return Repair(Tree(tmp_path / "tree", overlay, ("src",)))


def patch(text: str, path: str = "src/pkg/calc.py") -> str:
    """From the buggy tree to this contents of one file."""
    old = {**PRISTINE, **BUGGY}[path].encode()
    return make_patch({path: old}, {path: text.encode()})


GOLD = PRISTINE["src/pkg/calc.py"]


@pytest.fixture(scope="module")
def box():
    box = Box(BACKENDS[0], LIMITS)
    yield box
    box.close()


def judged(box: Box, task: Repair, text: str) -> dict[str, Verdict]:
    async def work() -> dict[str, Verdict]:
        return {e: await judge(task, text, box.pool, environment=e) for e in ENVIRONMENTS}

    return box.run(work())


# -- what decides


def test_the_suite_is_what_passes_on_the_release(task: Repair) -> None:
    """Twice; measured once, kept, and not taken from the memory of test runs."""
    memo = TestMemo()

    async def work():
        async with LocalPool(1, LIMITS, BACKENDS[0], memo) as pool:
            suite, again = await asyncio.gather(suite_of(task, pool), suite_of(task, pool))
            assert suite is again
            return suite, await checks_of(task, pool, "full"), pool.limits

    suite, checks, limits = asyncio.run(work())
    assert set(suite.tests) == SUITE
    assert suite.left_out["tests/test_more.py::test_wrong"] == "failed"
    assert suite.left_out["tests/test_more.py::test_skipped"] == "skipped"
    assert suite.left_out["tests/test_more.py::test_speed"] == "measures time"
    assert suite.build[3:] == ("", "pkg", "pkg.calc")  # not all modules compile
    assert memo.misses == 2 and memo.hits == 0
    assert checks.fail_to_pass == task.fail_to_pass
    assert set(checks.tests) == set(suite.tests) and len(set(checks.tests)) == len(checks.tests)
    assert checks.timeout_s > limits.wall_s
    (kept,) = (Path(os.environ["REMEND_CACHE"]) / "suites").iterdir()
    known = json.loads(kept.read_text())
    kept.write_text(json.dumps(known | {"tests": ["tests/test_calc.py::test_add"]}))

    async def later(environment):
        async with LocalPool(1, LIMITS, BACKENDS[0]) as pool:
            return await checks_of(task, pool, environment)

    assert asyncio.run(later("full")).tests == ("tests/test_calc.py::test_add",)
    assert asyncio.run(later("simplified")) == Checks(task.fail_to_pass, task.pass_to_pass)
    kept.write_text('{"tests": [1')
    with pytest.raises(InputError, match="damaged"):
        asyncio.run(later("full"))


def test_a_test_that_wavers_is_left_out(box: Box, task: Repair, monkeypatch) -> None:
    """What passes in one run of two is no evidence against a repair."""
    whole, runs = LeasedSandbox.run_tests, []

    async def wavering(self, ids, **how):
        report = await whole(self, ids, **how)
        runs.append(ids)
        cases = [
            dataclasses.replace(case, outcome="failed")
            if len(runs) == 2 and case.id.endswith("test_half")
            else case
            for case in report.cases
        ]
        return dataclasses.replace(report, cases=tuple(cases))

    monkeypatch.setattr(LeasedSandbox, "run_tests", wavering)
    suite = box.run(suite_of(task, box.pool))
    assert set(suite.tests) == SUITE - {"tests/test_more.py::test_half"}
    assert suite.left_out["tests/test_more.py::test_half"] == "failed"


def test_a_suite_that_cannot_be_run_is_not_tried_again(box: Box, task: Repair, monkeypatch) -> None:
    tries = []

    async def measure(sandbox, gold, places, build):
        tries.append(places)
        raise InputError("they exceed a limit")

    monkeypatch.setattr(checks_module, "_measure", measure)
    for _ in range(2):
        with pytest.raises(InputError, match="exceed a limit"):
            box.run(suite_of(task, box.pool))
    assert tries == [["tests"]]


def test_the_environments_disagree_where_the_task_has_no_test(box: Box, task: Repair) -> None:
    cases = {
        GOLD: ("pass", "pass"),
        BUGGY["src/pkg/calc.py"]: ("fail", "fail"),
        GOLD.replace("a // 2", "a // 2 + 1"): ("pass", "fail"),
    }
    seen = []
    for text, wanted in cases.items():
        found = judged(box, task, patch(text))
        assert tuple(found[e].verdict for e in ENVIRONMENTS) == wanted
        assert [found[e].judged_in for e in ENVIRONMENTS] == list(ENVIRONMENTS)
        seen.append({e: found[e].record() for e in ENVIRONMENTS})
    assert found["full"].build == "passed" and found["simplified"].build == ""
    assert found["full"].pass_to_pass["tests/test_more.py::test_half"] == "failed"
    # of many tests a record keeps those that did not pass
    assert set(seen[2]["full"]["pass_to_pass"]) == {
        "tests/test_more.py::test_half",
        *(f"tests/test_more.py::test_even[{n}]" for n in (0, 2)),
    }
    assert seen[0]["full"]["pass_to_pass"] == {}
    table = agreement(seen)
    assert (table["both_pass"], table["simplified_only"], table["both_fail"]) == (1, 1, 1)


def test_a_build_that_fails_is_no_repair(box: Box, task: Repair) -> None:
    text = GOLD + "\n\nif __name__ == 'pkg.calc':\n    undefined\n"
    found = judged(box, task, patch(text))["full"]
    assert found.verdict == "fail"
    assert found.build == "NameError: name 'undefined' is not defined"
    assert set(found.fail_to_pass.values()) == {"missing"}


def test_code_that_runs_at_the_build_does_not_change_the_tests(box: Box, task: Repair) -> None:
    """It may write what it likes: the tests find the clean tree."""
    text = (
        BUGGY["src/pkg/calc.py"] + "\n\nfor name in ('tests/test_calc.py', 'tests/test_more.py'):\n"
        "    with open(name) as file:\n        tests = file.read()\n"
        "    with open(name, 'w') as file:\n        file.write(tests.replace('assert', '#'))\n"
    )
    found = judged(box, task, patch(text))["full"]
    assert found.build == "passed" and found.verdict == "fail"
    assert found.fail_to_pass["tests/test_calc.py::test_add"] == "failed"


def test_a_task_that_cannot_be_judged_in_full_says_why(box: Box, task: Repair) -> None:
    wrong = dataclasses.replace(task, fail_to_pass=("tests/test_more.py::test_wrong",))
    with pytest.raises(InputError, match="cannot be judged in the full environment.*failed"):
        judged(box, wrong, patch(GOLD))


def test_agreement_against_figures_by_hand() -> None:
    def pair(simplified: str, full: str) -> dict:
        return {"simplified": {"verdict": simplified}, "full": {"verdict": full}}

    rows = [pair("pass", "pass")] * 4 + [pair("pass", "fail")] * 2 + [pair("fail", "pass")]
    rows += [pair("fail", "quarantine")] * 3
    ignored = [pair("error", "pass"), pair("pass", "error"), {"simplified": {"verdict": "pass"}}]
    found = agreement([*rows, *ignored, {"full": {}}])
    assert found == {
        "n": 10, "both_pass": 4, "simplified_only": 2, "full_only": 1, "both_fail": 3,
        "agree": 0.7,
        # chance: 0.6 × 0.5 + 0.4 × 0.5 = 0.5; (0.7 - 0.5) / 0.5
        "kappa": pytest.approx(0.4),
    }  # fmt: skip
    assert agreement([pair("fail", "fail")])["kappa"] is None
    assert agreement([])["agree"] is None


# -- the tools


def test_the_shell_is_of_the_full_environment_alone() -> None:
    names = {e: [t["function"]["name"] for t in tools_of(e)] for e in ENVIRONMENTS}
    assert tools_of("simplified") is TOOLS and "bash" not in names["simplified"]
    assert names["full"] == [*names["simplified"][:-1], "bash", "submit"]
    assert [other(e) for e in ENVIRONMENTS] == list(reversed(ENVIRONMENTS))


def test_a_bare_shell_is_refused_unless_accepted() -> None:
    for setting in (Setting(), Setting("full", shell_without_isolation=True)):
        setting.refuse_bare_shell("plain")
    Setting("full").refuse_bare_shell("bwrap")
    Setting("full").refuse_bare_shell("docker")
    with pytest.raises(InputError, match="sandbox.shell_without_isolation=true"):
        Setting("full").refuse_bare_shell("plain")


@pytest.fixture(scope="module", params=[*(k for k in BACKENDS if k != "plain"), *DOCKER])
def apart(request):
    """Sandboxes that isolate a shell."""
    box = Box(request.param, LIMITS, shell=True)
    yield box
    box.close()


def converse(box: Box, task: Repair, *commands: str, environment="full") -> list[str]:
    """What the shell answers to some commands in one episode."""

    async def work() -> list[str]:
        checks = await checks_of(task, box.pool, environment)
        async with box.pool.lease(task.tree()) as sandbox:
            tools = ToolBox(sandbox, checks, task.module, "add", environment)
            calls = [ToolCall("bash", {"command": command}) for command in commands]
            return [(await tools.call(call)).text for call in calls]

    return box.run(work())


def test_what_the_shell_says(task: Repair, apart: Box) -> None:
    told = converse(
        apart, task,
        "ls src/pkg; cd src && pwd", "echo made > note.txt", "cat note.txt", "exit 3",
        "seq 100", "ls nowhere", "sed -i s/-/+/ src/pkg/calc.py", "sleep 60", "yes", " ",
    )  # fmt: skip
    assert told[0].splitlines() == ["__init__.py", "broken_template.py", "calc.py", "/work/src"]
    assert told[1:4] == ["no output", "made", "exit code 3"]
    assert told[4].splitlines()[19:22] == ["20", "(60 more lines)", "81"]
    assert "nowhere" in told[5] and told[5].endswith("exit code 2")
    assert told[6] == "no output"
    assert told[7] == "killed: deadline"
    assert told[8].endswith("killed: output") and len(told[8].splitlines()) < 50
    assert told[9].startswith("error: ")
    assert converse(apart, task, "ls", environment="simplified")[0].startswith("error: no tool")


def test_what_the_shell_changes_is_judged_like_any_other_edit(task: Repair, apart: Box) -> None:
    """A repair by `sed` passes; tests that it changed do not count."""

    async def work() -> tuple[Verdict, Verdict, str]:
        pool = apart.pool
        checks = await checks_of(task, pool, "full")
        async with pool.lease(task.tree()) as sandbox:
            tools = ToolBox(sandbox, checks, task.module, "add", "full")
            cheat = "sed -i 's/assert/assert 1 or/' tests/*.py; echo 'x = 1' > tests/conftest.py"
            await tools.call(ToolCall("bash", {"command": cheat}))
            seen = await tools.call(ToolCall("run_tests", {}))
            spoilt = await sandbox.diff()
            repair = "sed -i 's/a - b/a + b/' src/pkg/calc.py"
            await tools.call(ToolCall("bash", {"command": repair}))
            whole = await sandbox.diff()
        cheated = await judge(task, spoilt, pool, environment="full")
        return cheated, await judge(task, whole, pool, environment="full"), seen.text

    cheated, repaired, seen = apart.run(work())
    assert seen.startswith("all ")  # in its own sandbox it may fool itself
    assert cheated.verdict == "fail" and "protected:tests/test_calc.py" in cheated.flags
    assert repaired.verdict == "pass" and "protected:tests/test_calc.py" in repaired.flags


def test_the_shell_finds_no_answer_and_no_way_out(
    task: Repair, apart: Box, tmp_path, monkeypatch
) -> None:
    """Neither the repaired file, nor the harness's own copy of the tests, nor what it was told."""
    mark = secrets.token_hex(16)
    root = task.tree().root
    (root / "src/pkg/calc.py").write_text(f"ANSWER = '{mark}'\n{GOLD}")
    pristine = root.joinpath("src/pkg/__pycache__")
    pristine.mkdir()
    for name in ("calc.cpython-311.pyc", "calc.cpython-311.opt-1.pyc"):
        (pristine / name).write_text(mark)
    secret = tmp_path / "secret"
    secret.write_text(mark)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    monkeypatch.setenv("A_SECRET_OF_THE_HOST", mark)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attacks = [
            "env; set; cat /proc/self/environ /proc/1/environ | tr '\\0' '\\n'",
            "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'",
            f"cat {secret} {root}/src/pkg/calc.py {root}/tests/test_calc.py",
            "for p in /proc/[0-9]*; do ls -l $p/fd $p/cwd/ $p/root/ 2>/dev/null; done",
            "cat /proc/[0-9]*/fd/* /proc/[0-9]*/maps 2>/dev/null & sleep 1; kill $!",
            "cat /proc/1/mem /proc/$PPID/mem /proc/kcore /dev/mem /dev/sda",
            f"grep -rsl --exclude-dir=proc --exclude-dir=sys {mark[:-1]}[{mark[-1]}] / ; true",
            f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo connected",
            "exec 3<>/dev/tcp/8.8.8.8/53 && echo connected",
            "mount -o bind / /mnt; chroot / true && echo chrooted; unshare -r true && echo own",
            f"ln -s {root} out; cat out/src/pkg/calc.py; cp -r {tmp_path} here; ls here",
            "kill -9 -1; kill -9 1 $PPID; echo done",
        ]
        told = converse(apart, task, *attacks)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    for attack, text in zip(attacks, told, strict=True):
        assert mark not in text, attack
        assert "A_SECRET_OF_THE_HOST" not in text, attack
        assert not {"connected", "chrooted", "own"} & set(text.splitlines()), attack
        if "grep" in attack:  # what it was asked for itself is all that has the mark
            assert not [line for line in text.splitlines() if line.startswith("/")], text


def test_hidden_tests_are_not_in_the_tree_of_the_agent(task: Repair, apart: Box) -> None:
    """Not as source, not compiled, not by the runner; they decide all the same."""
    mark = f"mark_{secrets.token_hex(8)}"
    root = task.tree().root
    (root / "tests/test_calc.py").write_text(
        f"import pytest\nfrom pkg.calc import add, double\n\n\nclass TestCalc:\n"
        f"    @pytest.mark.parametrize('n', [1, 2])\n    def test_add(self, n):\n"
        f"        {mark} = add(n, 3)\n        assert {mark} == n + 3\n\n"
        f"    def test_double(self):\n        assert double(0) == 0, [][0]\n"
    )
    (root / "tests/__pycache__").mkdir()
    (root / "tests/__pycache__/test_calc.cpython-311-pytest-9.1.1.pyc").write_text(mark)
    (root / "tests/test_made.py").write_text(
        f"from pkg.calc import add\nexec('def test_made(): {mark} = 1; assert add(1, 1) == 2')\n"
    )
    name = "tests/test_calc.py::TestCalc::test_"
    hidden = (f"{name}add[1]", "tests/test_made.py::test_made")
    shown = (f"{name}add[2]", f"{name}double", "tests/test_more.py::test_half")
    task = dataclasses.replace(task, fail_to_pass=hidden, pass_to_pass=shown)
    tree = without_tests(task.tree(), hidden)
    checks = visible(Checks(hidden, shown), tree, hidden)
    assert checks.tests == shown[1:]

    async def work() -> tuple[list[str], list[Verdict]]:
        async with apart.pool.lease(tree) as sandbox:
            tools = ToolBox(sandbox, checks, task.module, "add", "full")
            look = f"grep -rs {mark[:-1]}[{mark[-1]}] /work /tmp /dev/shm /run; ls tests; true"
            calls = [ToolCall("bash", {"command": look}), ToolCall("run_tests", {})]
            told = [(await tools.call(call)).text for call in calls]
            numbers = await sandbox.exec(["grep", "-n", "def test_double", "tests/test_calc.py"])
            assert numbers.stdout.startswith("11:")  # as in the file that decides
            assert await sandbox.diff() == ""
        tries = [patch(text + "x = 1\n") for text in (BUGGY["src/pkg/calc.py"], GOLD)]
        return told, [await judge(task, text, apart.pool) for text in tries]

    told, verdicts = apart.run(work())
    left = ["__pycache__", "conftest.py", "test_calc.py", "test_more.py", "test_needs.py"]
    assert told[0].splitlines() == left
    assert told[1] == "all 2 tests pass"  # though the bug is there
    assert [verdict.verdict for verdict in verdicts] == ["fail", "pass"]
    assert set(verdicts[0].fail_to_pass.values()) == {"failed"}


def test_what_is_installed_for_the_machines_python_is_other_software(tmp_path: Path, monkeypatch):
    """Its own modules are not, nor are programs and folders without code."""
    for place in ("python3.9/json", "python3.9/dist-packages/click", "bin", "tool/lib"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.py").touch()
    (tmp_path / "words").mkdir()
    monkeypatch.setattr(software, "_PLACES", (str(tmp_path),))
    found = software.other_software.__wrapped__()
    assert [path for path in found if path.startswith(str(tmp_path))] == [
        f"{tmp_path}/python3.9/dist-packages",
        f"{tmp_path}/tool",
    ]


@pytest.mark.skipif("bwrap" not in BACKENDS, reason="bubblewrap does not work here")
def test_other_software_is_covered(task: Repair) -> None:
    """Where there is a shell, no folder of /usr that brings Python modules along is seen."""
    from sandbox.software import other_software

    found = [path for path in other_software() if any(Path(path).iterdir())]
    if not found:
        pytest.skip("no other software here")
    look = f"find {' '.join(found)} -mindepth 1 | wc -l; python3 -c 'import json'; type git sed"
    box = Box("bwrap", LIMITS, shell=True)
    told = converse(box, task, look)[0].splitlines()
    assert box.pool.environment != LocalPool(1, backend="bwrap").environment
    box.close()
    assert told[0] == "0" and "exit code" not in told[-1]
