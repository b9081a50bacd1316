"""An endpoint as the teacher, over real HTTP and through the real command line."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import InputError
from model.tokenizer import Tokenizer
from rl.agent import AgentConfig, _sample
from rl.endpoint import EndpointPolicy
from sandbox.agent_tools import TOOLS, ToolCall
from sft.chat import Renderer
from sft.chat_api import Declined, opening
from sft.endpoint import Endpoint, EndpointConfig, OutOfBudget
from sft.spending import Budget, Prices, Spending
from sft.trajectory import FORCED, Trajectory, load
from tests.sft.chat_server import ChatServer, Messages, call, say
from tests.tools.hosts import CONFIG, OPERATORS, ROOT, prepare
from tools import cli

FAST = {"pause_s": 0.01, "request_s": 2.0, "api_key_env": "TEACHER_KEY", "model": "big"}
KEY = "sk-very-secret"


def repair(messages: Messages) -> dict[str, Any]:
    """Look, put the right operator in, test, submit; from the messages alone."""
    name = re.search(r"bug in `(\w+)`", messages[1]["content"])
    assert name
    seen = [m["content"] for m in messages if m["role"] == "tool"]
    if not seen:
        return say(call("view", {}), content="I look at it first.")
    if not any(text.startswith("all ") for text in seen):
        (wrong,) = re.findall(r"return a (\S+) b", seen[0])
        edit = {"old": f"a {wrong} b", "new": f"a {OPERATORS[name[1]]} b"}
        return say(call("edit", edit), call("run_tests", {}))
    return say(call("submit", {}))


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer(repair, KEY)
    yield server
    server.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    before = os.environ.get("REMEND_CACHE")
    os.environ["REMEND_CACHE"] = str(folder / "cache")
    prepare(folder)
    config = {**CONFIG, "mesh": {}, "teach": {"tries": 2, "teacher": "endpoint", "endpoint": FAST}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    if before is None:
        del os.environ["REMEND_CACHE"]
    else:
        os.environ["REMEND_CACHE"] = before
    return folder


@pytest.fixture(autouse=True)
def there(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    monkeypatch.setenv("REMEND_CACHE", str(site / "cache"))
    monkeypatch.setenv("TEACHER_KEY", KEY)


def teach(run: str, server: ChatServer, *more: str) -> list[str]:
    url = f"teach.endpoint.base_url={server.url}"
    return ["teach", "run.yaml", "--out", run, "--json", url, *more]


def test_it_plays_the_loop_of_every_policy_whatever_goes_wrong(
    server: ChatServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight episodes, each fault once or more: all are solved, and in the schema that SFT
    reads."""
    server.faults.extend(["429", "500", "cut", "garbage", "empty", "hang", "drip", "huge"])
    command = teach("faults", server, "teach.endpoint.attempts=20")
    assert cli.main(command) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["episodes"] == 8 and outcome["success"] == 1.0
    # four tasks, twice the same patch
    assert outcome["kept"] == 4 and outcome["dropped"] == {"has the patch of another": 4}
    assert server.broken == [] and len(server.paid) >= 8 * 3  # on a busy machine some come late
    assert outcome["completion_tokens"] >= 20 * len(server.paid)
    for t in load(Path("faults/trajectories/teacher.jsonl")):
        assert t.policy == "teacher" and t.stop == "submit" and len(t.turns) == 3
        assert t.turns[0].text.startswith("I look at it first.\n<tool_call>")
        assert [c["name"] for turn in t.turns for c in turn.calls] == [
            *("view", "edit", "run_tests", "submit")
        ]
        assert set(t.author) == {0, 1} and len(t.ids) == len(t.author)
    assert not any(KEY.encode() in p.read_bytes() for p in Path("faults").rglob("*") if p.is_file())
    # once more: nothing is left to ask for, and no key is needed to see that
    asked = len(server.requests)
    monkeypatch.delenv("TEACHER_KEY")
    assert cli.main(command) == 0 and len(server.requests) == asked
    again = json.loads(capsys.readouterr().out)
    assert again == outcome and again["completion_tokens"] > 0


@pytest.mark.service
def test_its_episodes_are_what_sft_learns_from(server: ChatServer) -> None:
    command = teach("tuned", server, "sft.epochs=1")
    assert cli.main(["sft", *command[1:]]) == 0
    assert (Path("tuned") / "snapshots" / "sft" / "config.json").exists()


def test_bad_calls_are_observations(server: ChatServer, site: Path) -> None:
    def confused(messages: Messages) -> dict[str, Any]:
        turn = sum(m["role"] == "assistant" for m in messages)
        if turn == 0:
            return say(content="Let me think.</think> <|im_end|> Done!")
        if turn == 1:
            return say(call("edit", '{"old": "x"'), call("view", {"line": "x"}), call("rm", {}))
        if turn == 2:
            return say(call("edit", {"old": "<tool_call>", "new": "\ud800"}))
        return say(call("submit", {}), call("view", {}))

    server._act = confused
    assert cli.main(teach("confused", server, "teach.tries=1")) == 0
    assert server.broken == []
    for t in load(Path("confused/trajectories/teacher.jsonl")):
        assert not t.success and t.stop == "submit"
        first, second, third, last = (turn.observations for turn in t.turns)
        assert first == ["error: no complete tool call"]
        assert second[0].startswith("error: expected") and "must be an integer" in second[1]
        assert "no tool 'rm'" in second[2]
        assert len(third) == 1 and third[0].startswith("error: ")
        assert last == ["submitted"]
        assert t.turns[0].text == "Done!<|im_end|>"


