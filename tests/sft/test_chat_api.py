"""Whatever an endpoint answers, a turn can hold it as text and be read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model.tokenizer import SPECIAL, Tokenizer
from sandbox.agent_tools import ToolCall
from sft.chat import Malformed, Renderer, parse_calls
from sft.chat_api import MAX_CALLS, MAX_CHARS, Answer, BadAnswer, read_answer
from tests.sft.chat_server import call


def _answer(**message: Any) -> Answer:
    return read_answer({"choices": [{"message": message}]})


ARGUMENTS = [
    (r'{"old": "x", "new": "\u00fc"}', True),
    (r'{"old": "\ud800"}', False),
    (r'{"\udfff": 1}', False),
    (r'{"old": "\u003cthink\u003e"}', False),
    (r'{"old": "\u003c/tool_call\u003e"}', False),
]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("arguments", "good"), ARGUMENTS)
@pytest.mark.parametrize("name", ["edit", r"a\"b", "n" * 65])
def test_a_call_is_written_and_read_back_or_said_to_be_left_out(
    tokenizer: Tokenizer, structured: bool, arguments: str, good: bool, name: str
) -> None:
    if structured:
        answer = _answer(tool_calls=[call(json.loads(f'"{name}"'), arguments)])
    else:
        inside = f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
        answer = _answer(content=f"Look. {inside}")
    (found,) = answer.calls
    text = tokenizer.decode(Renderer(tokenizer).reply(answer.calls, answer.content))
    (read,) = parse_calls(text)
    short = len(name) <= 64 or structured  # a name given as such is cut
    if good and short and "\\" not in name:
        assert read == found == ToolCall(name[:64], json.loads(arguments))
    else:
        assert isinstance(read, Malformed) and "left out" in found
        assert not any(marker in found for marker in SPECIAL)


def test_calls_in_what_it_says_have_the_limits_of_others() -> None:
    one = '<tool_call>{"name": "view", "arguments": {}}</tool_call>'
    assert len(_answer(content=one * MAX_CALLS).calls) == MAX_CALLS
    with pytest.raises(BadAnswer, match="calls"):
        _answer(content=one * (MAX_CALLS + 1))
    with pytest.raises(BadAnswer, match="characters"):
        _answer(content=one.replace("{}", json.dumps({"old": "x" * MAX_CHARS})))


def test_no_marker_is_left_of_markers_in_markers() -> None:
    assert _answer(content="a <thi<think>nk> b").content == "a <thi nk> b"


def test_thinking_is_read_under_either_name() -> None:
    assert _answer(content="x", reasoning_content=None, reasoning="hm").thought == "hm"
    assert _answer(content="x", reasoning_content="", reasoning="hm").thought == "hm"
