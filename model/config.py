"""Shape and numerics of a dense Qwen3, and its translation to and from Hugging Face's config.json.

Everything that changes the numbers a checkpoint produces is either a field here or refused by
name: a field that we silently ignored would load fine and compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from configs.errors import InputError

REMAT = ("none", "dots", "full")
ATTENTION = ("xla",)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Qwen3Config:
    """A dense Qwen3. Sizes are counts, not bytes; see https://arxiv.org/abs/2505.09388.

    The last fields choose how it runs, not what it computes: ``remat`` (what the backward pass
    recomputes), ``attention`` (which implementation), ``scan_layers`` (one compiled layer looped,
    or all layers unrolled: slower to compile, faster to run where layers are small).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40_960
    param_dtype: str = "float32"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a "
                f"multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"model config: head_dim must be even for RoPE, got {self.head_dim}")
        choices = {
            "remat": REMAT,
            "attention": ATTENTION,
            "dtype": DTYPES,
            "param_dtype": DTYPES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"model config: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )

    @property
    def num_parameters(self) -> int:
        """Trainable scalars, the tied embedding counted once."""
        d, hd = self.hidden_size, self.head_dim
        attention = d * hd * 2 * (self.num_attention_heads + self.num_key_value_heads) + 2 * hd
        layer = attention + 3 * d * self.intermediate_size + 2 * d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + d

    def to_hf(self) -> dict[str, Any]:
        """The config.json of ``Qwen3ForCausalLM``.

        ``rope_theta`` is written both at the top level (transformers 4, SGLang) and inside
        ``rope_parameters`` (transformers 5): readers of either find it.
        """
        out: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        out |= {name: getattr(self, name) for name in _SIZES}
        out |= {
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": self.num_hidden_layers,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": self.param_dtype,
        }
        return out

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **run: Any) -> Qwen3Config:
        """Read a Hugging Face config; ``run`` sets our own fields (dtype, remat, ...).

        Raises InputError naming the first field that is missing, unknown, or asks for something
        that is not implemented (biases, scaled RoPE, sliding windows, experts, ...).
        """
        if hf.get("model_type") != "qwen3":
            raise InputError(
                f"config.json: model_type is {hf.get('model_type')!r}, only 'qwen3' (dense) is "
                "implemented"
            )
        for key, value in hf.items():
            _check_hf_field(key, value)
        missing = [name for name in (*_SIZES, "rms_norm_eps") if hf.get(name) is None]
        if missing:
            raise InputError(f"config.json: missing field(s) {', '.join(missing)}")
        values: dict[str, Any] = {name: hf[name] for name in _SIZES}
        values["rms_norm_eps"] = float(hf["rms_norm_eps"])
        values["rope_theta"] = _rope_theta(hf)
        values["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings", False))
        dtype = hf.get("dtype", hf.get("torch_dtype"))
        if dtype in DTYPES:
            values["param_dtype"] = dtype
        return cls(**(values | run))


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

# Fields that must have one of these values, because another value means another network.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "rope_scaling": (None, {}),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}

# Fields that do not change what the network computes for given ids.
_HARMLESS = frozenset(
    "_name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
    "initializer_range is_encoder_decoder label2id max_window_layers model_type "
    "output_attentions output_hidden_states pad_token_id problem_type return_dict sliding_window "
    "torch_dtype transformers_version use_cache".split()
)


def _check_hf_field(key: str, value: Any) -> None:
    if key in _HARMLESS or key in _SIZES:
        return
    if key in ("rms_norm_eps", "rope_theta", "rope_parameters", "tie_word_embeddings"):
        return
    if key in _FIXED:
        if value not in _FIXED[key]:
            raise InputError(f"config.json: {key}={value!r} is not implemented")
    elif key == "layer_types":
        other = {kind for kind in value or () if kind != "full_attention"}
        if other:
            raise InputError(f"config.json: layer_types {sorted(other)} are not implemented")
    else:
        raise InputError(
            f"config.json: unknown field {key!r}={value!r}; refused because it could change what "
            "the model computes"
        )


def _rope_theta(hf: Mapping[str, Any]) -> float:
    """RoPE base from ``rope_parameters`` (transformers 5) or the top level; both must agree."""
    nested = hf.get("rope_parameters") or {}
    unknown = set(nested) - {"rope_theta", "rope_type", "partial_rotary_factor"}
    if unknown or nested.get("rope_type", "default") != "default":
        raise InputError(f"config.json: rope_parameters {dict(nested)!r} is not implemented")
    _check_hf_field("partial_rotary_factor", nested.get("partial_rotary_factor"))
    found = {float(v) for v in (nested.get("rope_theta"), hf.get("rope_theta")) if v is not None}
    if not found:
        raise InputError("config.json: rope_theta is missing (top level or rope_parameters)")
    if len(found) > 1:
        raise InputError(f"config.json: rope_theta and rope_parameters disagree: {sorted(found)}")
    return found.pop()


def _dense(hidden: int, inter: int, layers: int, heads: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        param_dtype="bfloat16",
        dtype="bfloat16",
    )


# The published dense models (config.json of Qwen/Qwen3-*), and one that trains on two CPU cores.
PRESETS: dict[str, Qwen3Config] = {
    "qwen3-0.6b": _dense(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _dense(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _dense(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _dense(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _dense(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _dense(5120, 25600, 64, 64, tied=False),
    "tiny": Qwen3Config(
        vocab_size=3072,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        scan_layers=False,
    ),
}


def preset(name: str, **changes: Any) -> Qwen3Config:
    """A preset with fields changed; InputError lists the names when there is none such."""
    if name not in PRESETS:
        raise InputError(f"model preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    unknown = set(changes) - {f.name for f in fields(Qwen3Config)}
    if unknown:
        raise InputError(f"model config: unknown field(s) {', '.join(sorted(unknown))}")
    return replace(PRESETS[name], **changes)
