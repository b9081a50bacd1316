"""Losses, gradients and advantages against TRL's and verl's own numbers on the same inputs.

``peers.json`` is what their code answered (``tests/service/rl_peers.py``; the versions are in it).
Where they and we define something differently, the difference is written out here.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.advantage import gae, group_advantages, rloo_advantages
from rl.experience import whiten
from rl.loss import KL, LossConfig, policy_loss, value_loss
from sft.packing import empty_rows

PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
X = {name: np.array(array) for name, array in PEERS["inputs"].items()}
MASK = X["mask"]
COUNT, TOKENS = MASK.shape
SIZE = PEERS["settings"]["size"]
HORIZON = PEERS["settings"]["horizon"]
GSPO = LossConfig(objective="gspo", aggregate="sequence", clip_low=0.03, clip_high=0.04)
DR_GRPO = LossConfig(aggregate="constant", horizon=HORIZON)
CONFIGS = {
    ("trl", "grpo"): LossConfig(aggregate="sequence"),
    ("trl", "grpo-kl"): LossConfig(aggregate="sequence", kl_coef=0.04),
    ("trl", "dr-grpo"): DR_GRPO,
    ("trl", "dapo"): LossConfig(clip_high=0.28),
    ("trl", "gspo"): GSPO,
    ("trl", "cispo"): LossConfig(objective="cispo", clip_low=1.0, clip_high=0.2),
    ("verl", "ppo"): LossConfig(),
    ("verl", "grpo"): LossConfig(aggregate="sequence"),
    ("verl", "dr-grpo"): DR_GRPO,
    ("verl", "dapo"): LossConfig(clip_high=0.28),
    ("verl", "gspo"): GSPO,
    ("verl", "cispo"): LossConfig(objective="cispo", clip_low=1.0, clip_high=0.2),
}
PER_ROW = {"trl": 3, "verl": 1}  # sequences: packed, and padded as their own batches are
EXACT = {"rtol": 1e-7, "atol": 1e-10}  # verl adds 1e-8 to the lengths of sequences


def laid_out(array: np.ndarray, per_row: int) -> jax.Array:
    return jnp.asarray(array.reshape(COUNT // per_row, per_row * TOKENS))


def by_sequence(name: str) -> np.ndarray:
    """[sequences, tokens] of what is one number a sequence."""
    return np.broadcast_to(X[name][:, None], MASK.shape)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def ours(config: LossConfig, advantage: np.ndarray, per_row: int):
    """The loss, its gradient by the log-probabilities, and the share of clipped tokens."""
    segment = np.broadcast_to(np.arange(COUNT)[:, None] % per_row + 1, MASK.shape)

    def value(logprob: jax.Array):
        found, divisor, sums = policy_loss(
            laid_out(logprob, per_row),
            *(laid_out(a, per_row) for a in (X["entropy"], MASK, advantage)),
            *(laid_out(X[name], per_row) for name in ("old_logprob", "ref_logprob")),
            config,
            segment=laid_out(segment, per_row),
            tokens=per_row * TOKENS,
        )
        return found / divisor, sums["rl/clip_share"] / MASK.sum()

    both = jax.jit(jax.value_and_grad(value, has_aux=True))
    (loss, clipped), grad = both(jnp.asarray(X["logprob"]))
    return loss, grad, clipped


@pytest.mark.parametrize(("peer", "name"), CONFIGS)
def test_policy_loss_and_gradient(peer: str, name: str) -> None:
    by_token = (peer, name) == ("verl", "ppo")
    advantage = X["token_advantage"] if by_token else by_sequence("advantage")
    loss, grad, clipped = ours(CONFIGS[peer, name], advantage, PER_ROW[peer])
    theirs = PEERS[peer][name]
    np.testing.assert_allclose(loss, theirs["loss"], **EXACT)
    np.testing.assert_allclose(grad, theirs["grad"], **EXACT)
    if "clipped" in theirs:
        assert 0 < theirs["clipped"] < 1  # the inputs lie on both sides of the clip
        np.testing.assert_allclose(clipped, theirs["clipped"], rtol=1e-5)  # theirs is a float32


def test_entropy_bonus() -> None:
    """TRL's is the mean over all tokens, whatever the policy's part is divided by; ours is divided
    like the policy's part, so they are the same where that is the tokens."""
    without, bonus = PEERS["trl"]["grpo"]["loss"], PEERS["trl"]["grpo-entropy"]["loss"]
    plain = ours(LossConfig(), by_sequence("advantage"), 1)[0]
    found = ours(LossConfig(entropy_coef=0.01), by_sequence("advantage"), 1)[0]
    np.testing.assert_allclose(found - plain, bonus - without, **EXACT)


