"""Run configs: YAML files onto frozen dataclasses, with every mistake named.

A config file may begin with `include: [path, ...]` (relative to that file). Included files are
merged first, in order, then the file's own keys, then `dotted.key=value` overrides; mappings merge
key by key, everything else is replaced. The dataclass is the documentation: a key that it does not
have is refused with the nearest match, and a value of another type is refused too.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import InputError

T = TypeVar("T")
Origins = dict[str, str]  # dotted key -> the file or override that set it last


def load(cls: type[T], path: Path | str, overrides: list[str] | None = None) -> T:
    """Read the YAML file `path` as a `cls`, then apply `key=value` overrides (values are YAML).

    Raises InputError naming the file and the dotted key of whatever does not fit.
    """
    path = Path(path)
    origins: Origins = {}
    data = _read(path, origins, ())
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"override {override!r} is not of the form key=value")
        where = f"override {override!r}"
        nested = _parse(value, where)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(data, nested, where, origins)
    return _build(cls, data, str(path), origins)


def from_dict(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """A `cls` from plain data, checked as `load` does; `where` names the data in errors."""
    return _build(cls, data, where, {})


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML and JSON data: tuples become lists, paths become strings."""
    return _plain(dataclasses.asdict(config))


def dump(config: Any) -> str:
    """A config as YAML text; `load` of that text gives an equal config."""
    import yaml

    return yaml.dump(to_dict(config), Dumper=_dialect()[1], sort_keys=False)


def _read(path: Path, origins: Origins, parents: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in `path` on top of everything that it includes."""
    if path.resolve() in parents:
        raise InputError(f"{path}: includes itself, by way of {parents[-1]}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read config {path}: {reason}") from None
    own = _parse(text, str(path))
    if own is None:
        own = {}
    if not isinstance(own, dict):
        raise InputError(f"{path}: expected a mapping of keys, got {_got(own)}")
    includes = own.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise InputError(f"{path}: include: expected a list of paths, got {_got(includes)}")
    data: dict[str, Any] = {}
    for name in includes:
        included = path.parent / name
        inner: Origins = {}
        _merge(data, _read(included, inner, (*parents, path.resolve())), str(included), origins)
        origins.update(inner)
    _merge(data, own, str(path), origins)
    return data


def _merge(base: dict[str, Any], top: Any, where: str, origins: Origins, at: str = "") -> None:
    """Put `top` onto `base` in place, noting in `origins` who set each dotted key."""
    for key, value in top.items():
        dotted = f"{at}{key}"
        origins[dotted] = where
        if isinstance(value, dict):
            if not isinstance(base.get(key), dict):
                base[key] = {}
            _merge(base[key], value, where, origins, dotted + ".")
        else:
            base[key] = value


def _build(cls: Any, data: Mapping[str, Any], where: str, origins: Origins) -> Any:
    import pydantic

    _refuse_unknown(cls, data, where, origins)
    try:
        # The strict JSON mode takes lists for tuples and whole numbers for floats, and nothing
        # else that is not of the declared type: no "3" or true for an int.
        return _adapter(cls).validate_json(json.dumps(data, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        dotted = _dotted(first["loc"], data)
        source = _origin(dotted, where, origins)
        if first["type"] == "missing":
            raise InputError(f"{source}: {dotted}: this key is required") from None
        if first["type"] == "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{source}: {dotted + ': ' if dotted else ''}{reason}") from None
        expected = first["msg"].removeprefix("Input should be ")
        expected = "a mapping of keys" if first["type"] == "dataclass_type" else expected
        message = f"{source}: {dotted}: expected {expected}, got {_got(first['input'])}"
        raise InputError(message) from None


@functools.cache
def _adapter(cls: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(cls)


def _refuse_unknown(kind: Any, value: Any, where: str, origins: Origins, at: str = "") -> None:
    """Walk `value` along the type `kind`; raise on a key that no dataclass field has."""
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = typing.get_type_hints(kind)
        known = [field.name for field in dataclasses.fields(kind) if field.init]
        for key, inner in value.items():
            dotted = f"{at}{key}"
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {at}{near[0]}?" if near else f"known: {', '.join(known)}"
                source = _origin(dotted, where, origins)
                raise InputError(f"{source}: unknown key {dotted}: {hint}")
            _refuse_unknown(hints[key], inner, where, origins, dotted + ".")
        return
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        groups = [argument for argument in arguments if dataclasses.is_dataclass(argument)]
        if len(groups) == 1:
            _refuse_unknown(groups[0], value, where, origins, at)
    elif origin in (tuple, list) and isinstance(value, list) and arguments:
        for index, inner in enumerate(value):
            _refuse_unknown(arguments[0], inner, where, origins, f"{at}{index}.")
    elif origin is dict and isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_unknown(arguments[1], inner, where, origins, f"{at}{key}.")


def _parse(text: str, where: str) -> Any:
    """YAML text as plain data; a syntax error or a key given twice raises InputError."""
    import yaml

    try:
        return yaml.load(text, _dialect()[0])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not valid YAML: {problem}") from None


@functools.cache
def _dialect() -> tuple[Any, Any]:
    """PyYAML's safe loader and dumper, less two traps: 3e-4 is a float, a repeated key an error."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {name!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(name)
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):
        pass

    number = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    for side in (Loader, Dumper):
        side.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader, Dumper


def _dotted(location: tuple[Any, ...], data: Any) -> str:
    """A pydantic location as a dotted key, without the tags that it adds for union members."""
    parts = []
    for part in location:
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part]
        elif part is not location[-1] or not isinstance(data, Mapping):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _origin(dotted: str, where: str, origins: Origins) -> str:
    """Who set `dotted`, or the nearest mapping around it."""
    while dotted:
        if dotted in origins:
            return origins[dotted]
        dotted = dotted.rpartition(".")[0]
    return where


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _got(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"
