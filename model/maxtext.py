"""MaxText checkpoints of the same Qwen3, to and from (https://github.com/AI-Hypercomputer/maxtext).

MaxText 0.2.5 keeps its weights in an Orbax tree ``params/params/decoder/...`` and, unless told
otherwise, stacks the layers: axis 1 of every tensor below ``decoder/layers`` counts them
(``scan_layers=true``, ``param_scan_axis=1``). Attention matrices have their heads apart, the rest
is as here: matrices [in, out], scales multiplied as they are (no +1), queries not scaled in
advance, RoPE in halves, no vocabulary padding. With D hidden, H query heads, K key heads, hd head
size, F intermediate (of one expert in a mixture), E experts, V vocabulary and L layers, in its
spelling:

    token_embedder/embedding                               V D
    decoder/decoder_norm/scale                             D
    decoder/logits_dense/kernel                            D V        unless tied
    decoder/layers/pre_self_attention_layer_norm/scale     D L        and post_...
    decoder/layers/self_attention/query/kernel             D L H hd   key and value: D L K hd
    decoder/layers/self_attention/query_norm/scale         hd L       and key_norm
    decoder/layers/self_attention/out/kernel               H L hd D
    decoder/layers/mlp/wi_0/kernel                         D L F      (our gate) and wi_1 (our up)
    decoder/layers/mlp/wo/kernel                           F L D
    decoder/layers/moe_block/gate/kernel                   D L E      (our router)
    decoder/layers/moe_block/wi_0                          E L D F    and wi_1; wo: E L F D

An exported folder holds ``items`` (the tree, for MaxText's ``load_parameters_path``),
``config.json`` (ours) and ``maxtext.yml`` (a config that MaxText's commands take as it is).

What MaxText computes differently, whatever the checkpoint: with tied embeddings it rounds the table
to bfloat16 before the output projection, so its float32 logits are those of a rounded head. And its
mixture always makes the chosen experts' weights sum to one, whatever ``norm_topk_prob`` says.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from configs.errors import InputError
from model.assets import carried
from model.config import DTYPES, Qwen3Config
from model.hf import read_config
from model.qwen3 import Params, abstract

FLAGS = "maxtext.yml"
ITEMS = "items"  # in the folder of one step: what MaxText calls the tree of its state

_SCAN_AXIS = 1
_CHUNK_BYTES = 256 * 2**20  # of a tensor as stored; a reader of a part reads whole chunks
_TREE = "_METADATA"  # Orbax: the folder that has this file is a tree

# Our name in ``params["layers"]`` -> MaxText's path within a layer.
_ATTENTION = {
    "attn_norm": "pre_self_attention_layer_norm/scale",
    "q": "self_attention/query/kernel",
    "k": "self_attention/key/kernel",
    "v": "self_attention/value/kernel",
    "q_norm": "self_attention/query_norm/scale",
    "k_norm": "self_attention/key_norm/scale",
    "o": "self_attention/out/kernel",
    "mlp_norm": "post_self_attention_layer_norm/scale",
}
_DENSE = {"gate": "mlp/wi_0/kernel", "up": "mlp/wi_1/kernel", "down": "mlp/wo/kernel"}
_MIXTURE = {
    "router": "moe_block/gate/kernel",
    "gate": "moe_block/wi_0",
    "up": "moe_block/wi_1",
    "down": "moe_block/wo",
}
_TOP = {
    "embed": "token_embedder/embedding",
    "norm": "decoder/decoder_norm/scale",
    "lm_head": "decoder/logits_dense/kernel",
}


def save_maxtext(
    folder: Path,
    params: Params,
    config: Qwen3Config,
    *,
    dtype: str | None = None,
    assets: Path | None = None,
) -> None:
    """Write a folder from which MaxText starts, and which ``load_maxtext`` reads.

    Held in memory beside ``params``: one parameter (all its layers) on the host, where it is not
    there already, and as much again while it is compressed; parameters follow one another to disk.
    They must be addressable by this process.

    Args:
        folder: created; replaced if it is an earlier export, refused if it holds anything else.
            Written aside, flushed and moved into place, so it is whole or not there.
        dtype: "float32" or "bfloat16" to cast; None keeps each parameter's bits.
        assets: a folder whose tokenizer files, chat template and generation config are copied.

    Raises InputError naming a parameter whose name, shape or dtype is not the config's, or what the
    config asks for that MaxText cannot hold.
    """
    folder = Path(folder).absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / FLAGS).is_file():
        raise InputError(f"{folder} exists and is not an earlier export; choose another folder")
    _check_dtype(dtype)
    places = _places(config)
    found = {**{n: p for n, p in params.items() if n != "layers"}, **params["layers"]}
    stored = _stored_dtype(found, places, dtype)
    tree = _nested(
        {
            ("params", "params", *place.scanned.split("/")): _Pending(found[name], place, stored)
            for name, place in places.items()
        }
    )
    with _written_aside(folder) as aside:
        _write_tree(aside, tree)
        files, token_ids = carried(assets)
        for name, data in files.items():
            (aside / name).write_bytes(data)
        hf = config.to_hf() | {"torch_dtype": stored} | token_ids
        (aside / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        (aside / FLAGS).write_text(
            "# Pass this file to a MaxText command in place of base.yml, with\n"
            f"# load_parameters_path=/absolute/path/of/this/folder/{ITEMS}\n"
            + yaml.safe_dump(
                {"base_config": "base.yml", **maxtext_flags(config, stored)}, sort_keys=False
            )
        )


def load_maxtext(
    folder: Path,
    config: Qwen3Config | None = None,
    *,
    param_dtype: str | None = None,
    shardings: Callable[[Qwen3Config], Params] | None = None,
    **run: Any,
) -> tuple[Qwen3Config, Params]:
    """Read config and parameters from a MaxText checkpoint, ours or its own.

    Layers may be stacked (``scan_layers``) or apart; the tree that of a training run, of parameters
    alone, or of an NNX model. Every tensor's name, shape and dtype is checked before any is read.

    Held in memory beside what is returned: one parameter (all its layers), twice on the host.

    Args:
        folder: an export of ours, a step, a tree (``.../0/items``), or a folder of steps, of which
            the newest is read.
        config: what the checkpoint holds; None reads the ``config.json`` beside it, as in an
            export. MaxText's own checkpoints carry none.
        param_dtype: "float32" or "bfloat16" to cast on reading; None keeps the stored bits.
        shardings: gives the tree of shardings for a config: where each parameter goes as soon as
            it is read; None for the default device.
        run: fields of our own for the config (``dtype`` to compute in, ``remat``, ...).

    Returns the config, without adapters and with the parameters' dtype, and the parameters.

    Raises InputError naming the first tensor that is missing, extra, misshapen or of another dtype.
    """
    import orbax.checkpoint as ocp  # imported late: it takes seconds
    from etils import epath

    _check_dtype(param_dtype)
    items = _find_tree(Path(folder).absolute())
    config = replace(config, **run) if config is not None else _read_config(items, run)
    config = replace(config, lora=None)  # stored matrices are whole
    places = _places(config)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        with _readable(items):
            stored = _weights(handler.metadata(epath.Path(items)).tree, items)
        parts, dtype = _match(places, stored, config, items)
        if param_dtype is None and len(dtype) > 1:
            raise InputError(
                f"{items}: tensors are {' and '.join(sorted(dtype))}: set param_dtype to cast"
            )
        wanted = param_dtype or dtype.pop()
        config = replace(config, param_dtype=wanted)
        layout = shardings(config) if shardings else None

        def read(name: str) -> jax.Array:
            keys = [stored[part].key for part in parts[name]]
            with _readable(items):
                tree = handler.restore(
                    epath.Path(items),
                    args=ocp.args.PyTreeRestore(
                        item=_nested(dict.fromkeys(keys, 0)),
                        restore_args=_nested({key: ocp.RestoreArgs(np.ndarray) for key in keys}),
                        partial_restore=True,
                    ),
                )
            host = places[name].from_maxtext([_at(tree, key) for key in keys])
            host = host.astype(jnp.dtype(wanted), copy=False)
            if layout is None:
                return jnp.asarray(host)
            return jax.device_put(host, layout[name] if name in _TOP else layout["layers"][name])

        params: Params = {name: read(name) for name in places if name in _TOP}
        params["layers"] = {name: read(name) for name in places if name not in _TOP}
    return config, params


def maxtext_flags(config: Qwen3Config, weight_dtype: str) -> dict[str, Any]:
    """The MaxText flags that describe this model, by the names of its ``base.yml``.

    Raises InputError as ``save_maxtext`` does.
    """
    _check_config(config)
    flags: dict[str, Any] = {
        "decoder_block": "qwen3_moe" if config.num_experts else "qwen3",
        "base_emb_dim": config.hidden_size,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "base_mlp_dim": config.moe_intermediate_size
        if config.num_experts
        else config.intermediate_size,
        "base_num_decoder_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "mlp_activations": ["silu", "linear"],
        "normalization_layer_epsilon": config.rms_norm_eps,
        "use_qk_norm": True,
        "rope_max_timescale": int(config.rope_theta),
        "logits_via_embedding": config.tie_word_embeddings,
        "normalize_embedding_logits": False,
        "enable_dropout": False,
        "scan_layers": True,
        "param_scan_axis": _SCAN_AXIS,
        "dtype": config.dtype,
        "weight_dtype": weight_dtype,
    }
    if config.num_experts:
        flags |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "base_moe_mlp_dim": config.moe_intermediate_size,
            "norm_topk_prob": True,
        }
    yarn = config.rope_scaling
    if yarn is not None:
        reach = int(yarn.factor) * yarn.original_max_position_embeddings
        flags |= {
            "rope_type": "yarn",
            "rope_factor": int(yarn.factor),
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            # the length of its table of angles: a position behind it has none
            "max_position_embeddings": max(config.max_position_embeddings, reach),
            "beta_fast": int(yarn.beta_fast),
            "beta_slow": int(yarn.beta_slow),
            "rope_truncate": yarn.truncate,
            "rope_interleave": False,
            "rope_attention_scaling": yarn.amplitude != 1.0,
        }
    return flags


def _check_config(config: Qwen3Config) -> None:
    """Raise InputError for the first thing that MaxText's Qwen3 blocks cannot hold or compute."""

    def refuse(what: str) -> None:
        raise InputError(f"MaxText cannot hold this model: {what}")

    if config.attention_bias:
        refuse("attention_bias: its Qwen3 blocks have no biases")
    if config.lora is not None:
        refuse("lora: it has no adapters here; merge them into the matrices")
    if config.num_experts and not config.norm_topk_prob:
        refuse("norm_topk_prob=False: it always normalizes the chosen experts' weights")
    if config.rope_theta != int(config.rope_theta):
        refuse(f"rope_theta={config.rope_theta}: it takes whole numbers")
    yarn = config.rope_scaling
    if yarn is not None:
        for name in ("factor", "beta_fast", "beta_slow"):
            if getattr(yarn, name) != int(getattr(yarn, name)):
                refuse(f"rope scaling: {name}={getattr(yarn, name)}: it takes whole numbers")
        if yarn.amplitude not in (1.0, replace(yarn, attention_factor=None, mscale=None).amplitude):
            refuse(
                f"rope scaling: cos and sin times {yarn.amplitude}: it has 1 or 0.1 ln(factor)+1"
            )


