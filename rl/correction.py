"""Learner and server compute the same policy twice, and never to the same bits.

What was sampled from π_server is trained on as if from π_learner, the learner's own policy of that
moment, with truncated importance weights between the two (Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy training"; the proximal policy of decoupled PPO, Hilton et
al. 2022, arXiv 2110.00641, where episodes are of older versions):

    w = min(π_learner / π_server, cap),      the clipped objective per token is multiplied by w

and its ratio becomes π / π_learner. The objective is of degree one in the advantage, w ≥ 0: to
scale the advantage is to scale the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sft.packing import Rows

METRICS = ("mismatch/mean", "mismatch/kl", "mismatch/max", "mismatch/capped")


def correct(
    batches: Sequence[Rows], logprobs: Callable[[Rows], np.ndarray], cap: float
) -> tuple[list[Rows], dict[str, float]]:
    """Batches with the learner's log-probabilities in place of the server's, and advantages times
    truncated weights; and metrics over their tokens.

    Args:
      logprobs: the learner's, float32 [rows, targets], before the update.
      cap: of the weights; above 0.

    Returns also, over the tokens with loss: `mismatch/mean` and `mismatch/max` (of the absolute
    difference, in nats), `mismatch/kl` (Schulman's k3 estimate of KL(server ‖ learner)), and
    `mismatch/capped` (share of the weights that were truncated).
    """
    found: list[Rows] = []
    differences = []
    for rows in batches:
        used = rows.weight > 0
        learner = np.where(used, logprobs(rows), 0.0).astype(np.float32)
        difference = np.where(used, learner - rows.old_logprob, 0.0)
        weight = np.minimum(np.exp(difference), cap).astype(np.float32)
        found.append(rows._replace(old_logprob=learner, advantage=rows.advantage * weight))
        differences.append(difference[used])
    d = np.concatenate(differences)
    if not len(d):
        return found, dict.fromkeys(METRICS, 0.0)
    values = (np.abs(d).mean(), np.mean(np.expm1(d) - d), np.abs(d).max(), np.mean(np.exp(d) > cap))
    return found, dict(zip(METRICS, map(float, values), strict=True))
