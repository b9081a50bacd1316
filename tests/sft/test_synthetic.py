"""Pre-training examples: edits that mend the code they follow, and loss where it belongs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from model.tokenizer import Tokenizer
from sandbox.agent_tools import ToolCall, occurrences
from sft.chat import Renderer, parse_calls
from sft.synthetic import Function, MixConfig, RepairEpisodes, extract

SOURCE = Path(random.__file__).read_text()


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    return list(extract("random.py", SOURCE))


def test_functions_are_shown_as_they_stand_in_the_file(functions: list[Function]) -> None:
    lines = SOURCE.split("\n")
    assert len(functions) > 10
    for f in functions:
        assert list(f.lines) == lines[f.line - 1 : f.line - 1 + len(f.lines)]
        assert f.mendable and set(f.mendable) <= set(f.bugs)


def test_excerpts_mend_the_function_they_show(
    functions: list[Function], tokenizer: Tokenizer
) -> None:
    """Every edit quotes what the view holds just once; one that is alone gives the original."""
    originals = {"\n".join(f.lines) for f in functions}
    episodes = RepairEpisodes(functions, Renderer(tokenizer), 0, MixConfig(tries=0.0))
    repairs = 0
    for _ in range(200):
        code, (turn,) = _turns(tokenizer.decode(episodes.example().ids))
        edits = _edits(turn)
        assert all(code.count(old) == 1 for old, _, _ in edits)
        assert not any(undo for _, _, undo in edits)
        if len(edits) == 1:
            repairs += 1
            assert code.replace(*edits[0][:2]) in originals
    assert repairs > 20


def test_tries_come_one_by_one_and_tell_what_the_tools_would_say(
    functions: list[Function], tokenizer: Tokenizer
) -> None:
    originals = {"\n".join(f.lines) for f in functions}
    mix = MixConfig(tries=1.0, prompted=0.5, slips=0.4, changed=0.5)
    episodes = RepairEpisodes(functions, Renderer(tokenizer), 1, mix)
    seen = dict.fromkeys(("refused", "undo", "repair", "prompt"), 0)
    for _ in range(200):
        text = tokenizer.decode(episodes.example().ids)
        seen["prompt"] += "Tests fail because" in text
        code, turns = _turns(text)
        applied = []
        for i, turn in enumerate(turns):
            ((old, new, undo),) = _edits(turn)
            assert undo == (i > 0)  # nothing to take back before the first
            seen["undo"] += undo
            answer = turn.partition("<tool_response>\n")[2]
            last = i == len(turns) - 1
            assert last == (" tests pass" in answer)
            if answer.startswith("edited"):
                assert code.count(old) == 1 and old != new
                applied.append((old, new))
            else:
                seen["refused"] += 1
                found = len(occurrences(code, old))
                why = "old and new are the same" if old == new else f"old occurs {found} times in "
                assert answer.startswith(f"error: {why}") and (old == new or found != 1)
        assert applied and len(applied) == len(set(applied))
        if len(applied) == 1:
            seen["repair"] += 1
            assert code.replace(*applied[0]) in originals
    assert all(count > 20 for count in seen.values()), seen


def test_tries_may_share_a_turn_which_ends_when_the_tests_pass(
    functions: list[Function], tokenizer: Tokenizer
) -> None:
    mix = MixConfig(tries=1.0, slips=0.2, joined=0.5)
    episodes = RepairEpisodes(functions, Renderer(tokenizer), 4, mix)
    shared = dropped = 0
    for _ in range(200):
        code, turns = _turns(tokenizer.decode(episodes.example().ids))
        for i, turn in enumerate(turns):
            edits, (said, _, heard) = _edits(turn), turn.partition("<|im_end|>")
            answers = heard.count("<tool_response>")
            passed = heard.count(" tests pass")
            assert said.count("run_tests") == len(edits)
            assert passed == (i == len(turns) - 1)
            assert answers == 2 * len(edits) or passed and answers < 2 * len(edits)
            assert [undo for _, _, undo in edits] == [i + k > 0 for k in range(len(edits))]
            if "edited" in heard:
                assert all(code.count(old) == 1 for old, _, _ in edits)
            shared += len(edits) > 1
            dropped += answers < 2 * len(edits)
    assert shared > 30 and dropped > 10


def test_no_loss_on_an_edit_that_the_tools_refuse(
    functions: list[Function], tokenizer: Tokenizer
) -> None:
    """Learnt edits are those that apply: with loss, `edit` is only ever followed by them."""
    mix = MixConfig(tries=1.0, slips=1.0)
    episodes = RepairEpisodes(functions, Renderer(tokenizer), 3, mix)
    for _ in range(50):
        example = episodes.example()
        learnt = [i if w else 0 for i, w in zip(example.ids, example.weight, strict=True)]
        text = tokenizer.decode(example.ids)
        _, turns = _turns(text)
        applied = [t for t in turns if "<tool_response>\nedited" in t]
        assert len(applied) * 2 == len(turns)
        opening = tokenizer.encode('{"name": "edit", "arguments": {"old": "', special=False)
        assert len(opening) == 1 and learnt.count(opening[0]) == len(applied)


def _turns(text: str) -> tuple[str, list[str]]:
    """The code on view, and the text of each turn that edits, with what was answered."""
    view, rest = _view(text)
    code = "\n".join(line.partition(" ")[2] for line in view)
    turns = rest.split("<|im_start|>assistant")
    return code, [turn for turn in turns if '"edit"' in turn]


def _edits(turn: str) -> list[tuple[str, str, bool]]:
    """Old text, new text and undo of the edits of one turn."""
    calls = [call for call in parse_calls(turn) if isinstance(call, ToolCall)]
    edits = [call.arguments for call in calls if call.name == "edit"]
    return [(e["old"], e["new"], e.get("undo", False)) for e in edits]


def _view(text: str) -> tuple[list[str], str]:
    """The first view's numbered lines, and the text behind it."""
    for block in text.split("<tool_response>\n")[1:]:
        body, _, _ = block.partition("\n</tool_response>")
        lines = body.split("\n")
        if all(line.partition(" ")[0].isdigit() for line in lines):
            return lines, text.partition(body)[2]
    raise AssertionError("no view")


def test_the_seed_decides_the_examples(functions: list[Function], tokenizer: Tokenizer) -> None:
    def stream(seed: int) -> list[list[int]]:
        episodes = RepairEpisodes(functions, Renderer(tokenizer), seed, MixConfig())
        return [list(episodes.example().ids) for _ in range(20)]

    assert stream(1) == stream(1) != stream(2)


def test_some_but_not_all_tokens_carry_loss(
    functions: list[Function], tokenizer: Tokenizer
) -> None:
    episodes = RepairEpisodes(functions, Renderer(tokenizer), 2, MixConfig(tries=0.5))
    shares = []
    for _ in range(100):
        example = episodes.example()
        shares.append(sum(1 for w in example.weight if w) / len(example.ids))
    assert all(0 < share < 1 for share in shares)
    assert 0.1 < sum(shares) / 100 < 0.6
