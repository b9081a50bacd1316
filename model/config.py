"""Shape and numerics of a Qwen3, dense or mixture of experts, and Hugging Face's config.json.

Everything that changes the numbers a checkpoint produces is either a field here or refused by
name: a field that we silently ignored would load fine and compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from configs.errors import InputError
from model.lora import Lora
from model.rope import Yarn

REMAT = ("none", "dots", "attention", "full", "offload")
ATTENTION = ("xla", "splash", "cudnn", "context")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Qwen3Config:
    """A Qwen3. Sizes are counts, not bytes; see https://arxiv.org/abs/2505.09388.

    ``num_experts`` 0 is a dense model. Otherwise every layer's MLP is a mixture of that many
    experts of ``moe_intermediate_size``, ``num_experts_per_tok`` of which see a token, and
    ``intermediate_size`` is not used. ``router_aux_loss_coef`` is carried for those who train with
    a load-balancing loss; it is not part of the network.

    The last fields choose how it runs, not what it computes: ``remat`` (what the backward pass
    recomputes), ``attention`` (which implementation), ``scan_layers`` (one compiled layer looped,
    or all layers unrolled: slower to compile, faster to run where layers are small). ``lora`` adds
    adapters beside the matrices it names; then only they are trained. ``value_head`` adds a
    critic's vector beside the vocabulary head; no checkpoint format outside this project knows it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    max_position_embeddings: int = 40_960
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001
    param_dtype: str = "float32"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    scan_layers: bool = True
    lora: Lora | None = None
    value_head: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_experts:
            for name in _EXPERT_SIZES:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise InputError(
                        f"model config: {name} must be a positive integer, got {value!r}"
                    )
            if self.num_experts_per_tok > self.num_experts:
                raise InputError(
                    f"model config: num_experts_per_tok ({self.num_experts_per_tok}) is more than "
                    f"num_experts ({self.num_experts})"
                )
            if self.lora and set(self.lora.targets) & {"gate", "up", "down"}:
                raise InputError(
                    "model config: lora: adapters for experts are not implemented; "
                    "name targets among q, k, v, o"
                )
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
        """Scalars of the network, the tied embedding counted once, adapters not at all."""
        d, hd = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * hd, self.num_key_value_heads * hd
        attention = 2 * d * (q + kv) + 2 * hd
        if self.attention_bias:
            attention += q + 2 * kv + d
        if self.num_experts:
            mlp = self.num_experts * (3 * self.moe_intermediate_size + 1) * d
        else:
            mlp = 3 * d * self.intermediate_size
        layer = attention + mlp + 2 * d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + d

    def to_hf(self) -> dict[str, Any]:
        """The config.json of ``Qwen3ForCausalLM`` or ``Qwen3MoeForCausalLM``.

        RoPE is written both at the top level (transformers 4, SGLang) and inside
        ``rope_parameters`` (transformers 5): readers of either find it.
        """
        scaling = None
        if self.rope_scaling is not None:
            given = {k: v for k, v in asdict(self.rope_scaling).items() if v is not None}
            scaling = {"rope_type": "yarn", **given}
        rope = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        kind = "Qwen3Moe" if self.num_experts else "Qwen3"
        out: dict[str, Any] = {
            "architectures": [f"{kind}ForCausalLM"],
            "model_type": "qwen3_moe" if self.num_experts else "qwen3",
        }
        out |= {name: getattr(self, name) for name in _SIZES}
        out |= {
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": rope,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": self.num_hidden_layers,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": self.param_dtype,
        }
        if self.num_experts:
            out |= {name: getattr(self, name) for name in (*_EXPERT_SIZES, *_ROUTER)}
            out |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
        else:
            out["layer_types"] = ["full_attention"] * self.num_hidden_layers
        return out

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **run: Any) -> Qwen3Config:
        """Read a Hugging Face config; ``run`` sets our own fields (dtype, remat, ...).

        Raises InputError naming the first field that is missing, unknown, or asks for something
        that is not implemented (sliding windows, other RoPE scalings, dense layers between
        mixtures, ...).
        """
        kind = hf.get("model_type")
        if kind not in ("qwen3", "qwen3_moe"):
            raise InputError(
                f"config.json: model_type is {kind!r}, only 'qwen3' and 'qwen3_moe' are implemented"
            )
        known = _READ | (_READ_MOE if kind == "qwen3_moe" else frozenset())
        for key, value in hf.items():
            _check_hf_field(key, value, known)
        values: dict[str, Any] = {name: hf.get(name) for name in _SIZES}
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if values["head_dim"] is None and isinstance(heads, int) and isinstance(hidden, int):
            # the defaults of transformers' two classes
            values["head_dim"] = hidden // heads if kind == "qwen3_moe" else 128
        values["rms_norm_eps"] = hf.get("rms_norm_eps")
        if kind == "qwen3_moe":
            experts = {hf[k] for k in ("num_experts", "num_local_experts") if hf.get(k) is not None}
            if len(experts) > 1:
                raise InputError("config.json: num_experts and num_local_experts disagree")
            values |= {name: hf.get(name) for name in _EXPERT_SIZES}
            values["num_experts"] = experts.pop() if experts else None
            values["norm_topk_prob"] = bool(hf.get("norm_topk_prob", False))
            values["router_aux_loss_coef"] = float(hf.get("router_aux_loss_coef", 0.001))
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise InputError(f"config.json: missing field(s) {', '.join(missing)}")
        values["rms_norm_eps"] = float(values["rms_norm_eps"])
        values["rope_theta"], values["rope_scaling"] = _read_rope(hf)
        values["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings", False))
        values["attention_bias"] = bool(hf.get("attention_bias", False))
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
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_ROUTER = ("norm_topk_prob", "router_aux_loss_coef")

