"""Text-free generation: prompts of token ids in, sampled ids and their log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from model.config import Qwen3Config
from model.decode import Engine
from model.qwen3 import Params

SLOTS, DECODE_TOKENS = 8, 32


def engine_for(
    params: Params,
    config: Qwen3Config,
    *,
    rows: int,
    prompt: int,
    max_new: int,
    truncation: bool = False,
) -> Engine:
    """An engine for ``rows`` prompts of up to ``prompt`` tokens that are all known beforehand.

    Nobody waits for a slot in the middle of a dispatch, so dispatches are long; and a short prompt
    is not padded to the chunk that long ones are cut into.
    """
    return Engine(
        params,
        config,
        slots=min(rows, SLOTS),
        max_len=prompt + max_new,
        prefill_chunk=min(64, max(16, -(-(prompt - 1) // 16) * 16)),
        prefill_rows=min(rows, SLOTS),
        decode_tokens=DECODE_TOKENS,
        truncation=truncation,
    )


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Continue every prompt by up to ``max_new`` tokens, as many at a time as there are slots.

    Args:
        temperature: 0 takes the likeliest token, with log-probabilities at temperature 1.
        stop_ids: end a continuation; the stop token is kept.
        seed: prompt i samples with seed + i, whatever else runs beside it.

    Returns (new ids, log-probability of each) by prompt.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    running: dict[int, int] = {}  # slot -> prompt
    waiting = list(reversed(range(len(prompts))))
    done = 0
    while running or waiting:
        while waiting and len(running) < engine.slots:
            prompt = waiting.pop()
            slot = engine.open()
            engine.extend(slot, prompts[prompt])
            engine.sample(
                slot,
                max_new=max_new,
                stop_ids=stop_ids,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed + prompt,
            )
            running[slot] = prompt
        for result in engine.step():
            prompt = running.pop(result.slot)
            ids[prompt], logprobs[prompt] = result.ids, result.logprobs
            engine.close(result.slot)
            done += 1
            progress(done, len(prompts))
    return ids, logprobs
