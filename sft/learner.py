"""The one optimisation step of SFT and RL: accumulate gradients over microbatches, then update.

One compiled program, on any mesh: each device computes the gradients of its own rows, tokens and
parts of the matrices (``model/parallel.py``), a loop adds those of the microbatches, and what a
parameter's replicas have found is summed once, at the end. The loss is a sum over tokens divided by
their number in the *whole* batch, so that cutting it into other microbatches, or spreading it over
other devices, changes nothing but rounding. A loss may name another divisor for the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.errors import InputError
from model.attention import check as check_attention
from model.config import Qwen3Config
from model.logprobs import token_logprobs
from model.lora import join, split
from model.parallel import AXES, CONTEXT, ROWS, total
from model.qwen3 import Params, abstract, bind
from model.sharding import check_mesh, make_mesh, param_specs
from sft.packing import Rows

BATCH = (*ROWS, CONTEXT)  # the mesh axes over which the targets of a batch are split

# (logprob, entropy, rows[, value]) -> (loss summed over tokens, sums for the metrics). The loss is
# divided by the weight of all tokens, or by the sum "divisor" where there is one.
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) and its schedule: linear warm-up, then cosine
    decay to `final_fraction`. `offload`: the moments stay in the hosts' memory between updates."""

    learning_rate: float = 1e-3
    warmup_steps: int = 10
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    offload: bool = False

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by update, from 0, of a run of `steps` updates."""
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(steps, self.warmup_steps + 1),
            end_value=self.learning_rate * self.final_fraction,
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of `steps` updates."""
        rate = self.rate(steps)
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
      mesh: as of ``model.sharding.make_mesh``; None for one device. Over several processes each
        passes its own rows, and all the same number of microbatches.
      temperature: log-probabilities are of softmax(logits / temperature), as they were sampled.
      offload: keep the optimizer's state in the hosts' memory between updates.
      longest: microbatches of the largest update to come, if that is known: the step is compiled
        for as many from the start, or else again where it meets more.

    Raises InputError for a mesh that does not fit the model.
    """

    def __init__(
        self,
        config: Qwen3Config,
        optimizer: optax.GradientTransformation,
        loss: Loss,
        mesh: Mesh | None = None,
        temperature: float = 1.0,
        *,
        offload: bool = False,
        longest: int = 1,
    ) -> None:
        check_attention(config.attention)
        for leaf in jax.tree.leaves(split(abstract(config))[0]):
            if leaf.dtype != jnp.float32:  # in bfloat16 most updates would round to nothing
                raise InputError(
                    f"training wants float32 parameters, these are {leaf.dtype}: set "
                    "network.param_dtype to float32 (network.dtype is what is computed in)"
                )
        if offload and mesh is None:
            mesh = make_mesh({})
        sizes = dict(mesh.shape) if mesh is not None else {}
        check_mesh(config, sizes)
        if sizes.get(CONTEXT, 1) > 1 and config.attention != "context":
            raise InputError(
                f"mesh: context {sizes[CONTEXT]} splits each row's tokens: set attention to "
                f"context, not {config.attention}"
            )
        self._config, self._optimizer, self._mesh, self._offload = config, optimizer, mesh, offload
        self._specs = param_specs(config, sizes)
        self._longest = _power_of_two(longest)  # microbatches that the step is compiled for

        def forward(params: Params, rows: Rows) -> tuple[jax.Array, ...]:
            """One device's part: log-probability and entropy of every target slot, and, where the
            model has a critic's head, the value of the state before it."""
            model = bind(config, params)
            hidden, _ = model(rows.tokens, rows.positions, rows.segments)
            if rows.source is not None:
                hidden = jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
            flat = hidden.reshape(-1, hidden.shape[-1])
            logprob, entropy = token_logprobs(
                flat, model.head(), rows.target.reshape(-1), temperature=temperature
            )
            found = logprob.reshape(rows.target.shape), entropy.reshape(rows.target.shape)
            return (*found, model.values(hidden)) if config.value_head else found

        def gradients(
            params: Params, rows: Rows, number: jax.Array
        ) -> tuple[Params, dict[str, jax.Array]]:
            """Of the mean loss over the first ``number`` microbatches of rows [M, rows, ...]."""
            trained, frozen = split(params)

            def one(i: jax.Array | int) -> tuple[Params, dict[str, jax.Array]]:
                batch = jax.tree.map(lambda a: a[i], rows)

                def objective(trained: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
                    logprob, entropy, *value = forward(join(trained, frozen), batch)
                    found, sums = loss(logprob, entropy, batch, *value)
                    return found, {"loss": found, **sums}

                return jax.grad(objective, has_aux=True)(trained)

            if len(rows.tokens) == 1:
                grads, sums = one(0)
            else:

                def add(i: jax.Array, sofar: Any) -> Any:
                    return jax.tree.map(jnp.add, sofar, one(i))

                zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, 0))
                grads, sums = jax.lax.fori_loop(0, number, add, zeros)
            tokens = total(rows.weight.sum(), BATCH)
            scale = each = 1.0 / jnp.maximum(tokens, 1.0)
            if "divisor" in sums:
                divisor = total(sums.pop("divisor"), BATCH)
                scale = jnp.where(divisor > 0, 1.0 / jnp.where(divisor > 0, divisor, 1.0), 1.0)

            def whole(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
                replicas = tuple(a for a in AXES if a not in jax.tree.leaves(tuple(spec)))
                return total(grad, replicas) * scale

            grads = jax.tree.map(whole, grads, split(self._specs)[0])
            sums = {k: total(v, BATCH) for k, v in sums.items()}
            return grads, {k: v * (scale if k == "loss" else each) for k, v in sums.items()}

        def step(
            state: TrainState, rows: Rows, number: jax.Array, limit: jax.Array | None = None
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            trained, frozen = split(state.params)
            mapped = self._map(
                gradients,
                (self._specs, _row_specs(rows, ahead=1), PartitionSpec()),
                (split(self._specs)[0], PartitionSpec()),
            )
            grads, metrics = mapped(state.params, rows, number)
            opt_state = state.opt_state
            if offload:
                opt_state = jax.device_put(opt_state, self._layout("device").opt_state)
            updates, moved = optimizer.update(grads, opt_state, trained)
            updated = optax.apply_updates(trained, updates)
            metrics["grad_norm"] = optax.tree.norm(grads)
            if limit is not None:
                made = jnp.isfinite(metrics["grad_norm"]) & (metrics["loss"] <= limit)
                metrics["skipped"] = 1.0 - made
                updated, moved = jax.tree.map(
                    lambda new, old: jnp.where(made, new, old),
                    (updated, moved),
                    (trained, opt_state),
                )
            return TrainState(join(updated, frozen), moved, state.step + 1), metrics

        def logprobs(params: Params, rows: Rows) -> jax.Array:
            specs = _row_specs(rows)
            outs = (specs.target,) * (3 if config.value_head else 2)
            return self._map(forward, (self._specs, specs), outs)(params, rows)[0]

        def values(params: Params, rows: Rows) -> jax.Array:
            specs = _row_specs(rows)
            return self._map(forward, (self._specs, specs), (specs.target,) * 3)(params, rows)[2]

        def init(params: Params) -> TrainState:
            params = jax.tree.map(jnp.copy, params)
            return TrainState(params, optimizer.init(split(params)[0]), jnp.zeros((), jnp.int32))

        out = (self._layout(), None) if mesh is not None else None
        self._step = jax.jit(step, donate_argnums=0, out_shardings=out)
        self._logprobs = jax.jit(logprobs)
        self._values = jax.jit(values)
        self._init = jax.jit(init, out_shardings=out and out[0])

    def init(self, params: Params) -> TrainState:
        """A fresh state at step 0, which owns a copy of `params`."""
        return self._init(self.place_params(params))

    def place(self, state: TrainState) -> TrainState:
        """Lay a state (from a checkpoint, say) out on the mesh."""
        return state if self._mesh is None else jax.device_put(state, self._layout())

    def place_params(self, params: Params) -> Params:
        """The same for parameters alone."""
        return params if self._mesh is None else jax.device_put(params, self._layout().params)

    def step(
        self, state: TrainState, batches: Sequence[Rows], limit: float | None = None
    ) -> tuple[TrainState, dict[str, float]]:
        """One update from all microbatches together. `state` is donated.

        With a `limit` an update whose loss is above it, or not finite, changes nothing but `step`;
        the old state then needs memory beside the new one.

        Returns the new state and metrics: means per loss token, `grad_norm`, and with a limit
        `skipped`, 1 for an update that was left out.
        """
        # Compiled for a power of two of microbatches, of which the loop runs those that are there.
        self._longest = max(self._longest, _power_of_two(len(batches)))
        spare = [jax.tree.map(np.zeros_like, batches[0])] * (self._longest - len(batches))
        rows = jax.tree.map(lambda *parts: np.stack(parts), *batches, *spare)
        put = self._put(rows, ahead=1)
        guard = None if limit is None else np.float32(limit)
        state, metrics = self._step(state, put, np.int32(len(batches)), guard)
        return state, {k: float(v) for k, v in jax.device_get(metrics).items()}

    def logprobs(self, params: Params, rows: Rows) -> np.ndarray:
        """Log-probabilities of the target slots, float32 [rows, targets], under `params` as
        `place_params` gives them."""
        return self._local(self._logprobs(params, self._put(rows)), rows)

    def values(self, params: Params, rows: Rows) -> np.ndarray:
        """The critic's value before each target slot, float32 [rows, targets], as `logprobs`."""
        return self._local(self._values(params, self._put(rows)), rows)

    def _local(self, found: jax.Array, rows: Rows) -> np.ndarray:
        if found.is_fully_addressable:
            return np.asarray(found)
        assert self._mesh is not None
        spec = _row_specs(rows).target
        local = multihost_utils.global_array_to_host_local_array(found, self._mesh, spec)
        return np.asarray(local)

    def lower(self, rows: Rows, batches: int) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """The step over `batches` microbatches and the log-probabilities of one, to compile ahead
        of time. `rows`: shapes of one microbatch over all devices."""

        def shapes(tree: Any, shardings: Any) -> Any:
            return jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
            )

        abstract_state = jax.eval_shape(self._init, abstract(self._config))
        state = shapes(abstract_state, self._layout())
        stacked = jax.tree.map(lambda a: np.broadcast_to(a, (batches, *a.shape)), rows)
        many = shapes(stacked, self._rows_layout(stacked, ahead=1))
        one = shapes(rows, self._rows_layout(rows))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        return self._step.lower(state, many, number), self._logprobs.lower(state.params, one)

    def _map(self, fn: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
        """``fn`` on every device of the mesh, each with its own part."""
        if self._mesh is None:
            return fn
        return jax.shard_map(fn, mesh=self._mesh, in_specs=ins, out_specs=outs, check_vma=False)

    def _layout(self, optimizer: str | None = None) -> Any:
        """The shardings of a state; ``optimizer``: the kind of memory for the optimizer's."""
        kind = optimizer or ("pinned_host" if self._offload else None)
        assert self._mesh is not None
        place = functools.partial(NamedSharding, self._mesh)
        trained = split(abstract(self._config))[0]
        opt_state = optax.tree.map_params(
            self._optimizer,
            lambda _, spec: place(spec, memory_kind=kind),
            jax.eval_shape(self._optimizer.init, trained),
            split(self._specs)[0],
            transform_non_params=lambda _: place(PartitionSpec()),
        )
        step: Any = place(PartitionSpec())
        return TrainState(jax.tree.map(place, self._specs), opt_state, step)

    def _rows_layout(self, rows: Rows, ahead: int = 0) -> Rows:
        assert self._mesh is not None
        place = functools.partial(NamedSharding, self._mesh)
        return jax.tree.map(place, _row_specs(rows, ahead))

    def _put(self, rows: Rows, ahead: int = 0) -> Rows:
        if self._mesh is None:
            return rows
        layout = self._rows_layout(rows, ahead)
        if all(device.process_index == jax.process_index() for device in self._mesh.devices.flat):
            return jax.device_put(rows, layout)
        return jax.tree.map(lambda s, a: jax.make_array_from_process_local_data(s, a), layout, rows)


def _power_of_two(number: int) -> int:
    """The smallest that is no smaller."""
    return 1 << (number - 1).bit_length()


def _row_specs(rows: Rows, ahead: int = 0) -> Rows:
    """How rows, behind ``ahead`` axes that are whole, lie on a mesh."""
    lead = (None,) * ahead
    token, target = PartitionSpec(*lead, ROWS, CONTEXT), PartitionSpec(*lead, ROWS)
    each = token if rows.source is None else target
    return Rows(token, token, token, *(None if a is None else each for a in rows[3:]))


def nll(logprob: jax.Array, entropy: jax.Array, rows: Rows) -> tuple[jax.Array, dict]:
    """Weighted negative log-likelihood, the loss of SFT and of pre-training."""
    return -(rows.weight * logprob).sum(), {}
