"""Pre-training examples: edits that mend the code they follow, and loss where it belongs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from model.tokenizer import Tokenizer
from sandbox.agent_tools import ToolCall
from sft.chat import Renderer, parse_calls
from sft.synthetic import Function, RepairEpisodes, extract

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


def test_the_edits_of_an_example_mend_the_function(
    functions: list[Function], tokenizer: Tokenizer
) -> None:
    """Every edit quotes what the view holds just once; a repair of one edit gives the original."""
    originals = {"\n".join(f.lines) for f in functions}
    episodes = RepairEpisodes(functions, Renderer(tokenizer), seed=0)
    repairs = 0
    for _ in range(200):
        text = tokenizer.decode(episodes.example().ids)
        view, rest = _view(text)
        code = "\n".join(line.partition(" ")[2] for line in view)
        turns = [_edits(turn) for turn in rest.split("<|im_end|>") if '"edit"' in turn]
        assert all(code.count(old) == 1 for turn in turns for old, _ in turn)
        if len(turns[-1]) == 1:  # the last turn is the repair; those before were tried in vain
            repairs += 1
            assert code.replace(*turns[-1][0]) in originals
    assert repairs > 20


def _edits(turn: str) -> list[tuple[str, str]]:
    """Old and new text of the edits of one turn."""
    calls = [call for call in parse_calls(turn) if isinstance(call, ToolCall)]
    return [(c.arguments["old"], c.arguments["new"]) for c in calls if c.name == "edit"]


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
        episodes = RepairEpisodes(functions, Renderer(tokenizer), seed)
        return [list(episodes.example().ids) for _ in range(20)]

    assert stream(1) == stream(1) != stream(2)


def test_some_but_not_all_tokens_carry_loss(
    functions: list[Function], tokenizer: Tokenizer
) -> None:
    episodes = RepairEpisodes(functions, Renderer(tokenizer), seed=2)
    shares = []
    for _ in range(100):
        example = episodes.example()
        shares.append(sum(1 for w in example.weight if w) / len(example.ids))
    assert all(0 < share < 1 for share in shares)
    assert 0.1 < sum(shares) / 100 < 0.6
