"""What travels with a checkpoint's weights, whatever format they are rewritten in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.export_folder import read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carried(source: Path | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Of a checkpoint's folder: tokenizer, template and generation files by name, and the fields of
    its config.json that name special tokens. Both are empty without a folder."""
    if source is None:
        return {}, {}
    files = {name: (source / name).read_bytes() for name in FILES if (source / name).is_file()}
    config = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    return files, {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