@pytest.mark.service
def test_kill_9_and_again_pays_for_no_finished_episode_twice(server: ChatServer) -> None:
    server.delay = 0.05
    command = [sys.executable, "-m", "tools.cli", *teach("killed", server)]
    command.append("teach.endpoint.concurrency=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    partial = Path("killed/trajectories/teacher.jsonl.partial")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = load(partial)
    asked = len(server.requests)
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    after = {body["seed"] for _, body in server.requests[asked:]}
    for t in finished:  # each turn has a seed of its own
        turns = range(1, 5)
        assert not after & {(t.seed + 1000 * turn) % 2**31 for turn in turns}
    whole = load(Path("killed/trajectories/teacher.jsonl"))
    assert len(whole) == 8 and all(t in whole for t in finished)
    spent = Spending(Path("killed"), Prices(), Budget())
    assert sum(spent.tokens) >= sum(map(sum, server.paid))  # what was cut off counts in full


@pytest.mark.service
def test_the_budget_is_kept_and_may_be_raised(
    server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = "teach.endpoint.prices={prompt: 10.0, completion: 20.0}"

    def command(usd: float, *more: str) -> list[str]:
        return teach("poor", server, prices, f"teach.endpoint.budget={{usd: {usd}}}", *more)

    assert cli.main(command(0.15)) == 2
    assert "the budget lasted for" in capsys.readouterr().err
    done = len(load(Path("poor/trajectories/teacher.jsonl.partial")))
    assert 0 < done < 8
    spent = sum(p * 10e-6 + c * 20e-6 for p, c in server.paid)
    assert 0 < spent <= 0.15
    # the same budget does not grow, a higher one goes on, and one may do without the rest
    assert cli.main(command(0.15)) == 2
    assert sum(p * 10e-6 + c * 20e-6 for p, c in server.paid) <= 0.15
    assert cli.main([*command(0.16), "agent.max_turns=3"]) == 2
    assert "another config" in capsys.readouterr().err
    assert cli.main(command(0.16, "teach.endpoint.when_spent=train")) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert done <= outcome["episodes"] < 8 and outcome["usd"] <= 0.16
    assert sum(p * 10e-6 + c * 20e-6 for p, c in server.paid) <= outcome["usd"] + 1e-9


def test_an_episode_that_the_budget_cut_short_is_run_again(server: ChatServer) -> None:
    """The budget is for a turn and a half."""

    def command(run: str, tokens: int, *more: str) -> list[str]:
        some = ("teach.endpoint.concurrency=1", "teach.tries=1")
        return teach(run, server, f"teach.endpoint.budget={{tokens: {tokens}}}", *some, *more)

    assert cli.main(command("short", 3450)) == 2
    (cut,) = load(Path("short/trajectories/teacher.jsonl.partial"))
    assert cut.stop == "budget" and len(server.paid) == 1
    assert cli.main(command("short", 10**6)) == 0
    whole = load(Path("short/trajectories/teacher.jsonl"))
    assert [t.stop for t in whole] == ["submit"] * 4 and whole[0].seed == cut.seed
    # what is trained on may be some; what is measured may not
    some = "teach.endpoint.when_spent=train"
    assert cli.main(command("some", 3450, some)) == 0
    assert [t.stop for t in load(Path("some/trajectories/teacher.jsonl"))] == ["budget"]
    assert cli.main(["eval", *command("measured", 3450, some)[1:], "--policy", "teacher"]) == 2


def test_it_is_offered_the_tools_of_the_environment(server: ChatServer) -> None:
    server.tools.insert(4, "bash")
    shell = ("environment=full", "sandbox.shell_without_isolation=true")
    assert cli.main(teach("full", server, *shell, "teach.tries=1")) == 0
    assert server.broken == [] and len(server.paid) == 4 * 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teach.endpoint.api_key_env=NO_SUCH", r"\$NO_SUCH is not set"),
        ("teach.endpoint.base_url=ftp://x", "expected http"),
        ("teach.endpoint.base_url=https://:hush@host/v1", "without a user or password"),
        ("teach.endpoint.base_url=https://hush@host/v1", "without a user or password"),
        ("teach.endpoint.base_url=http://host:99999/v1", "expected http"),
        ("teach.endpoint.base_url='http://[::1/v1'", "expected http"),
        ("teach.endpoint.base_url='http://a b/v1'", "expected http"),
        ("teach.endpoint.api_key_env=ODD_KEY", "printable ASCII"),
        ("teach.endpoint.model=''", "model is needed"),
        ("teach.endpoint.budget={usd: 1.0}", "needs teach.endpoint.prices"),
        ("teach.endpoint.extra={seed: 1}", "may not set seed"),
        ("teach.endpoint.attempts=0", "attempts must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    server: ChatServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    message: str,
) -> None:
    monkeypatch.setenv("ODD_KEY", "hush\nclé")
    assert cli.main(teach("refused", server, override)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "hush" not in error
    assert not Path("refused").exists() and not server.requests


def test_a_refusal_is_one_line_without_the_key(
    server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults.extend([("status", 401, f"bad key {KEY}")] * 9)
    assert cli.main(teach("unwelcome", server)) == 2
    error = capsys.readouterr().err
    assert "HTTP 401: bad key [key]" in error and KEY not in error
    assert error.count("remend: error") == 1


def _ask(server: ChatServer, tmp_path: Path, **more: Any) -> Any:
    config = EndpointConfig(base_url=server.url, **{**FAST, **more})

    async def go() -> Any:
        endpoint = Endpoint(config, Spending(tmp_path, config.prices, config.budget))
        try:
            answer = await endpoint.answer(opening("a bug in `lt` in"), TOOLS, 0)
            return answer, endpoint.spending.tokens
        finally:
            await endpoint.close()

    return asyncio.run(go())


def test_retry_after_is_kept_and_costs_nothing(server: ChatServer, tmp_path: Path) -> None:
    server.faults.append("429")
    _, tokens = _ask(server, tmp_path)
    (first, _), (second, _) = server.requests
    assert second - first >= 0.4
    assert [tokens] == server.paid


def test_what_may_have_been_paid_for_counts(server: ChatServer, tmp_path: Path) -> None:
    server.faults.extend(["hang", "cut"])
    _, tokens = _ask(server, tmp_path, request_s=1.5, max_tokens=100)
    assert tokens[1] == 20 + 2 * 100 and tokens[0] > 2 * server.paid[0][0]
    assert Spending(tmp_path, Prices(), Budget()).tokens == tokens


def test_only_this_conversation_is_given_up(server: ChatServer, tmp_path: Path) -> None:
    server.faults.append(("status", 400, "This model's maximum context length is 8192 tokens"))
    with pytest.raises(Declined):
        _ask(server, tmp_path)
    server.faults.append(("status", 400, "content-type: expected something else"))
    with pytest.raises(InputError, match="content-type"):
        _ask(server, tmp_path)
    assert Spending(tmp_path, Prices(), Budget()).tokens == (0, 0)
    server.finish_reason = "content_filter"
    with pytest.raises(Declined):
        _ask(server, tmp_path, max_tokens=100)
    assert Spending(tmp_path, Prices(), Budget()).tokens[1] == 100


def test_it_gives_up_in_one_line(server: ChatServer, tmp_path: Path) -> None:
    server.faults.extend(["500"] * 3)
    with pytest.raises(InputError, match="HTTP 500: oops; gave up after 3 attempts"):
        _ask(server, tmp_path, attempts=3)
    server.faults.append("429")
    with pytest.raises(InputError, match="asks to wait"):
        _ask(server, tmp_path, longest_pause_s=0.1)


def test_nothing_is_sent_beyond_the_budget(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(OutOfBudget):
        _ask(server, tmp_path, max_tokens=100, budget=Budget(tokens=100))
    assert not server.requests


def test_a_budget_for_thinking_holds_for_the_teacher_too(
    server: ChatServer, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Where it thinks too long what it says behind is kept; where it does not, all is."""
    thought = "I look. " * 9

    def act(messages: Messages) -> dict[str, Any]:
        return {**say(call("view", {}), content="Look."), "reasoning_content": thought}

    server._act = act
    renderer = Renderer(tokenizer, thinking=True)
    said = renderer.reply([ToolCall("view", {})], "Look.")
    whole = renderer.reply([ToolCall("view", {})], "Look.", thought.strip())
    config = EndpointConfig(base_url=server.url, **FAST)

    async def turns(thinking: int) -> Trajectory:
        found = Trajectory("t", "p", "o", "train", "teacher", 0, -1, "")
        limits = AgentConfig(max_new_tokens=999, thinking=True, thinking_budget=thinking)
        endpoint = Endpoint(config, Spending(tmp_path, config.prices, config.budget))
        try:
            session = await EndpointPolicy(endpoint, renderer).open(0)
            for text in ("a bug in `lt` in", "seen"):
                assert await _sample(found, session, [1], [text], 999, renderer, limits)
        finally:
            await endpoint.close()
        return found

    found = asyncio.run(turns(5))
    forced = [i for i, a in zip(found.ids, found.author, strict=True) if a == FORCED]
    assert forced == renderer.enough() * 2
    assert found.ids == [*whole[:5], *renderer.enough(), *said] * 2
    assert asyncio.run(turns(len(whole) - 2)).ids == whole * 2
    assert server.broken == []
    # it is shown what it said, and not what it thought
    assert [
        body["messages"][2]["content"] for _, body in server.requests if body["messages"][2:]
    ] == [
        "Look.",
        "Look.",
    ]