# Fields that ``from_hf`` reads.
_READ = frozenset(
    (*_SIZES, "rms_norm_eps", "tie_word_embeddings", "attention_bias")
    + ("rope_theta", "rope_parameters", "rope_scaling")
)
_READ_MOE = frozenset((*_EXPERT_SIZES, *_ROUTER, "num_local_experts"))

# Fields that must have one of these values, because another value means another network.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "output_router_logits": (False, None),
    "pruned_heads": ({}, None),
}

# Fields that do not change what the network computes for given ids.
_HARMLESS = frozenset(
    "_name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
    "initializer_range is_encoder_decoder label2id max_window_layers model_type "
    "output_attentions output_hidden_states pad_token_id problem_type return_dict sliding_window "
    "torch_dtype transformers_version use_cache".split()
)


def _check_hf_field(key: str, value: Any, known: frozenset[str]) -> None:
    if key in _HARMLESS or key in known:
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


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """RoPE's base and scaling, from ``rope_parameters`` (transformers 5), from ``rope_theta`` and
    ``rope_scaling`` (before), or from both, which must then agree."""
    nested, old = (hf.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    found = {
        float(place["rope_theta"])
        for place in (nested, old, hf)
        if place.get("rope_theta") is not None
    }
    if not found:
        raise InputError("config.json: rope_theta is missing (top level or rope_parameters)")
    if len(found) > 1:
        raise InputError(f"config.json: rope_theta and rope_parameters disagree: {sorted(found)}")
    scalings = [
        _read_scaling(name, place, hf)
        for name, place in (("rope_parameters", nested), ("rope_scaling", old))
        if place or (nested and name in hf)
    ]
    if len(set(scalings)) > 1:
        raise InputError("config.json: rope_scaling and rope_parameters disagree")
    return found.pop(), scalings[0] if scalings else None


def _read_scaling(name: str, place: Mapping[str, Any], hf: Mapping[str, Any]) -> Yarn | None:
    kind = place.get("rope_type", place.get("type", "default"))
    _check_hf_field("partial_rotary_factor", place.get("partial_rotary_factor"), frozenset())
    ours = {field.name for field in fields(Yarn)} if kind == "yarn" else set()
    unknown = set(place) - ours - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if kind not in ("default", "yarn") or unknown:
        raise InputError(f"config.json: {name}={dict(place)!r} is not implemented")
    if kind == "default":
        return None
    given = {key: place[key] for key in ours if place.get(key) is not None}
    longest = hf.get("max_position_embeddings") or 0
    original = given.setdefault("original_max_position_embeddings", longest)
    given.setdefault("factor", longest / (original or 1))
    values: dict[str, Any] = {k: float(v) if k in _YARN_FLOATS else v for k, v in given.items()}
    return Yarn(**values)


_YARN_FLOATS = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


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


# The published models (config.json of Qwen/Qwen3-*), and one that trains on two CPU cores.
PRESETS: dict[str, Qwen3Config] = {
    "qwen3-0.6b": _dense(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _dense(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _dense(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _dense(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _dense(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _dense(5120, 25600, 64, 64, tied=False),
    "qwen3-30b-a3b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        param_dtype="bfloat16",
        dtype="bfloat16",
    ),
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
