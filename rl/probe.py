"""Token sequences with the learner's log-probabilities: the proof that a server has its weights.

A version number proves nothing: a server that failed to load a tensor says success all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optax
from jax.sharding import Mesh

from model.config import Qwen3Config
from model.parallel import ROWS
from model.qwen3 import Params
from model.share import share_of
from sft.learner import Learner, nll
from sft.packing import Example, microbatches, pack

SEQUENCES, LENGTH = 4, 48


@dataclass(frozen=True)
class Probe:
    """`ids` [n][t]; `logprobs` [n][t - 1]: of each id but the first, in nats, temperature 1."""

    ids: list[list[int]]
    logprobs: list[list[float]]

    def compare(self, found: Sequence[Sequence[float]]) -> tuple[float, float]:
        """Mean and largest absolute difference to a server's log-probabilities of the same ids.

        Raises ValueError where these have another shape or are not finite.
        """
        shape = [len(row) for row in self.logprobs]
        if [len(row) for row in found] != shape:
            raise ValueError(f"{[len(row) for row in found]} log-probabilities, not {shape}")
        flat = [x for row in found for x in row]
        if not all(map(math.isfinite, flat)):
            raise ValueError("log-probabilities that are not finite")
        difference = np.abs(np.concatenate(self.logprobs) - np.array(flat))
        return float(difference.mean()), float(difference.max())


class Prober:
    """Makes probes of the learner's parameters, wherever on its mesh they lie.

    Other ids for each version: a server that kept keys and values of the last one is found out.
    """

    def __init__(self, config: Qwen3Config, mesh: Mesh | None = None) -> None:
        self._vocab = config.vocab_size
        self._learner = Learner(config, optax.identity(), nll, mesh)
        groups = math.prod(mesh.shape[axis] for axis in ROWS) if mesh is not None else 1
        own = groups // share_of(mesh).parts  # a host's: each passes all sequences
        self._rows = -(-SEQUENCES // own) * own

    def __call__(self, params: Params, version: int) -> Probe:
        """Raises ValueError if the learner's own log-probabilities are not finite."""
        draw = np.random.default_rng([version, self._vocab])
        # never the last id: SGLang scores 0 in its place (it takes it for a multimodal filler)
        ids = draw.integers(self._vocab - 1, size=(SEQUENCES, LENGTH)).tolist()
        examples = [Example(row, [0.0] + [1.0] * (LENGTH - 1)) for row in ids]
        (rows,) = microbatches(pack(examples, LENGTH, LENGTH), self._rows)
        scored = self._learner.logprobs(self._learner.place_params(params), rows)
        found: list[list[float]] = scored[:SEQUENCES, : LENGTH - 1].tolist()
        probe = Probe(ids, found)
        if not all(math.isfinite(x) for row in probe.logprobs for x in row):
            raise ValueError(f"the learner's weights of version {version} give no finite numbers")
        return probe
