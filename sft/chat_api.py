"""The chat-completions contract: an episode as messages, and what must be true of an answer.

An endpoint's answer is as hostile as a policy's: nothing of it is used before it was checked here,
and what it wrote becomes the text of a turn, which the one agent loop then reads as it reads any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.tokenizer import SPECIAL
from sandbox.agent_tools import ToolCall
from sft.chat import SYSTEM, Malformed, call_text, parse_calls

MAX_CALLS = 32  # of one turn
MAX_CHARS = 1 << 18  # of one turn: more fits no episode
MAX_NAME = 64
_MARKERS = re.compile("|".join(map(re.escape, SPECIAL)))


class BadAnswer(Exception):
    """An answer that must not be used; the message says what is wrong with it."""


class Declined(Exception):
    """The endpoint will not go on with this conversation: a filter, or a context that is full."""


@dataclass(frozen=True)
class Answer:
    """One checked answer.

    Attributes:
      calls: a `ToolCall`, or the inside of one that could not be read, as the endpoint wrote it.
      content, thought: what it said beside them, and before; without Qwen3's markers.
      ended: False where the token limit cut it off.
      tokens: (prompt, completion) as the endpoint counts them; None where it does not say.
    """

    calls: tuple[ToolCall | str, ...]
    content: str
    thought: str
    ended: bool
    tokens: tuple[int, int] | None


def opening(instruction: str) -> list[dict[str, Any]]:
    """The first messages of an episode: what `Renderer.prompt` renders."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]


def exchange(turn: int, text: str, observations: Sequence[str]) -> list[dict[str, Any]]:
    """A turn that the loop has carried out, as messages: its text as the loop read it, so that the
    endpoint sees the episode that the student will, and what came back. Calls behind the last
    observation were not carried out and are left out."""
    body = text.removesuffix("<|im_end|>").rpartition("</think>")[2].strip()
    calls: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    errors: list[str] = []
    for number, (call, seen) in enumerate(zip(parse_calls(text), observations, strict=False)):
        if isinstance(call, Malformed):
            errors.append(seen)
            continue
        key = f"{turn % 10**5:05d}{number:04d}"  # nine characters: the strictest servers' form
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        function = {"name": call.name, "arguments": arguments}
        calls.append({"id": key, "type": "function", "function": function})
        answers.append({"role": "tool", "tool_call_id": key, "content": seen})
    said: dict[str, Any] = {"role": "assistant", "content": body}
    if not errors:  # else it sees what could not be read, too
        said["content"] = body.partition("<tool_call>")[0].strip()
    if calls:
        said["tool_calls"] = calls
    messages = [said, *answers]
    if errors:
        messages.append({"role": "user", "content": "\n".join(errors)})
    return messages


def read_answer(data: Any) -> Answer:
    """Check the decoded body of an answer to a chat-completions request.

    Raises BadAnswer, or Declined where a filter held it back.
    """
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadAnswer(f"no choices: {str(data)[:200]}")
    reason, message = choices[0].get("finish_reason"), choices[0].get("message")
    if reason == "content_filter":
        raise Declined("its content filter held the answer back")
    if not isinstance(message, dict):
        raise BadAnswer(f"no message: {str(choices[0])[:200]}")
    content = _text(message.get("content"), "content")
    thought = _text(message.get("reasoning_content") or message.get("reasoning"), "reasoning")
    if len(content) + len(thought) > MAX_CHARS:
        raise BadAnswer(f"more than {MAX_CHARS} characters in one turn")
    calls = _calls(message.get("tool_calls"))
    if not calls and "<tool_call>" in content:
        # the server has no parser for the model's own markup
        found = [call for call in parse_calls(content) if isinstance(call, ToolCall)]
        if len(found) > MAX_CALLS:
            raise BadAnswer(f"more than {MAX_CALLS} calls in one turn")
        calls = [_writable(call) for call in found]
        content = content.partition("<tool_call>")[0]
    if "</think>" in content:
        inside, _, content = content.rpartition("</think>")
        thought = thought or inside
    return Answer(tuple(calls), _clean(content), _clean(thought), reason != "length", _usage(data))


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadAnswer(f"{name} is no text: {str(value)[:100]}")
    return _whole(value)


def _whole(text: str) -> str:
    """`text` without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _clean(text: str) -> str:
    """`text` without the markers of a turn: said in passing, they would be read as one. A space in
    place of each, or what stands around it could become one."""
    return _MARKERS.sub(" ", text).strip()


def _calls(value: Any) -> list[ToolCall | str]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise BadAnswer(f"tool_calls is no list of at most {MAX_CALLS}")
    return [_call(entry) for entry in value]


def _call(entry: Any) -> ToolCall | str:
    function = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadAnswer(f"a tool call without a function name: {str(entry)[:100]}")
    name, given = _whole(function["name"])[:MAX_NAME], function.get("arguments", "")
    if not isinstance(given, (str, dict)):
        raise BadAnswer(f"arguments of {name!r} are neither text nor an object")
    try:
        text = _whole(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
        arguments = json.loads(text or "{}", strict=False)
    except (ValueError, RecursionError):
        arguments = None
    if len(text) > MAX_CHARS:
        raise BadAnswer(f"more than {MAX_CHARS} characters in one turn")
    if isinstance(arguments, dict):
        return _writable(ToolCall(name, arguments))
    return _clean(f'{{"name": "{name}", "arguments": {text}}}')


def _writable(call: ToolCall) -> ToolCall | str:
    """The call, if the text of a turn can hold it and be read back as it; else text that says so.

    Its arguments may be escapes of what that text may not hold as it is: a marker of a turn, or a
    lone surrogate.
    """
    try:
        inside = call_text(call)
        same = parse_calls(f"<tool_call>{inside}</tool_call>") == [call]
    except (ValueError, RecursionError):
        inside, same = "", False
    if (
        same
        and len(call.name) <= MAX_NAME
        and len(inside) <= MAX_CHARS
        and inside == _whole(inside)
        and not _MARKERS.search(inside)
    ):
        return call
    name = _clean(_whole(call.name)[:MAX_NAME])
    return json.dumps(
        {"name": name, "arguments": "left out: not to be written in a chat"}, ensure_ascii=False
    )


def _usage(data: Mapping[str, Any]) -> tuple[int, int] | None:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not all(type(count) is int and 0 <= count < 10**9 for count in (prompt, completion)):
        return None
    return int(prompt or 0), int(completion or 0)
