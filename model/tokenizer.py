"""A byte-level BPE tokenizer with Qwen3's special tokens, in Hugging Face's file layout.

Any text encodes (bytes are the alphabet) and decodes to itself. Special tokens are never read out
of plain text: a file that contains "<|im_end|>" cannot end a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from configs.errors import InputError
from configs.files import write_atomic

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
# Words, numbers of up to three digits (a line number is then one token), punctuation, blanks.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


class Tokenizer:
    """Encodes and decodes; made by `train` or `Tokenizer.load`."""

    def __init__(self, backend: Backend) -> None:
        ids = {name: backend.token_to_id(name) for name in SPECIAL}
        missing = [name for name, number in ids.items() if number is None]
        if missing:
            raise InputError(f"tokenizer: special tokens {missing} are missing")
        # plain text is encoded by a copy that has never heard of the special tokens
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["special"]]
        self._backend, self._plain = backend, Backend.from_str(json.dumps(spec))
        self._special = {name: number for name, number in ids.items() if number is not None}
        self.vocab_size = backend.get_vocab_size()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`; names of special tokens in it count as such only with `special`."""
        if not special:
            return self._plain.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part in _MARKED.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._plain.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def id(self, token: str) -> int:
        """Id of a special token."""
        return self._special[token]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL),
            "clean_up_tokenization_spaces": False,
        }
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
        write_atomic(folder / "tokenizer.json", self._backend.to_str() + "\n")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a folder that `save` wrote, or any with a `tokenizer.json` of the same kind."""
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        try:
            return cls(Backend.from_str(text))
        except InputError:
            raise
        except Exception as error:  # the library raises a bare Exception for a damaged file
            raise InputError(f"{path}: not a tokenizer: {error}") from None


def train(texts: Iterable[str], vocab_size: int, fragments: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries, special tokens and `fragments` included.

    Args:
      texts: what to learn merges from.
      fragments: strings that are always one token, wherever they occur.
    """
    merged = vocab_size - len(SPECIAL) - len(fragments)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if merged < len(alphabet):
        raise InputError(f"vocab_size {vocab_size} has no room for {len(alphabet)} bytes")
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=merged, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_tokens([AddedToken(text, normalized=False) for text in fragments])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return Tokenizer(backend)