@dataclass(frozen=True)
class _Place:
    """Where one of our parameters lies in MaxText's tree.

    ``path`` is absolute, or within a layer where ``layers`` is not 0. ``ours`` is our shape without
    the layer axis, ``own`` MaxText's: the same numbers in the same order, heads apart.
    """

    path: str
    layers: int
    ours: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def scanned(self) -> str:
        """The path in a tree whose layers are stacked."""
        return f"decoder/layers/{self.path}" if self.layers else self.path

    def parts(self, scanned: bool) -> list[tuple[str, tuple[int, ...]]]:
        """(path, shape) of the tensors that make up the parameter, in order."""
        if not self.layers:
            return [(self.path, self.own)]
        if scanned:
            shape = (*self.own[:_SCAN_AXIS], self.layers, *self.own[_SCAN_AXIS:])
            return [(self.scanned, shape)]
        return [(f"decoder/layers_{i}/{self.path}", self.own) for i in range(self.layers)]

    def to_maxtext(self, value: np.ndarray) -> np.ndarray:
        """Our parameter with its layers at MaxText's axis; a view where the input allows one."""
        if not self.layers:
            return value
        return np.moveaxis(value.reshape(self.layers, *self.own), 0, _SCAN_AXIS)

    def from_maxtext(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Our parameter, contiguous, from its parts."""
        if not self.layers:
            return values[0]
        stacked = len(values) == 1 and values[0].ndim > len(self.own)
        value = np.moveaxis(values[0], _SCAN_AXIS, 0) if stacked else np.stack(values)
        return np.ascontiguousarray(value).reshape(self.layers, *self.ours)


def _places(config: Qwen3Config) -> dict[str, _Place]:
    """The place of every parameter of this config, by its name (unique over top and layers)."""
    _check_config(config)
    want = abstract(config)
    paths = _ATTENTION | (_MIXTURE if config.num_experts else _DENSE)
    if set(paths) != set(want["layers"]):
        odd = sorted(set(paths) ^ set(want["layers"]))[0]
        raise InputError(f"MaxText cannot hold this model: its layers have no place for {odd!r}")
    d, hd = config.hidden_size, config.head_dim
    heads, kv = (config.num_attention_heads, hd), (config.num_key_value_heads, hd)
    apart = {"q": (d, *heads), "k": (d, *kv), "v": (d, *kv), "o": (*heads, d)}
    places = {
        name: _Place(_TOP[name], 0, spec.shape, spec.shape)
        for name, spec in want.items()
        if name != "layers"
    }
    for name, path in paths.items():
        ours = want["layers"][name].shape[1:]
        places[name] = _Place(path, config.num_hidden_layers, ours, apart.get(name, ours))
    return places


class _Pending:
    """A parameter on its way to disk: brought to the host, moved and cast when its turn comes."""

    def __init__(self, value: Any, place: _Place, dtype: str) -> None:
        self._value, self._place, self._dtype = value, place, dtype

    def read(self) -> np.ndarray:
        host = self._place.to_maxtext(np.asarray(self._value))
        return host.astype(jnp.dtype(self._dtype), copy=False)


def _write_tree(folder: Path, tree: dict[str, Any]) -> None:
    """Write a tree of _Pending into a folder that becomes a step with one item."""
    import orbax.checkpoint as ocp

    numpy_handler = ocp.type_handlers.NumpyHandler

    class OneByOne(numpy_handler):  # type: ignore[misc, valid-type]
        """Orbax's writer of NumPy arrays, which by itself writes all of them at the same time."""

        async def serialize(
            self, values: Sequence[_Pending], infos: Sequence[Any], args: Any = None
        ) -> Sequence[Any]:
            for one in zip(values, infos, args, strict=True):
                await self._write(*one)
            return []

        async def _write(self, value: _Pending, info: Any, arg: Any) -> None:
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()

    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,  # both are MaxText's defaults
        use_zarr3=True,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (_Pending, OneByOne(deepcopy_host_arrays=False)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # none here, but Orbax looks for it
        ),
    )
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    # folders made in the background would come back after a failure has been cleaned up
    options = ocp.CompositeOptions(
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)
    )
    composite = ocp.CompositeCheckpointHandler(composite_options=options, **{ITEMS: handler})
    with ocp.Checkpointer(composite) as checkpointer:
        item = ocp.args.PyTreeSave(item=tree, save_args=save_args)
        checkpointer.save(
            folder / "step",  # Orbax wants to make it
            args=ocp.args.Composite(**{ITEMS: item}),
            custom_metadata={"scan_layers": True},  # MaxText compares its flag with it
        )
    for part in (folder / "step").iterdir():
        part.rename(folder / part.name)
    (folder / "step").rmdir()


