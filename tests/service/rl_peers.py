"""TRL's and verl's own losses and advantages on fixed random inputs, as JSON on stdout.

    python tests/service/rl_peers.py > tests/rl/peers.json

wants a Python with what ``rl_peers.txt`` lists and ``verl==0.9.1``; nothing of this project is
imported.
``tests/rl/test_peers.py`` compares ours with the kept answer, ``test_rl_peers.py`` the kept answer
with a fresh one. Everything is float64, one sequence a row, each padded behind.

TRL: a real ``GRPOTrainer`` on a random tiny model, whose log-probabilities are replaced by the
inputs: what is differentiated is its ``compute_loss``. verl: its ``core_algos``, plain functions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

GROUPS, SIZE, TOKENS = 3, 4, 9
HORIZON = 11
GAMMA, LAM = 0.97, 0.9
GRPO: dict[str, Any] = {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.0}
# TRL's settings by the name of the case
TRL: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    # as published; by default TRL weighs the KL by the ratio besides
    "grpo-kl": GRPO | {"beta": 0.04, "use_bias_correction_kl": False},
    "grpo-entropy": GRPO | {"entropy_coef": 0.01},
    "dr-grpo": GRPO | {"loss_type": "dr_grpo"},
    "dapo": GRPO | {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": GRPO | {"importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "cispo": GRPO | {"loss_type": "cispo", "epsilon_high": 1.2},  # of TRL: the bound itself
}
# verl's: (loss, how it is summed up, clip low, clip high)
VERL: dict[str, tuple[str, str, float, float]] = {
    "ppo": ("vanilla", "token-mean", 0.2, 0.2),
    "grpo": ("vanilla", "seq-mean-token-mean", 0.2, 0.2),
    "dr-grpo": ("vanilla", "seq-mean-token-sum-norm", 0.2, 0.2),
    "dapo": ("vanilla", "token-mean", 0.2, 0.28),
    "gspo": ("gspo", "seq-mean-token-mean", 0.03, 0.04),
    "cispo": ("cispo", "token-mean", 1.0, 0.2),
}


def inputs() -> dict[str, np.ndarray]:
    """Arrays [sequences, tokens], but for one reward and one advantage a sequence. Advantages have
    both signs and ratios lie on both sides of every clip; a hole in a sequence is what its
    environment wrote."""
    rng = np.random.default_rng(20)
    shape = (GROUPS * SIZE, TOKENS)
    mask = (np.arange(TOKENS) < rng.integers(2, TOKENS + 1, (shape[0], 1))) * 1.0
    mask[:, 1:-1] *= rng.random((shape[0], TOKENS - 2)) < 0.8
    old = -rng.exponential(1.0, shape) * mask
    value = rng.normal(0, 0.5, shape) * mask
    return {
        "mask": mask,
        "logprob": old + rng.normal(0, 0.25, shape) * mask,
        "old_logprob": old,
        "ref_logprob": old + rng.normal(0, 0.25, shape) * mask,
        "entropy": rng.exponential(1.0, shape) * mask,
        "reward": rng.integers(0, 4, shape[0]) / 4 + (np.arange(shape[0]) % SIZE == 0) * 0.5,
        "advantage": rng.normal(0, 1, shape[0]),
        "token_advantage": rng.normal(0, 1, shape) * mask,
        "old_value": value,
        "value": value + rng.normal(0, 0.3, shape) * mask,
    }


def tensor(array: np.ndarray, grad: bool = False) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=grad)


def answer(loss: torch.Tensor, by: torch.Tensor) -> dict[str, Any]:
    """The loss and its gradient."""
    loss.backward()
    assert by.grad is not None
    return {"loss": loss.item(), "grad": by.grad.tolist()}


def trl_loss(x: dict[str, np.ndarray], settings: dict[str, Any], folder: str) -> dict[str, Any]:
    words = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1, "[EOS]": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="a"
    )
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(f"{folder}/model")
    trainer = GRPOTrainer(
        model=f"{folder}/model",
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=len(x["mask"]),
            num_generations=SIZE,
            max_completion_length=HORIZON,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(x["mask"])}),
        processing_class=tokenizer,
    )
    logprob = tensor(x["logprob"], grad=True)
    entropy = tensor(x["entropy"])
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprob, entropy, None)
    trainer.current_gradient_accumulation_steps = 1  # as its training loop sets it
    ones = torch.ones((len(x["mask"]), 1), dtype=torch.int64)
    batch = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.ones(x["mask"].shape, dtype=torch.int64),
        "completion_mask": tensor(x["mask"]),
        "advantages": tensor(x["advantage"]),
        "old_per_token_logps": tensor(x["old_logprob"]),
        "ref_per_token_logps": tensor(x["ref_logprob"]),
        "num_items_in_batch": tensor(x["mask"].sum()),
    }
    return answer(trainer.compute_loss(trainer.model.train(), batch), logprob)


def verl_loss(x: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    loss, mode, low, high = VERL[name]
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=SIZE,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e9,  # its second clip, of Ye et al., is not part of PPO
    )
    config.global_batch_info["loss_scale_factor"] = HORIZON
    if name == "ppo":
        advantage = tensor(x["token_advantage"])
    else:
        advantage = tensor(x["advantage"])[:, None].expand(x["mask"].shape)
    logprob = tensor(x["logprob"], grad=True)
    found, metrics = core_algos.get_policy_loss_fn(loss)(
        old_log_prob=tensor(x["old_logprob"]),
        log_prob=logprob,
        advantages=advantage,
        response_mask=tensor(x["mask"]),
        loss_agg_mode=mode,
        config=config,
    )
    return answer(found, logprob) | {"clipped": metrics["actor/pg_clipfrac"]}


def verl_value_loss(x: dict[str, np.ndarray], clip: float) -> dict[str, Any]:
    value = tensor(x["value"], grad=True)
    returns = tensor(x["old_value"] + x["token_advantage"])
    old, mask = tensor(x["old_value"]), tensor(x["mask"])
    found, _ = core_algos.compute_value_loss(value, returns, old, mask, clip)
    return answer(found, value)


def verl_advantages(x: dict[str, np.ndarray]) -> dict[str, Any]:
    mask = tensor(x["mask"])
    rewards = np.zeros(x["mask"].shape)
    last = [int(np.flatnonzero(row)[-1]) for row in x["mask"]]
    rewards[range(len(last)), last] = x["reward"]
    given, groups = tensor(rewards), np.arange(len(rewards)) // SIZE

    def by_group(rule: Any, **more: Any) -> list[float]:
        found, _ = rule(given.clone(), torch.ones_like(mask), groups, **more)
        return found[:, 0].tolist()

    whitened, returns = core_algos.compute_gae_advantage_return(
        given, tensor(x["old_value"]), mask, GAMMA, LAM
    )
    ours, theirs = tensor(x["logprob"]), tensor(x["ref_logprob"])
    return {
        "grpo": by_group(core_algos.compute_grpo_outcome_advantage),
        "dr-grpo": by_group(
            core_algos.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False
        ),
        "rloo": by_group(core_algos.compute_rloo_outcome_advantage),
        "gae-whitened": whitened.tolist(),
        "gae-returns": returns.tolist(),
        **{k: core_algos.kl_penalty(ours, theirs, k).tolist() for k in ("k1", "k2", "k3")},
    }


def main() -> None:
    x = inputs()
    with tempfile.TemporaryDirectory() as folder:
        trl = {name: trl_loss(x, settings, folder) for name, settings in TRL.items()}
    found = {
        "made by": "python tests/service/rl_peers.py > tests/rl/peers.json",
        "versions": {name: version(name) for name in ("trl", "verl", "torch", "transformers")},
        "settings": {"size": SIZE, "horizon": HORIZON, "gamma": GAMMA, "lam": LAM},
        "inputs": {name: array.tolist() for name, array in x.items()},
        "trl": trl,
        "verl": {name: verl_loss(x, name) for name in VERL},
        "verl value": {str(clip): verl_value_loss(x, clip) for clip in (0.2, 1e9)},
        "verl advantages": verl_advantages(x),
    }
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
