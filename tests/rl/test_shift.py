"""Which token is for what, and how far a policy moved, against sums done by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from model.tokenizer import Tokenizer
from rl.shift import character_types, kl_by_type, scored, token_types, types_of
from sandbox.agent_tools import ToolCall
from sft.chat import Renderer
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory
from tests.model.conftest import SMALL, logits, random_params

TURN = (
    '<think>\nso "old": "a"</think>\nLook.<tool_call>\n{"name": "edit", "arguments": {"path": '
    '"a.py", "old": "x = \\"1\\"", "new": "y", "undo": true}}\n</tool_call><|im_end|>'
)


def test_character_types() -> None:
    types = character_types(TURN)
    said = {
        kind: "".join(c for c, t in zip(TURN, types, strict=True) if t == kind) for kind in types
    }
    assert said["tool name"] == "edit" and said["path"] == "a.py"
    assert said["old text"] == 'x = \\"1\\"' and said["new text"] == "y"
    assert said["other argument"] == "true" and said["prose"] == "\nLook."
    assert said["thinking"] == '\nso "old": "a"'  # an argument there is none
    assert "<tool_call>" in said["format"] and said["format"].endswith("<|im_end|>")


def test_an_unfinished_call_has_types_too() -> None:
    text = '<tool_call>\n{"name": "edit", "arguments": {"old": "abc\ndef'
    types = character_types(text)
    assert "".join(c for c, t in zip(text, types, strict=True) if t == "old text") == "abc\ndef"


def test_tokens_are_typed_whatever_they_are_made_of(tokenizer: Tokenizer) -> None:
    """The fragment that opens an edit holds the tool's name and its frame."""
    ids = Renderer(tokenizer).reply([ToolCall("edit", {"old": "naïve + 1", "new": "ü"})])
    kinds = token_types(ids, tokenizer)
    assert len(kinds) == len(ids)
    assert kinds.count("tool name") == 1
    by_kind = {k: [i for i, kind in zip(ids, kinds, strict=True) if kind == k] for k in kinds}
    assert tokenizer.decode(by_kind["old text"]) == "naïve + 1"
    assert tokenizer.decode(by_kind["new text"]) == "ü"


def episode(task: str, ids: list[int], author: list[int], logprobs: list[float]) -> Trajectory:
    found = Trajectory(task, "p", "op", "heldout", "rl", 0, 1, "")
    found.ids, found.author, found.logprobs = ids, author, logprobs
    return found


def test_scores_are_the_models_own(tokenizer: Tokenizer) -> None:
    params = random_params(SMALL, 1)
    rng = np.random.default_rng(0)
    done = []
    for length in (5, 12, 9):
        ids = rng.integers(0, SMALL.vocab_size, length).tolist()
        author = [ENVIRONMENT] * 3 + [POLICY] * (length - 3)
        done.append(episode("t", ids, author, [0.0] * length))
    found = scored(done, params, SMALL, temperature=1.0, row_tokens=16, rows=2)
    for trajectory, values in zip(done, found, strict=True):
        every = jax.nn.log_softmax(logits(SMALL, params, np.array([trajectory.ids])))[0]
        whole = every[np.arange(len(trajectory.ids) - 1), trajectory.ids[1:]]
        np.testing.assert_allclose(values, whole[2:], atol=1e-5)


def test_kl_by_type_sums_the_differences_of_each_type(tokenizer: Tokenizer) -> None:
    ids = Renderer(tokenizer).reply([ToolCall("edit", {"old": "x + 1", "new": "x - 1"})])
    start = [ENVIRONMENT] * 2
    done = [
        episode(task, [1, 2, *ids], [*start, *[POLICY] * len(ids)], [0.0, 0.0, *[-0.5] * len(ids)])
        for task in ("a", "b")
    ]
    kinds = [k for k in types_of(done[0], tokenizer) if k]
    theirs = np.array([-1.5 if kind == "new text" else -0.5 for kind in kinds])
    found = kl_by_type(done, [theirs, theirs], tokenizer)
    assert next(iter(found)) == "new text"
    assert found["new text"]["mean"] == pytest.approx(1.0) and found["new text"]["share"] == 1.0
    assert found["old text"]["mean"] == 0.0
    assert sum(row["tokens"] for row in found.values()) == 2 * len(ids)


def test_a_policy_that_did_not_move_is_nowhere_away(tokenizer: Tokenizer) -> None:
    ids = Renderer(tokenizer).reply([ToolCall("run_tests", {})])
    done = [episode("a", [1, *ids], [ENVIRONMENT, *[POLICY] * len(ids)], [0.0, *[-1.0] * len(ids)])]
    found = kl_by_type(done, [np.full(len(ids), -1.0)], tokenizer)
    assert all(row["mean"] == row["share"] == 0.0 for row in found.values())