@dataclass(frozen=True)
class _Stored:
    """A tensor in a checkpoint: its key in Orbax's tree, shape and dtype."""

    key: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: str


def _weights(tree: Any, where: Path) -> dict[str, _Stored]:
    """The weights of a checkpoint by MaxText's path, from Orbax's metadata.

    Around them lies ``params/params`` (a training run, beside its optimizer state), ``params``,
    ``base`` (reinforcement learning) or nothing; NNX trees end every path in ``value`` and may
    count layers by a key of their own. Keys of random numbers are left out.
    """
    root: tuple[Any, ...] = ()
    if "params" in tree:
        tree, root = tree["params"], ("params",)
        if "params" in tree:
            others = sorted(set(tree) - {"params"})
            if others:
                raise InputError(f"{where}: unexpected collection {others[0]!r} beside the weights")
            tree, root = tree["params"], (*root, "params")
    elif "base" in tree:
        tree, root = tree["base"], ("base",)
    found = {}
    for key, leaf in _flat(tree):
        parts: list[str] = []
        for part in map(str, key):
            if part.isdigit() and parts:
                parts[-1] += f"_{part}"
            else:
                parts.append(part)
        if parts[-1] == "value":
            parts.pop()
        if leaf is None or any(part in ("rngs", "to_nnx__rngs", "dropout") for part in parts):
            continue
        shape = tuple(getattr(leaf, "shape", None) or ())
        found["/".join(parts)] = _Stored((*root, *key), shape, str(getattr(leaf, "dtype", None)))
    return found


