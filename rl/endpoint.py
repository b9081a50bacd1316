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
    """The endpoint behind the protocol of a model."""

    name = "teacher"

    def __init__(self, endpoint: Endpoint, renderer: Renderer) -> None:
        self._endpoint, self._renderer = endpoint, renderer

    async def open(self, seed: int) -> EndpointSession:
        return EndpointSession(self._endpoint, self._renderer, seed)


class EndpointSession:
    """One episode as a conversation."""

    def __init__(self, endpoint: Endpoint, renderer: Renderer, seed: int) -> None:
        self._endpoint, self._renderer, self._seed = endpoint, renderer, seed
        self._messages: list[dict[str, Any]] = []
        self._turns = 0
        self._last = ""

    async def reply(self, ids: Sequence[int], texts: Sequence[str], max_new: int) -> Reply:
        """Raises GivenUp where the endpoint, or what may be spent on it, ends the episode, and
        OutOfBudget where it cannot begin."""
        if self._messages:
            self._messages += exchange(self._turns, self._last, texts)
        else:
            self._messages = opening(texts[0])
        self._turns += 1
        # attempts at one turn have seeds that follow one another: turns lie further apart
        seed = self._seed + 1000 * self._turns
        try:
            answer = await self._endpoint.answer(self._messages, TOOLS, seed)
        except Declined:
            raise GivenUp("declined") from None
        except OutOfBudget:
            if self._turns == 1:
                raise  # there is no episode yet
            raise GivenUp("budget") from None
        written = self._renderer.reply(answer.calls, answer.content, answer.thought)
        if not answer.ended:
            written = written[:-1]  # it did not end its turn itself
        ended = answer.ended and len(written) <= max_new  # the same limit as a sampled turn
        written = written[:max_new]
        self._last = self._renderer.tokenizer.decode(written)
        return Reply(written, [0.0] * len(written), ended)

    def close(self) -> None:
        pass
