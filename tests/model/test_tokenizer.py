"""The tokenizer: lossless on any text, deaf to special tokens inside it, readable by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from model.tokenizer import SPECIAL, Tokenizer, train

TEXTS = [Path(__file__).read_text(), (Path(__file__).parent / "test_decode.py").read_text()] * 2
MARKED = st.lists(
    st.one_of(
        st.text(max_size=20), st.sampled_from([*SPECIAL, "<|im_", "end|>", "<tool", "_call>"])
    )
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS, 640, ["<fragment>"])


@given(MARKED)
@settings(max_examples=300, deadline=None)
def test_hostile_text_never_yields_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text, special=False)
    assert not {tokenizer.id(name) for name in SPECIAL} & set(ids)
    assert tokenizer.decode(ids) == text


@given(MARKED)
@settings(max_examples=100, deadline=None)
def test_special_tokens_are_read_where_asked_for(tokenizer, text):
    ids = tokenizer.encode(text, special=True)
    assert tokenizer.decode(ids) == text
    hits = sum(ids.count(tokenizer.id(name)) for name in SPECIAL)
    assert hits == sum(text.count(name) for name in SPECIAL)


def test_vocabulary_is_as_asked_with_special_tokens_last(tokenizer):
    assert tokenizer.vocab_size == 640
    assert sorted(tokenizer.id(name) for name in SPECIAL) == list(range(640 - len(SPECIAL), 640))
    assert len(tokenizer.encode("a <fragment> b", special=False)) <= 5
    assert len(tokenizer.encode("import numpy", special=False)) < len("import numpy")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    text = TEXTS[0] + "<|im_end|>"
    for special in (True, False):
        assert again.encode(text, special=special) == tokenizer.encode(text, special=special)


def test_training_is_reproducible(tokenizer, tmp_path):
    again = train(TEXTS, 640, ["<fragment>"])
    for name, made in (("a", tokenizer), ("b", again)):
        made.save(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_text() == (
        tmp_path / "b/tokenizer.json"
    ).read_text()


def test_transformers_reads_it_with_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs remend[parity]")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nfix 12345 <tool_call>{}</tool_call>\tüñ\n\n  x = 1<|im_end|>\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
    assert theirs.eos_token_id == tokenizer.id("<|im_end|>")


def test_bad_input_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="im_end"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="room"):
        train(TEXTS, 200)
