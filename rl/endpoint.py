"""An OpenAI-compatible endpoint as the teacher: a policy whose turns come as messages.

It plays the episode that the student will: the loop, the tools, the limits and the token ids are
those of every policy. The ids of its turns are the student's tokenizer's, as if sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.agent import GivenUp, Reply
from sandbox.agent_tools import TOOLS
from sft.chat import Renderer
from sft.chat_api import Declined, exchange, opening
from sft.endpoint import Endpoint, OutOfBudget


class EndpointPolicy:
    """The endpoint behind the protocol of a model; `tools`: schemas of those it is offered."""

    name = "teacher"

    def __init__(
        self, endpoint: Endpoint, renderer: Renderer, tools: tuple[dict, ...] = TOOLS
    ) -> None:
        self._endpoint, self._renderer, self._tools = endpoint, renderer, tools

    async def open(self, seed: int) -> EndpointSession:
        return EndpointSession(self._endpoint, self._renderer, self._tools, seed)


class EndpointSession:
    """One episode as a conversation."""

    def __init__(
        self, endpoint: Endpoint, renderer: Renderer, tools: tuple[dict, ...], seed: int
    ) -> None:
        self._endpoint, self._renderer, self._tools, self._seed = endpoint, renderer, tools, seed
        self._messages: list[dict[str, Any]] = []
        self._turns = 0
        self._turn: list[int] = []  # the turn so far
        self._rest: list[int] = []  # of the answer, beyond what was asked for
        self._said: list[int] = []  # the answer without its thinking
        self._ended = True

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        """Raises GivenUp where the endpoint, or what may be spent on it, ends the episode, and
        OutOfBudget where it cannot begin."""
        if texts:
            await self._ask(texts)
        elif ids:  # its thinking was ended for it: on with what it says behind
            self._turn += ids
            self._rest = self._said
        # the same limit as a sampled turn
        written, self._rest = self._rest[:max_new], self._rest[max_new:]
        self._turn += written
        return Reply(written, [0.0] * len(written), self._ended and not self._rest)

    async def _ask(self, texts: Sequence[str]) -> None:
        """The next answer, as ids."""
        renderer = self._renderer
        if self._messages:
            last = renderer.tokenizer.decode(self._turn)
            self._messages += exchange(self._turns, last, texts)
        else:
            self._messages = opening(texts[0])
        self._turns += 1
        # attempts at one turn have seeds that follow one another: turns lie further apart
        seed = self._seed + 1000 * self._turns
        try:
            answer = await self._endpoint.answer(self._messages, self._tools, seed)
        except Declined:
            raise GivenUp("declined") from None
        except OutOfBudget:
            if self._turns == 1:
                raise  # there is no episode yet
            raise GivenUp("budget") from None
        self._turn, self._ended = [], answer.ended
        end = None if answer.ended else -1  # a turn that was cut off has no end token
        self._rest = renderer.reply(answer.calls, answer.content, answer.thought)[:end]
        self._said = renderer.reply(answer.calls, answer.content)[:end]

    def close(self) -> None:
        pass
