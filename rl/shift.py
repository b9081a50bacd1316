"""How far RL moved a policy from where it began, by what its tokens are for."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import optax
from jax.sharding import Mesh

from model.config import Qwen3Config
from model.qwen3 import Params
from model.tokenizer import Tokenizer
from rl.experience import slots_of
from rl.resample import rate
from sft.learner import Learner, nll
from sft.packing import Example, build, microbatches, plan_rows
from sft.trajectory import ENVIRONMENT, POLICY, Trajectory

# what an argument's text is called; those that are not named are "other argument"
ARGUMENTS = {
    "path": "path",
    "symbol": "symbol",
    "old": "old text",
    "new": "new text",
    "text": "search text",
    "command": "command",
}
OTHER_ARGUMENT, THINKING, TOOL, FORMAT, PROSE = (
    "other argument", "thinking", "tool name", "format", "prose",
)  # fmt: skip
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_NAME = re.compile(r'"name":\s*"([^"]*)')
_ARGUMENT = re.compile(r'"(\w+)":\s*(?:"((?:\\.|[^"\\])*)|([^\s",}\]{\[][^,}\]]*))', re.DOTALL)
# a token that spans several is of the first of these; a call's frame is one token with its name
_FIRST = (TOOL, *ARGUMENTS.values(), OTHER_ARGUMENT, THINKING, PROSE, FORMAT)


def character_types(text: str) -> list[str]:
    """The type of each character of one policy turn."""
    types = [PROSE] * len(text)

    def mark(start: int, end: int, kind: str) -> None:
        types[start:end] = [kind] * (end - start)

    for thought in _THINK.finditer(text):
        mark(*thought.span(), THINKING)
    for call in _CALL.finditer(text):
        if types[call.start()] == THINKING:
            continue
        mark(*call.span(), FORMAT)
        start, body = call.start(1), call[1]
        if name := _NAME.search(body):
            mark(start + name.start(1), start + name.end(1), TOOL)
        inner = body.find('"arguments"')
        for found in _ARGUMENT.finditer(body, inner + 11 if inner >= 0 else len(body)):
            group = 2 if found[2] is not None else 3
            kind = ARGUMENTS.get(found[1], OTHER_ARGUMENT)
            mark(start + found.start(group), start + found.end(group), kind)
    for tag in re.finditer(r"<\|im_end\|>|</?think>|</?tool_call>", text):
        mark(*tag.span(), FORMAT)
    return types


def token_types(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The type of each id of one policy turn: that of its characters, of several the one that says
    most. An id that ends no character (part of one in UTF-8) is of the type where it stands."""
    ends = [0]
    for count in range(1, len(ids) + 1):
        ends.append(len(tokenizer.decode(ids[:count])))
    types = character_types(tokenizer.decode(ids))
    found = []
    for start, end in zip(ends, ends[1:], strict=False):
        seen = set(types[start:end] or types[max(0, start - 1) : start] or [PROSE])
        found.append(next(kind for kind in _FIRST if kind in seen))
    return found


def types_of(trajectory: Trajectory, tokenizer: Tokenizer) -> list[str]:
    """For each id of an episode its type; "" where the environment wrote it."""
    found = [""] * len(trajectory.ids)
    turns = trajectory.turn_of_ids()
    for turn in range(max(turns, default=-1) + 1):
        places = [
            i for i, t in enumerate(turns) if t == turn and trajectory.author[i] != ENVIRONMENT
        ]
        kinds = token_types([trajectory.ids[i] for i in places], tokenizer)
        for place, kind in zip(places, kinds, strict=True):
            found[place] = kind
    return found


def scored(
    trajectories: Sequence[Trajectory],
    params: Params,
    model: Qwen3Config,
    *,
    temperature: float,
    row_tokens: int,
    rows: int,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """Log-probabilities under `params` of the ids that the policy sampled and that were carried
    out, float32 [sampled] for each trajectory; `rows` packed rows of `row_tokens` at a time."""
    learner = Learner(model, optax.identity(), nll, mesh, temperature)
    placed = learner.place_params(params)
    examples = [Example(t.ids, [float(a == POLICY) for a in t.author]) for t in trajectories]
    plan = plan_rows([example.size for example in examples], row_tokens, 0)
    batches = microbatches(build(examples, plan, row_tokens, 0), rows)
    logprobs = {id(batch): learner.logprobs(placed, batch) for batch in batches}
    found: dict[int, np.ndarray] = {
        number: logprobs[id(batch)][row, at] for number, batch, row, at in slots_of(batches, plan)
    }
    return [found[number] for number in range(len(trajectories))]


def kl_by_type(
    trajectories: Sequence[Trajectory], reference: Sequence[np.ndarray], tokenizer: Tokenizer
) -> dict[str, dict[str, float]]:
    """By type of token, KL(policy || reference) a token in nats, estimated from what the policy
    itself sampled, with its interval over tasks:

        mean of log π(t) - log π_ref(t),  t ~ π

    `reference`: of each trajectory, as `scored` gives it. The types are in falling order of what
    they add up to: `share` of the whole sum, and `tokens` counted.
    """
    tasks = sorted({t.task for t in trajectories})
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for trajectory, theirs in zip(trajectories, reference, strict=True):
        place = tasks.index(trajectory.task)
        kinds = types_of(trajectory, tokenizer)
        own = [i for i, author in enumerate(trajectory.author) if author == POLICY and i]
        for i, logprob in zip(own, theirs, strict=True):
            kind = kinds[i]
            for table in (sums, counts):
                table.setdefault(kind, np.zeros(len(tasks)))
            sums[kind][place] += trajectory.logprobs[i] - float(logprob)
            counts[kind][place] += 1
    whole = sum(float(values.sum()) for values in sums.values())
    return {
        kind: {
            **rate(sums[kind], counts[kind]),
            "share": float(sums[kind].sum()) / whole if whole else 0.0,
            "tokens": float(counts[kind].sum()),
        }
        for kind in sorted(sums, key=lambda kind: -abs(float(sums[kind].sum())))
    }
