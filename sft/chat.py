"""Messages to token ids and back: the one renderer of SFT, rollouts and evaluation.

The text is Qwen3's chat format (tool declarations, `<tool_call>`, `<tool_response>`, `<think>`),
built piece by piece so that a turn is never rendered twice: the prompt of turn n+1 is the prompt of
turn n, the ids that the policy sampled, and the ids of the new observation. One consequence differs
from re-rendering the whole chat with the template: Qwen3's template leaves the empty
`<think>` block out of *earlier* assistant turns, here every turn keeps what the policy saw.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from sandbox.agent_tools import EDITED, STILL_FAILING, ToolCall

SYSTEM = "Find the bug, edit the source, run the tests, then submit."

# Fixed pieces of an episode's text. A tiny tokenizer takes each as one token, which makes episodes
# half as long; a tokenizer without them (Qwen3's own) renders the same text.
FRAGMENTS = (
    SYSTEM,
    '{"name": "run_tests", "arguments": {}}',
    '{"name": "submit", "arguments": {}}',
    '{"name": "view", "arguments": {}}',
    '{"name": "edit", "arguments": {"old": "',
    '", "new": "',
    '"}}',
    '", "undo": true}}',
    "Tests fail because of a bug in `",
    "` in `",
    "Fix the source; do not change the tests.",
    " tests fail\n",
    " tests pass",
    STILL_FAILING,
    "AssertionError: assert ",
    "assistant\n",
    EDITED,
    "error: old occurs ",
    " times in ",
)

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)
# What Qwen3 is told when its thinking has used up its budget: the documentation's
# getting_started/thinking_budget.md, and section 4.3 of the technical report, arXiv 2505.09388.
_ENOUGH = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n</think>\n\n"
)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Malformed:
    """A tool call that could not be read; `reason` is shown to the policy."""

    reason: str


def call_text(call: ToolCall) -> str:
    """The inside of one `<tool_call>` as Qwen3's template writes it."""
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return f'{{"name": "{call.name}", "arguments": {arguments}}}'


def parse_calls(text: str) -> list[ToolCall | Malformed]:
    """The tool calls of one assistant turn, in order; nothing here can raise."""
    found: list[ToolCall | Malformed] = []
    for body in _CALL.findall(text):
        try:
            # not strict: small policies copy line ends into strings as they are
            data = json.loads(body, strict=False)
            name, arguments = data["name"], data.get("arguments", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found.append(Malformed('expected {"name": ..., "arguments": {...}}'))
        else:
            found.append(ToolCall(name, arguments))
    # an opening tag inside an argument opens nothing
    if not found or "<tool_call>" in _CALL.sub("", text):
        found.append(Malformed("no complete tool call"))
    return found


@dataclass(frozen=True)
class Renderer:
    """Renders an episode, turn by turn, to token ids.

    Attributes:
      tokenizer: byte-level BPE with Qwen3's special tokens.
      tools: JSON schemas put into the system turn; empty for a policy that was only ever trained
        on one fixed set of tools, which need not spend its context on them.
      thinking: False puts the empty `<think>` block before each reply, as Qwen3 does.
    """

    tokenizer: Tokenizer
    tools: tuple[dict, ...] = ()
    thinking: bool = False

    def prompt(self, instruction: str) -> list[int]:
        """Ids of the system and user turns and the opening of the first reply."""
        system: list[int] = self._marked("<|im_start|>system\n") + self._plain(SYSTEM)
        if self.tools:
            declared = "".join("\n" + json.dumps(t, ensure_ascii=False) for t in self.tools)
            # the declaration itself shows the tool-call markers, as special tokens
            system += self._marked("\n\n" + _TOOLS_HEAD) + self._plain(declared)
            system += self._marked(_TOOLS_TAIL)
        user = self._marked("<|im_end|>\n<|im_start|>user\n") + self._plain(instruction)
        return system + user + self._marked("<|im_end|>\n" + self._opening())

    def observation(self, texts: Sequence[str], *, ended: bool = True) -> list[int]:
        """Ids between two policy turns: the tool responses and the opening of the next reply.

        `ended` is False when the policy ran out of tokens and did not close its turn itself.
        """
        ids = self._marked(("" if ended else "<|im_end|>") + "\n<|im_start|>user")
        for text in texts:
            # texts come from hostile code: never read as special tokens
            ids += self._marked("\n<tool_response>\n") + self._plain(text)
            ids += self._marked("\n</tool_response>")
        return ids + self._marked("<|im_end|>\n" + self._opening())

    def reply(
        self, calls: Sequence[ToolCall | str], content: str = "", thought: str = ""
    ) -> list[int]:
        """Ids of one assistant turn, its end token included: what a policy would have sampled.

        A call given as text stands inside its tags as it is. `thought` is written in thinking mode
        alone: without it the prompt has the empty block already.
        """
        ids: list[int] = []
        if thought and self.thinking:
            ids += self._marked("<think>\n") + self._plain(thought) + self._marked("\n</think>\n\n")
        ids += self._plain(content)
        for i, call in enumerate(calls):
            lead = "\n" if i or content else ""
            inside = call if isinstance(call, str) else call_text(call)
            ids += self._marked(f"{lead}<tool_call>\n") + self._plain(inside)
            ids += self._marked("\n</tool_call>")
        return ids + self._marked("<|im_end|>")

    def thinks(self, ids: Sequence[int]) -> bool:
        """Whether a turn that begins with `ids` is inside a `<think>` block."""
        opening, closing = (self.tokenizer.id(tag) for tag in ("<think>", "</think>"))
        last = next((i for i in reversed(ids) if i in (opening, closing)), closing)
        return self.thinking and last == opening

    def enough(self) -> list[int]:
        """Ids that end a `<think>` block for the policy."""
        return self._marked(_ENOUGH)

    def answer(self, ids: Sequence[int]) -> list[int]:
        """A turn's ids behind its thinking; none while it thinks. All where there is no thinking
        mode."""
        if not self.thinking:
            return list(ids)
        closing = self.tokenizer.id("</think>")
        if self.thinks(ids):
            return []
        return list(ids[max((n for n, i in enumerate(ids, 1) if i == closing), default=0) :])

    def _opening(self) -> str:
        opening = "<|im_start|>assistant\n"
        return opening if self.thinking else opening + "<think>\n\n</think>\n\n"

    def _marked(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=True)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=False)
