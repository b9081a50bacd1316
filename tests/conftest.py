"""Parts that many tests share."""

from __future__ import annotations

import pytest

from model.tokenizer import Tokenizer, train
from sft.chat import FRAGMENTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small tokenizer with the fragments of the agent's format."""
    texts = ["def f(x):\n    return x + 1\n" * 20, "123 if a <= b: raise ValueError(a)\n" * 20]
    return train(texts, 320, FRAGMENTS)