def _match(
    places: Mapping[str, _Place],
    stored: Mapping[str, _Stored],
    config: Qwen3Config,
    where: Path,
) -> tuple[dict[str, list[str]], set[str]]:
    """The paths that make up each parameter, and the dtypes they have; InputError if not exactly
    the config's tensors are stored."""
    scanned = not any(path.startswith("decoder/layers_") for path in stored)
    parts, dtypes = {}, set()
    for name, place in places.items():
        wanted = place.parts(scanned)
        for path, shape in wanted:
            if path not in stored:
                raise InputError(f"{where}: tensor {path!r} is missing")
            tensor = stored[path]
            if tensor.shape != shape:
                raise InputError(
                    f"{where}: tensor {path!r} has shape {tensor.shape}, "
                    f"the config asks for {shape}"
                )
            if tensor.dtype not in DTYPES:
                raise InputError(
                    f"{where}: tensor {path!r} has dtype {tensor.dtype}, not {' or '.join(DTYPES)}"
                )
            dtypes.add(tensor.dtype)
        parts[name] = [path for path, _ in wanted]
    extra = sorted(set(stored) - {path for paths in parts.values() for path in paths})
    if extra:
        raise InputError(f"{where}: unexpected tensor {extra[0]!r} for this config")
    return parts, dtypes


