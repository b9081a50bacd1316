"""SGLang's `/generate`: what is sent, and what must be true of the answer before a token is used.

As of SGLang 0.5.23, observed. Two of its habits decide what is checked here: a token id outside the
vocabulary takes the whole server down, and an aborted request answers 200 with what it had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ABOVE_ZERO = 1e-3  # a log-probability may exceed 0 by rounding


class BadReply(Exception):
    """An answer that must not be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Generation:
    """One checked answer.

    labels: for each id the weight version, as the server calls it; None where it says nothing.
    cached: prompt tokens whose keys and values the server still had.
    """

    ids: list[int]
    logprobs: list[float]
    labels: list[str | None]
    cached: int


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError unless there are ids, and all of them are in the vocabulary."""
    if not ids:
        raise ValueError("a prompt needs at least one token id")
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is not in the vocabulary of {vocab_size}")


def sample_request(
    ids: Sequence[int],
    *,
    rid: str,
    max_new: int,
    stop_ids: Sequence[int],
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Sample behind `ids` from the whole distribution: all that truncates it is switched off,
    whatever the snapshot's generation config says."""
    return {
        "rid": rid,
        "input_ids": list(ids),
        "sampling_params": {
            "max_new_tokens": max_new,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(stop_ids),
            "sampling_seed": seed,
            "skip_special_tokens": False,
            "no_stop_trim": True,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
    }


def score_request(ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Log-probabilities of the prompts themselves; one token is sampled, and not used."""
    return {
        "input_ids": [list(row) for row in ids],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def read_sample(
    data: Any, *, prompt: int, max_new: int, vocab_size: int, ids_listed: bool = True
) -> Generation:
    """Check an answer to `sample_request` for a prompt of `prompt` tokens.

    Args:
      ids_listed: `output_ids` holds every token; sglang-jax leaves special ones out of it.

    Raises BadReply.
    """
    meta = _meta(data)
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in ("stop", "length"):
        raise BadReply(f"ended by {kind}: {str(reason)[:200]}")
    logprobs, ids = _columns(meta.get("output_token_logprobs"), vocab_size)
    if not 1 <= len(ids) <= max_new:
        raise BadReply(f"{len(ids)} tokens were sampled, 1 to {max_new} asked for")
    if ids_listed and data.get("output_ids") != ids:
        raise BadReply("output_ids and output_token_logprobs are not about the same tokens")
    if meta.get("completion_tokens", len(ids)) != len(ids):
        raise BadReply(f"{len(ids)} tokens, completion_tokens says {meta['completion_tokens']}")
    if meta.get("prompt_tokens", prompt) != prompt:
        raise BadReply(f"answers a prompt of {meta['prompt_tokens']} tokens, {prompt} were sent")
    cached = meta.get("cached_tokens", 0)
    if not isinstance(cached, int) or not 0 <= cached <= prompt:
        raise BadReply(f"cached_tokens is {cached!r}")
    return Generation(ids, logprobs, _labels(meta, len(ids)), cached)


def read_scores(data: Any, ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """The answer to `score_request`: for each row, of each id but the first. Raises BadReply."""
    if not isinstance(data, list) or len(data) != len(ids):
        raise BadReply(f"no list of {len(ids)} answers")
    found = []
    for answer, row in zip(data, ids, strict=True):
        entries = _meta(answer).get("input_token_logprobs")
        logprobs, scored = _columns(entries, max(row) + 1, first_free=True)
        if scored != list(row):
            raise BadReply("the log-probabilities are of other ids than those sent")
        found.append(logprobs[1:])
    return found


def _meta(data: Any) -> dict[str, Any]:
    meta = data.get("meta_info") if isinstance(data, dict) else None
    if not isinstance(meta, dict):
        raise BadReply(f"no meta_info: {str(data)[:200]}")
    return meta


def _columns(
    entries: Any, vocab_size: int, first_free: bool = False
) -> tuple[list[float], list[int]]:
    """Log-probabilities and ids of `[[logprob, id, text], …]`; the first may have none."""
    if not isinstance(entries, list):
        raise BadReply("no token log-probabilities")
    logprobs: list[float] = []
    ids: list[int] = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) < 2:
            raise BadReply(f"token {place}: {entry!r} is not [logprob, id, …]")
        logprob, token = entry[0], entry[1]
        if first_free and place == 0:
            logprob = 0.0
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadReply(f"token {place}: id {token!r} is not in the vocabulary of {vocab_size}")
        if type(logprob) not in (int, float) or not math.isfinite(logprob):
            raise BadReply(f"token {place}: log-probability {logprob!r}")
        if logprob > _ABOVE_ZERO:
            raise BadReply(f"token {place}: log-probability {logprob} is above 0")
        logprobs.append(float(logprob))
        ids.append(token)
    return logprobs, ids


def _labels(meta: dict[str, Any], count: int) -> list[str | None]:
    """The version of each token, from spans that cover all of them once."""
    spans = meta.get("weight_versions")
    if spans is None:
        return [meta.get("weight_version")] * count
    labels: list[str | None] = []
    try:
        for span in spans:
            if span["start"] != len(labels) or span["end"] < span["start"]:
                raise ValueError
            labels += [str(span["version"])] * (span["end"] - span["start"])
    except (TypeError, KeyError, ValueError):
        raise BadReply(f"weight_versions {spans!r} do not follow one another") from None
    if len(labels) != count:
        raise BadReply(f"weight_versions are of {len(labels)} tokens, there are {count}")
    return labels
