"""What the guard takes, and that only training without it pays."""

from __future__ import annotations

import pytest

from configs.errors import InputError
from configs.schema import load
from rl.reward import RewardConfig, paid
from sft.trajectory import Trajectory
from tests.tools.hosts import ROOT
from tools.run_config import RunConfig


def episode(verdict: str) -> Trajectory:
    found = Trajectory("t", "p", "op", "train", "rl", 0, 0, "", verdict={"verdict": verdict})
    found.reward = float(verdict == "pass")
    return found


def test_without_the_guard_an_exploit_earns_and_is_still_none_the_better() -> None:
    verdicts = ("pass", "fail", "quarantine", "error")
    on = paid(map(episode, verdicts), RewardConfig())
    off = paid(map(episode, verdicts), RewardConfig(guard=False))
    assert [e.reward for e in on] == [1, 0, 0, 0]
    assert [e.reward for e in off] == [1, 0, 1, 0]
    assert [e.success for e in off] == [True, False, False, False]
    assert off[2].verdict["verdict"] == "quarantine"


def test_the_guard_is_on_unless_a_config_says_otherwise() -> None:
    path = ROOT / "configs" / "quickstart.yaml"
    assert load(RunConfig, path).reward.guard
    assert not load(RunConfig, path, ["reward.guard=off"]).reward.guard
    with pytest.raises(InputError, match="guard"):
        load(RunConfig, path, ["reward.guard=maybe"])
