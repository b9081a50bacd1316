"""A run so small that several hosts can do it in a test, through the real command line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from model.config import Qwen3Config
from model.hf import save_hf
from model.qwen3 import init
from model.tokenizer import Tokenizer
from sandbox.patch import make_patch
from sandbox.shipped import instruction
from sandbox.task import ALWAYS_PROTECTED, Task
from tests.sandbox.releases import sdist

ROOT = Path(__file__).resolve().parents[2]
MODULE = "src/mini/compare.py"
OPERATORS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
WRONG = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def _source(name: str) -> str:
    return f"def {name}(a, b):\n    return a {OPERATORS[name]} b\n"


PRISTINE = "\n\n".join(map(_source, OPERATORS))
TESTS = "from mini import compare\n" + "".join(
    f"\n\ndef test_{name}():\n    assert compare.{name}(3, 3) is {eval(f'3 {sign} 3')}\n"
    for name, sign in OPERATORS.items()
)
CONFIG: dict[str, Any] = {
    "policy": "policy",
    "mesh": {"data": 2},
    "tasks": {"index": "tasks"},
    "sandbox": {"slots": 2, "backend": "plain"},
    "server": {"slots": 2, "prefill_rows": 2},
    "agent": {"max_turns": 4, "max_tokens": 512, "max_new_tokens": 64},
    "teach": {"tries": 4},
    "sft": {
        "epochs": 12,
        "batch_rows": 4,
        "microbatch_rows": 2,
        "row_tokens": 512,
        "row_targets": 256,
        "checkpoint_every": 6,
    },
    "rl": {
        "steps": 2,
        "tasks_per_step": 3,
        "group_size": 2,
        "row_tokens": 512,
        "row_targets": 256,
        "microbatch_rows": 2,
        "checkpoint_every": 2,
        "turn_credit": 0.5,
    },
    "eval": {"tries": 1},
}


def prepare(folder: Path) -> None:
    """Tasks, a random policy and ``run.yaml`` in `folder`."""
    files = {"src/mini/__init__.py": "", MODULE: PRISTINE, "tests/test_compare.py": TESTS}
    archive = sdist(files)
    for number, (name, sign) in enumerate(OPERATORS.items()):
        wrong = _source(name).replace(sign, WRONG[sign])
        task = Task(
            name=f"mini-{name}",
            source="procedural",
            split="heldout" if number < 2 else "train",
            package="mini",
            version="1.0",
            sdist_sha256=hashlib.sha256(archive).hexdigest(),
            licence="MIT",
            module=MODULE,
            function=name,
            operator="comparison",
            instruction=instruction(MODULE, name, (f"tests/test_compare.py::test_{name}",)),
            fail_to_pass=(f"tests/test_compare.py::test_{name}",),
            pass_to_pass=tuple(f"tests/test_compare.py::test_{n}" for n in OPERATORS if n != name),
            python_path=("src",),
            bug_patch=make_patch(
                {MODULE: PRISTINE.encode()},
                {MODULE: PRISTINE.replace(_source(name), wrong).encode()},
            ),
            protected=("tests", "tests/*", *ALWAYS_PROTECTED),
        )
        task.release.archive.parent.mkdir(parents=True, exist_ok=True)
        task.release.archive.write_bytes(archive)
        task.tree()
        task.save(folder / "tasks" / task.name)
    model = Qwen3Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    tokenizer = Tokenizer.load(ROOT / "model" / "policies" / "tiny")
    save_hf(folder / "policy", init(model, 0), model, tokenizer)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