@pytest.mark.parametrize("clip", PEERS["verl value"])
def test_value_loss_and_gradient(clip: str) -> None:
    arrays = MASK, X["old_value"] + X["token_advantage"], X["old_value"]
    bound = float(clip) if float(clip) < 1e9 else 0.0  # of ours, 0 does not clip

    def value(v: jax.Array) -> jax.Array:
        return value_loss(v, *map(jnp.asarray, arrays), bound)[0] / MASK.sum()

    loss, grad = jax.jit(jax.value_and_grad(value))(jnp.asarray(X["value"]))
    np.testing.assert_allclose(loss, PEERS["verl value"][clip]["loss"], **EXACT)
    np.testing.assert_allclose(grad, PEERS["verl value"][clip]["grad"], **EXACT)


def test_the_clip_of_values_is_in_the_inputs() -> None:
    first, second = (found["loss"] for found in PEERS["verl value"].values())
    assert first != pytest.approx(second, rel=1e-3)


THEIRS = {name: np.array(found) for name, found in PEERS["verl advantages"].items()}


def groups() -> list[list[float]]:
    return X["reward"].reshape(-1, SIZE).tolist()


def test_group_advantages() -> None:
    """verl, like TRL, divides by the deviation of a sample, √(n / (n - 1)) times the one of the
    group itself, which is ours: every advantage is smaller by as much."""
    ratio = np.sqrt((SIZE - 1) / SIZE)
    scaled = [group_advantages(g, eps=1e-6 * ratio) for g in groups()]
    # theirs is float32 where the deviation's epsilon is added
    np.testing.assert_allclose(np.ravel(scaled) * ratio, THEIRS["grpo"], rtol=1e-6)
    centred = [group_advantages(g, scale=False) for g in groups()]
    np.testing.assert_allclose(np.ravel(centred), THEIRS["dr-grpo"], rtol=1e-9, atol=1e-12)


def test_rloo_advantages() -> None:
    found = np.ravel([rloo_advantages(g) for g in groups()])
    np.testing.assert_allclose(found, THEIRS["rloo"], rtol=1e-9, atol=1e-12)


def test_gae_and_whitening() -> None:
    """What the environment wrote is skipped; verl whitens with the deviation of a sample."""
    rows = empty_rows(COUNT, TOKENS, TOKENS)
    returns = np.zeros(MASK.shape)
    advantage = np.zeros(MASK.shape)
    for row, used in enumerate(MASK > 0):
        rewards = np.zeros(used.sum())
        rewards[-1] = X["reward"][row]
        settings = PEERS["settings"]["gamma"], PEERS["settings"]["lam"]
        found = gae(rewards, X["old_value"][row, used], *settings)
        advantage[row, used], returns[row, used] = found
    np.testing.assert_allclose(returns, THEIRS["gae-returns"] * MASK, rtol=1e-9, atol=1e-12)
    rows = rows._replace(weight=MASK.astype(np.float32), advantage=advantage)
    (whitened,) = whiten([rows])
    count = MASK.sum()
    want = THEIRS["gae-whitened"] * MASK * np.sqrt(count / (count - 1))
    np.testing.assert_allclose(whitened.advantage, want, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("name", KL)
def test_kl_estimates(name: str) -> None:
    found = KL[name](jnp.asarray(X["logprob"]), jnp.asarray(X["ref_logprob"]))
    np.testing.assert_allclose(found, THEIRS[name], rtol=1e-9, atol=1e-12)
