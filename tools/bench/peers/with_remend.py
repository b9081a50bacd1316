"""remend, by the code that its runs use: the learner's step, its log-probabilities, the engine."""

from __future__ import annotations

import numpy as np
import optax
from worker import Job, Run, serve

from model.hf import LoadedPolicy, load_hf
from model.host import keep_freed_memory
from model.sampling import engine_for, generate
from sft.learner import Learner, nll
from sft.packing import Example, Rows, pack


def _policy(job: Job) -> LoadedPolicy:
    keep_freed_memory()  # as every run of ours begins
    return load_hf(job.checkpoint, scan_layers=False)


def _rows(job: Job) -> Rows:
    """The batch as one example a row, with loss on every token that has one before it."""
    examples = [Example(ids.tolist(), [1.0] * job.tokens) for ids in job.batch()]
    return pack(examples, job.tokens, job.tokens - 1)


def _learner(job: Job, policy: LoadedPolicy) -> Learner:
    rule = optax.adamw(job.learning_rate, weight_decay=job.weight_decay)
    return Learner(policy.config, rule, nll)


def train(job: Job) -> Run:
    policy = _policy(job)
    learner, rows = _learner(job, policy), _rows(job)
    state = learner.init(policy.params)

    def run() -> float:
        nonlocal state
        state, metrics = learner.step(state, [rows])
        return metrics["loss"]

    return run


def logprobs(job: Job) -> Run:
    policy = _policy(job)
    learner, rows = _learner(job, policy), _rows(job)
    return lambda: learner.logprobs(policy.params, rows)


def sample(job: Job) -> Run:
    policy, prompts = _policy(job), job.prompts()
    engine = engine_for(
        policy.params, policy.config, rows=job.slots, prompt=job.prompt, max_new=job.new
    )
    return lambda: np.array(generate(engine, prompts.tolist(), max_new=job.new)[0])


if __name__ == "__main__":
    serve({"train": train, "logprobs": logprobs, "sample": sample}, ("remend", "jax", "flax"))
