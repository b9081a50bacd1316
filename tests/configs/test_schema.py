"""Configs: composition, overrides, and an error that names every mistake."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import schema
from configs.errors import InputError


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    name: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Stage:
    optim: Optim = Optim()
    steps: int = 1


@dataclass(frozen=True)
class Run:
    seed: int
    sft: Stage = Stage()
    rl: Stage | None = None
    reference: Optional[Optim] = None  # noqa: UP045 (both spellings are to work)
    axes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    shape: tuple[int, int] = (1, 1)
    out: Path = Path("runs")
    resume: bool = False
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError("seed must not be negative")


def write(folder: Path, **files: str) -> Path:
    """Write `NAME=text` as NAME.yaml; returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_every_kind_of_field(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        run="""
seed: 3
sft: {optim: {lr: 3e-4, name: sgd}}
rl: {steps: 20}
reference: {lr: 1}
axes: [data, fsdp]
stages: [{steps: 1}, {optim: {lr: 1.5}}]
shape: [2, 4]
out: runs/x
resume: true
weights: {a: 0.5}
""",
    )
    assert schema.load(Run, path) == Run(
        seed=3,
        sft=Stage(Optim(3e-4, "sgd")),
        rl=Stage(steps=20),
        reference=Optim(1.0),
        axes=("data", "fsdp"),
        stages=(Stage(steps=1), Stage(Optim(1.5))),
        shape=(2, 4),
        out=Path("runs/x"),
        resume=True,
        weights={"a": 0.5},
    )


def test_includes_come_first_in_order_and_merge_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    write(tmp_path / "algo", base="seed: 1\nsft: {steps: 5, optim: {lr: 0.5}}\naxes: [a, b]")
    write(tmp_path / "algo", top="include: [base.yaml]\nsft: {optim: {lr: 0.25}}")
    path = write(
        tmp_path, run="include: [algo/top.yaml, other.yaml]\nseed: 2", other="axes: [c]\nseed: 9"
    )
    run = schema.load(Run, path, ["sft.optim.name=sgd", "rl.steps=7"])
    assert run.seed == 2 and run.axes == ("c",)
    assert run.sft == Stage(Optim(0.25, "sgd"), 5)
    assert run.rl == Stage(steps=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: abc", "run.yaml: seed: expected a valid integer, got 'abc' (str)"),
        ("seed: true", "run.yaml: seed: expected a valid integer, got True (bool)"),
        ("seed: 1.0", "run.yaml: seed: expected a valid integer, got 1.0 (float)"),
        ("seed: 1\nresume: 1", "run.yaml: resume: expected a valid boolean, got 1 (int)"),
        ("seed: 1\nsft:", "run.yaml: sft: expected a mapping of keys, got nothing"),
        ("seed: 1\nrl: {steps: x}", "run.yaml: rl.steps: expected a valid integer, got 'x' (str)"),
        (
            "seed: 1\nsft: {optim: {name: adam}}",
            "run.yaml: sft.optim.name: expected 'adamw' or 'sgd', got 'adam' (str)",
        ),
        (
            "seed: 1\nstages: [{}, {steps: x}]",
            "run.yaml: stages.1.steps: expected a valid integer, got 'x' (str)",
        ),
        ("{}", "run.yaml: seed: this key is required"),
        ("seed: -1", "run.yaml: seed must not be negative"),
        ("seed: 1\nsft: {stepz: 1}", "run.yaml: unknown key sft.stepz: did you mean sft.steps?"),
        ("seed: 1\nrl: {stepz: 1}", "run.yaml: unknown key rl.stepz: did you mean rl.steps?"),
        ("seed: 1\nqqq: 1", "run.yaml: unknown key qqq: known: seed, sft, rl"),
        (
            "seed: 1\nstages: [{optim: {lrr: 1}}]",
            "run.yaml: unknown key stages.0.optim.lrr: did you mean stages.0.optim.lr?",
        ),
        ("seed: 1\nseed: 2", "run.yaml:2: not valid YAML: key 'seed' is given twice"),
        ("seed: [1", "run.yaml:1: not valid YAML"),
        ("- 1", "run.yaml: expected a mapping of keys, got [1] (list)"),
        ("include: 3\nseed: 1", "run.yaml: include: expected a list of paths"),
        ("include: [nowhere.yaml]", "nowhere.yaml: No such file or directory"),
        ("include: [run.yaml]", "run.yaml: includes itself"),
        ("!!python/object/apply:os.getpid []", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, run=text)
    with pytest.raises(InputError) as caught:
        schema.load(Run, path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_or_override_that_set_the_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, run="include: [base.yaml]\nseed: 1", base="sft: {steps: x}")
    with pytest.raises(InputError, match=r"base\.yaml: sft\.steps: expected"):
        schema.load(Run, path)
    with pytest.raises(InputError, match=r"override 'sft\.steps=y': sft\.steps: expected"):
        schema.load(Run, path, ["sft.steps=y"])
    with pytest.raises(InputError, match=r"override 'sft\.stps=1': unknown key sft\.stps"):
        schema.load(Run, path, ["sft.stps=1"])
    with pytest.raises(InputError, match="is not of the form key=value"):
        schema.load(Run, path, ["sft.steps"])


@given(
    st.builds(
        Run,
        seed=st.integers(0),
        sft=st.builds(Stage, st.builds(Optim, st.floats(allow_nan=False)), st.integers()),
        rl=st.none() | st.builds(Stage),
        axes=st.lists(st.text()).map(tuple),
        out=st.sampled_from([Path("a"), Path("/b/c d")]),
        weights=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    )
)
def test_dump_and_load_are_inverse(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(schema.dump(run), encoding="utf-8")
    assert schema.load(Run, path) == run
    assert schema.from_dict(Run, schema.to_dict(run), "here") == run


def test_from_dict_names_its_source() -> None:
    with pytest.raises(InputError, match="task.toml: unknown key sead: did you mean seed"):
        schema.from_dict(Run, {"sead": 1}, "task.toml")


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    path = write(tmp_path, run="seed: 1\nsft: {optim: {lr: 3e-4}}\nweights: {a: 1E5, b: .inf}")
    run = schema.load(Run, path)
    assert run.sft.optim.lr == 3e-4
    assert run.weights == {"a": 1e5, "b": math.inf}
