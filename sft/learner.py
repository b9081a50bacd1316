"""The one optimisation step of SFT and RL: accumulate gradients over microbatches, then update.

Shapes are static and the number of microbatches is a Python loop, so two programs are compiled
once and serve batches of any size. The loss is a sum over tokens divided by a denominator of the
*whole* batch, so that cutting it into other microbatches, or spreading it over other devices,
changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.attention import check as check_attention
from model.config import Qwen3Config
from model.logprobs import token_logprobs
from model.lora import join, split
from model.qwen3 import Params, bind
from sft.packing import Rows

# (logprob, entropy, rows) -> (loss summed over tokens, sums for the metrics)
Loss = Callable[[jax.Array, jax.Array, Rows], tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) and its schedule: linear warm-up, then cosine
    decay to `final_fraction`."""

    learning_rate: float = 1e-3
    warmup_steps: int = 10
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of `steps` updates."""
        rate = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(steps, self.warmup_steps + 1),
            end_value=self.learning_rate * self.final_fraction,
        )
        rule = optax.adamw(rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)


class TrainState(NamedTuple):
    """What a checkpoint holds. `step` counts updates, int32 scalar.

    Where `params` has adapters (model/lora.py), they alone are trained, and `opt_state` is theirs.
    """

    params: Params
    opt_state: Any
    step: jax.Array


class Learner:
    """Compiled programs for one model, one loss and one optimizer.

    Args:
      mesh: rows of a microbatch are split over its `data` axis, parameters replicated; None for
        one device.
      temperature: log-probabilities are of softmax(logits / temperature), as they were sampled.
    """

    def __init__(
        self,
        config: Qwen3Config,
        optimizer: optax.GradientTransformation,
        loss: Loss,
        mesh: Mesh | None = None,
        temperature: float = 1.0,
    ) -> None:
        check_attention(config.attention)
        self._optimizer = optimizer
        self._whole = NamedSharding(mesh, PartitionSpec()) if mesh else None
        self._split = NamedSharding(mesh, PartitionSpec("data")) if mesh else None

        def forward(params: Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
            model = bind(config, params)
            hidden, _ = model(rows.tokens, rows.positions, rows.segments)
            hidden = jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
            flat = hidden.reshape(-1, hidden.shape[-1])
            logprob, entropy = token_logprobs(
                flat, model.head(), rows.target.reshape(-1), temperature=temperature
            )
            return logprob.reshape(rows.target.shape), entropy.reshape(rows.target.shape)

        def accumulate(
            params: Params, total: Any, rows: Rows, denominator: jax.Array
        ) -> tuple[Any, dict[str, jax.Array]]:
            trained, frozen = split(params)

            def objective(trained: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
                value, sums = loss(*forward(join(trained, frozen), rows), rows)
                return value / denominator, {"loss": value, **sums}

            grads, sums = jax.grad(objective, has_aux=True)(trained)
            return jax.tree.map(jnp.add, total, grads), sums

        def update(state: TrainState, grads: Any) -> tuple[TrainState, jax.Array]:
            trained, frozen = split(state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            params = join(optax.apply_updates(trained, updates), frozen)
            return TrainState(params, opt_state, state.step + 1), optax.tree.norm(grads)

        self._forward = jax.jit(forward)
        self._accumulate = jax.jit(accumulate, donate_argnums=1)
        self._update = jax.jit(update, donate_argnums=0)
        self._zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, split(params)[0]))

    def init(self, params: Params) -> TrainState:
        """A fresh state at step 0, which owns a copy of `params`."""
        opt_state = self._optimizer.init(split(params)[0])
        state = TrainState(params, opt_state, jnp.zeros((), jnp.int32))
        return self.place(jax.tree.map(lambda a: jnp.array(a, copy=True), state))

    def place(self, state: TrainState) -> TrainState:
        """Lay a state (from a checkpoint, say) out on the mesh."""
        return state if self._whole is None else jax.device_put(state, self._whole)

    def step(
        self, state: TrainState, batches: Sequence[Rows]
    ) -> tuple[TrainState, dict[str, float]]:
        """One update from all microbatches together. `state` is donated.

        Returns the new state and metrics: means per loss token, and `grad_norm`.
        """
        denominator = np.float32(max(sum(float(b.weight.sum()) for b in batches), 1.0))
        grads, totals = self._zeros(state.params), []
        for rows in batches:
            grads, sums = self._accumulate(state.params, grads, self._put(rows), denominator)
            totals.append(sums)
        state, norm = self._update(state, grads)
        fetched = jax.device_get(totals)
        metrics = {k: float(sum(t[k] for t in fetched) / denominator) for k in fetched[0]}
        return state, {**metrics, "grad_norm": float(norm)}

    def logprobs(self, params: Params, rows: Rows) -> np.ndarray:
        """Log-probabilities of the target slots under `params`, float32 [rows, targets]."""
        return np.asarray(self._forward(params, self._put(rows))[0])

    def _put(self, rows: Rows) -> Rows:
        return rows if self._split is None else jax.device_put(rows, self._split)


def nll(logprob: jax.Array, entropy: jax.Array, rows: Rows) -> tuple[jax.Array, dict]:
    """Weighted negative log-likelihood, the loss of SFT and of pre-training."""
    return -(rows.weight * logprob).sum(), {}
