"""A study's tables and page, from cells whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import InputError
from rl.report_study import figures_of_study, is_study, read_study, write_study
from rl.study_grid import grid
from rl.study_tables import study_record
from sandbox.environments import ENVIRONMENTS
from tests.studies import HOSTILE, write
from tools.report import main

CELLS = grid(ENVIRONMENTS, True, (0,))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("study"))


def test_the_grid_has_every_cell_once() -> None:
    cells = grid(ENVIRONMENTS, True, (0, 1))
    assert len({cell.name for cell in cells}) == len(cells) == 2 * (2 + 2 * 2 + 2 * 2 * 2 * 2)
    assert not any(c.thinking for c in cells if c.policy == "teacher")
    assert len(grid(("simplified",), False, (0,))) == 4


def test_claims_come_out_as_the_cells_were_made(study: Path) -> None:
    """20 points where trained, none elsewhere, thinking 10 worse, an exploit rate that rises."""
    found = {row["key"]: row for row in read_study(study)["claims"]}
    assert found["gain"]["outcome"] == found["transfer"]["outcome"] == "holds"
    assert found["gain"]["ours"]["mean"] == pytest.approx(0.2, abs=0.08)
    assert set(found["gain"]["parts"]) == {*ENVIRONMENTS, "over the untuned policy"}
    assert found["thinking"]["outcome"] == "holds"
    assert found["exploitation"]["outcome"] == "holds"
    assert found["tools"]["outcome"] == "holds" and found["tools"]["ours"]["mean"] == 2.0
    assert found["student"]["ours"]["low"] < 0 < found["student"]["ours"]["high"]


def test_one_row_a_cell_with_pass_at_k_and_costs(study: Path) -> None:
    record = read_study(study)
    assert len(record["cells"]) == len(grid(ENVIRONMENTS, True, (0, 1)))
    row = record["cells"][0]
    assert list(row["pass_at"]) == ["1", "2", "3", "4"]
    assert row["pass_at"]["1"] == pytest.approx(row["success"]["mean"])
    assert row["pass_at"]["4"] > row["pass_at"]["1"]
    assert row["cost"]["tokens"] == 3 and row["cost"]["sampled"] == 2
    assert row["cost"]["sandbox_s"] == 0.5 and row["cost"]["calls"] > 2
    group = next(g for g in record["groups"] if g["policy"] == "rl")
    assert set(group["seeds"]) == {"0", "1"} and set(group["pass_at"]) == {"1", "4"}


def test_of_policies_that_cannot_think_the_claim_about_it_stays_open(study: Path) -> None:
    found = study_record(study, grid(ENVIRONMENTS, True, (0, 1)), ENVIRONMENTS, thinks=False)
    (row,) = (row for row in found["claims"] if row["key"] == "thinking")
    assert row["outcome"] == "undecided" and "never taught" in row["note"]
    assert row["ours"]["high"] < 0


def test_cells_that_are_not_done_leave_their_claims_undecided(tmp_path: Path) -> None:
    found = study_record(tmp_path, grid(ENVIRONMENTS, True, (0,)), ENVIRONMENTS, thinks=True)
    assert {row["outcome"] for row in found["claims"]} == {"undecided"}
    assert found["cells"] == [] and found["exploitation"] is None


def test_policies_that_call_nothing_are_no_failure(tmp_path: Path) -> None:
    out = write(tmp_path, tasks=3, tries=1, seeds=(0,), steps=2)
    for path in out.glob("cells/*/trajectories/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        empty = [{"text": "", "calls": [], "observations": ["error: no complete tool call"]}]
        records = [{**line, "turns": empty, "tool_counts": {}} for line in lines]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "study.json").write_text(json.dumps(study_record(out, CELLS, ENVIRONMENTS, thinks=True)))
    assert write_study(out).exists()
    found = next(row for row in read_study(out)["claims"] if row["key"] == "tools")
    assert found["outcome"] == "undecided" and found["note"] == "no policy called a tool"


def test_tasks_that_one_environment_cannot_judge_are_left_out_of_pairs(tmp_path: Path) -> None:
    out = write(tmp_path, tasks=12, tries=2, seeds=(0,), steps=2)
    path = next(out.glob("cells/rl-from-full-in-full-seed0/cell.json"))
    row = json.loads(path.read_text())
    row["tasks"].popitem()
    path.write_text(json.dumps(row))
    found = study_record(out, grid(ENVIRONMENTS, True, (0,)), ENVIRONMENTS, thinks=True)
    gain = next(row for row in found["claims"] if row["key"] == "gain")
    assert gain["ours"]["n"] == 11


def test_the_page_holds_the_claims_and_no_markup_of_agents(study: Path) -> None:
    text = write_study(study).read_text()
    for word in ("on par with its teacher", "Exploitation", "guard off", "pass@4", "§6 and figure"):
        assert word in text
    assert HOSTILE not in text and "<img" not in text
    assert text.index("The paper's claims") < text.index("Held-out success")


def test_report_knows_a_study_and_writes_its_figures(study: Path, tmp_path: Path) -> None:
    assert is_study(study)
    assert main([str(study), "--figures", str(tmp_path / "figures")]) == 0
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert len(names) == len(figures_of_study(study)) and "exploits-by-the-tests-held-back" in names
    band = (tmp_path / "figures" / "exploits-by-the-tests-held-back.svg").read_text()
    assert band.count("<polygon") == 2


def test_a_study_under_way_has_a_page_and_damage_is_named(tmp_path: Path) -> None:
    out = write(tmp_path / "a", tasks=20, tries=1, seeds=(0,), steps=2)
    (out / "study.json").unlink()
    (out / "study.yaml").write_text("")
    config = {"environments": list(ENVIRONMENTS), "thinking": ["x=1"], "seeds": [0]}
    config |= {"taught_to_think": False, "train_thinking": False}
    (out / "study-config.json").write_text(json.dumps(config))
    next(out.glob("cells/sft*/cell.json")).unlink()
    assert "never taught to think" in write_study(out).read_text()
    cell = next(out.glob("cells/rl*/cell.json"))
    cell.write_text("{")
    with pytest.raises(InputError, match=cell.parent.name):
        write_study(out)
    (out / "study.json").write_text("[]")
    with pytest.raises(InputError, match="not a study's record"):
        write_study(out)