def _find_tree(folder: Path) -> Path:
    """The Orbax tree that a path leads to: itself, its item, or the item of its newest step."""
    steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    newest = [max(steps, key=lambda p: int(p.name)) / ITEMS] if steps else []
    for candidate in (folder, folder / ITEMS, *newest):
        if (candidate / _TREE).is_file():
            return candidate
    raise InputError(
        f"{folder} holds no MaxText checkpoint: no {_TREE} in it, in items, or in STEP/items"
    )


def _read_config(items: Path, run: Mapping[str, Any]) -> Qwen3Config:
    """The config of the export that a tree belongs to."""
    if not (items.parent / FLAGS).is_file():
        raise InputError(f"{items}: not an export of ours: say which config the model has")
    return read_config(items.parent, **run)


def _stored_dtype(found: Mapping[str, Any], places: Mapping[str, _Place], dtype: str | None) -> str:
    """The dtype to write, after checking every parameter's name and shape against its place."""
    odd = sorted(set(found) ^ set(places))
    if odd:
        problem = "is missing" if odd[0] in places else "has no place in this config"
        raise InputError(f"parameter {odd[0]} {problem}")
    for name, place in places.items():
        shape = (place.layers, *place.ours) if place.layers else place.ours
        if found[name].shape != shape:
            raise InputError(
                f"parameter {name} has shape {found[name].shape}, the config asks for {shape}"
            )
    kinds = {str(value.dtype) for value in found.values()}
    if dtype is None and (len(kinds) > 1 or not kinds <= set(DTYPES)):
        raise InputError(f"parameters are {' and '.join(sorted(kinds))}: set dtype to cast them")
    return dtype or kinds.pop()


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


@contextlib.contextmanager
def _readable(where: Path) -> Iterator[None]:
    """What Orbax, TensorStore and zarr raise about a damaged tree, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where} cannot be read: {reason[:160]}") from error


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place, flushed to disk, when the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (folder.parent / f".{folder.name}.{w}-{os.getpid()}" for w in ("writing", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in sorted(aside.rglob("*")):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _nested(flat: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """{("a", "b"): x} as {"a": {"b": x}}."""
    tree: dict[Any, Any] = {}
    for key, value in flat.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value
    return tree


def _flat(tree: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(key, leaf) of a tree of mappings and sequences."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _flat(value, (*key, name))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _flat(value, (*key, i))
    else:
        yield key, tree


def _at(tree: Any, key: tuple[Any, ...]) -> Any:
    for part in key:
        tree = tree[part]
    return tree
