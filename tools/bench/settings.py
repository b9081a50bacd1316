"""What `remend bench model` measures: `model.yaml` holds the defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import InputError
from configs.schema import load
from model.config import Qwen3Config, preset

DEFAULTS = Path(__file__).parent / "model.yaml"
MEASURES = ("train", "logprobs", "sample")


@dataclass(frozen=True)
class ModelBench:
    """Sizes are counts of tokens, rows and repetitions.

    model: the network, with random weights. checkpoint: a Hugging Face folder in its place.
    rows, tokens: the batch that is trained on and scored.
    slots, prompt, new: prompts sampled from at a time, tokens in each, tokens behind each.
    learning_rate, weight_decay: of AdamW, whose other parameters are the usual defaults.
    repetitions: calls that are timed. warmup: calls before them, behind the first.
    """

    model: Qwen3Config
    checkpoint: str = ""
    rows: int = 4
    tokens: int = 512
    slots: int = 8
    prompt: int = 32
    new: int = 128
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    repetitions: int = 9
    warmup: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"tokens": 2, "warmup": 0, "seed": 0}
        for name in ("rows", "tokens", "slots", "prompt", "new", "repetitions", "warmup", "seed"):
            value, low = getattr(self, name), least.get(name, 1)
            if value < low:
                raise InputError(f"bench: {name} must be at least {low}, not {value}")
        longest = max(self.tokens, self.prompt + self.new)
        if not self.checkpoint and longest > self.model.max_position_embeddings:
            raise InputError(
                f"bench: sequences of {longest} tokens, but model.max_position_embeddings is "
                f"{self.model.max_position_embeddings}"
            )

    def tokens_of(self, measure: str) -> int:
        """Tokens that one call of a measure works on or makes."""
        return self.slots * self.new if measure == "sample" else self.rows * self.tokens


def settings(overrides: list[str], preset_name: str | None = None) -> ModelBench:
    """The defaults with `key=value` overrides; `preset_name` takes the network from a preset."""
    found = load(ModelBench, DEFAULTS, overrides)
    if found.checkpoint and not (Path(found.checkpoint) / "config.json").is_file():
        raise InputError(f"bench: checkpoint {found.checkpoint} has no config.json")
    return replace(found, model=preset(preset_name)) if preset_name else found
