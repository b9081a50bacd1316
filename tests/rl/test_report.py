"""The report page: figures in, figures out; hostile text stays text; missing parts say so."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.files import write_atomic, write_jsonl
from rl import report
from rl.figures import write_figures
from rl.report import figures_of, write_comparison, write_report
from rl.report_charts import MAX_POINTS, curve, ticks
from rl.report_sections import headline

HOSTILE = "</script><img src=x onerror=alert(1)><!-- <script> \u2028 & $name"

SUMMARY: dict[str, Any] = {
    "success": {
        "noop": {"mean": 0.0, "low": 0.0, "high": 0.018, "n": 240},
        "teacher": {"mean": 0.583, "low": 0.52, "high": 0.644, "n": 240},
        "sft": {"mean": 0.392, "low": 0.332, "high": 0.455, "n": 240},
        "rl": {"mean": 0.496, "low": 0.433, "high": 0.559, "n": 240},
    },
    "gain": {"mean": 0.104, "low": 0.046, "high": 0.162},
    "wall_s": 643.2,
    "peak_rss_gib": 3.42,
    "seeds": [3, 4],
    "phases": {"rl": 220.0, HOSTILE: 1.0},
    "isolation": "bwrap",
    "per_operator": {"boundary": {"teacher": 0.61, "sft": 0.25}, HOSTILE: {"rl": 0.5}},
    "not known to the report": [1],
}


class Page(HTMLParser):
    """What a browser would build: the elements, the text of scripts, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.styles: list[str] = []
        self.text = ""
        self._inside: tuple[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = (tag, dict(attrs).get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text += data
        elif self._inside[0] == "style":
            self.styles.append(data)
        else:
            name = self._inside[1]
            self.scripts[name] = self.scripts.get(name, "") + data

    def data(self, name: str) -> Any:
        return json.loads(self.scripts[name])

    def unpacked(self, name: str) -> Any:
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[name])))

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def episode(policy: str, task: str = "t-1", text: str = "hello", **changes: Any) -> dict[str, Any]:
    calls = [{"name": "edit", "arguments": {"path": "a.py", "old": text, "new": "x"}}]
    return {
        "task": task,
        "package": "boltons",
        "operator": "boundary",
        "split": "heldout",
        "policy": policy,
        "seed": 3,
        "weight_version": 1,
        "prompt": f"Repair {task}.",
        "ids": [101, 102, 103, 104],
        "author": [0, 0, 1, 1],
        "logprobs": [0.0, 0.0, -0.5, -0.25],
        "turns": [{"text": text, "calls": calls, "observations": [text]}],
        "patch": f"-{text}\n+x\n",
        "verdict": {"verdict": "pass", "fail_to_pass": {text: "passed"}, "flags": []},
        "reward": 1.0,
        "stop": "submit",
        "seconds": 1.5,
        "tool_counts": {"edit": 1},
        **changes,
    }


def run_folder(folder: Path, **trajectories: list[dict[str, Any]]) -> Path:
    write_atomic(folder / "summary.json", json.dumps(SUMMARY))
    metrics = [
        {"phase": "sft", "step": step, "loss": 2.0 / (step + 1), "sft/odd": step}
        for step in range(90)
    ]
    metrics += [
        {"phase": "rl", "step": step, "seed": seed, "rl/reward": 0.3 + 0.01 * step, "done": True}
        for step in range(10)
        for seed in (3, 4)
    ]
    write_jsonl(folder / "metrics.jsonl", metrics)
    for name, records in trajectories.items():
        write_jsonl(folder / "trajectories" / f"{name.replace('_', '-')}.jsonl", records)
    return folder


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_figures_of_the_summary_are_on_the_page(tmp_path: Path) -> None:
    words = page_of(run_folder(tmp_path)).words
    assert "SFT+RL repairs 49.6 % of held-out bugs, 10.4 points more than SFT alone" in words
    assert "(paired 95 % interval +4.6 to +16.2)" in words
    for row in ("No-op 0.0 % 0.0 – 1.8 240", "Teacher 58.3 % 52.0 – 64.4 240"):
        assert row.replace(" ", "") in words.replace(" ", "")
    for fact in ("10 min 43 s", "3.4 GiB", "3, 4", "3 min 40 s", "bubblewrap", "61.0 %"):
        assert fact in words


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        ({"mean": 0.02, "low": -0.01, "high": 0.05}, "2.0 points more"),
        ({"mean": -0.02, "low": -0.05, "high": 0.01}, "2.0 points fewer"),
    ],
)
def test_a_gain_that_may_be_none_is_not_claimed(gain: dict[str, float], expected: str) -> None:
    text = headline({**SUMMARY, "gain": gain})
    assert expected in text and text.endswith("The interval includes zero.")
    assert "includes zero" not in headline(SUMMARY)


def test_curves_have_one_chart_a_metric_and_one_line_a_seed(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path))
    charts = {attrs["aria-label"]: attrs for tag, attrs in page.tags if "data-lines" in attrs}
    assert sorted(label.split(" ")[0] for label in charts if label) == [
        "rl/reward",
        "sft/loss",
        "sft/odd",
    ]
    reward = next(attrs for label, attrs in charts.items() if label and "rl/reward" in label)
    lines = json.loads(reward["data-lines"] or "")
    assert [len(line) for line in lines] == [10, 10]
    assert lines[0][9][:2] == [9, pytest.approx(0.39)]
    assert json.loads(reward["data-labels"] or "") == ["seed 3: ", "seed 4: "]


def test_a_step_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    records = [{"phase": "sft", "step": step, "sft/loss": loss} for step, loss in [(0, 3), (1, 9)]]
    write_jsonl(tmp_path / "metrics.jsonl", [*records, {"phase": "sft", "step": 1, "sft/loss": 2}])
    page = page_of(tmp_path)
    lines = next(
        json.loads(attrs["data-lines"] or "") for _, attrs in page.tags if "data-lines" in attrs
    )
    assert [point[:2] for point in lines[0]] == [[0, 3], [1, 2]]


def test_values_that_are_not_finite_are_counted_not_drawn() -> None:
    html = curve("rl/kl", {"": {0: 1.0, 1: math.nan, 2: math.inf, 3: 2.0}})
    assert "2 not finite" in html
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)
    assert "1 not finite" in curve("rl/kl", {"": {0: math.nan}})


def test_a_long_line_keeps_its_spikes() -> None:
    values = {float(step): 0.0 for step in range(50_000)} | {31_415.0: 7.5}
    html = curve("a/b", {"": values})
    lines = json.loads(re.search('data-lines="([^"]*)"', html)[1])  # type: ignore[index]
    assert len(lines[0]) <= MAX_POINTS
    assert [31_415.0, 7.5] in [point[:2] for point in lines[0]]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans())
def test_ticks_are_inside_and_few(low: float, span: float, whole: bool) -> None:
    high = low + span
    if high == low:
        return
    found = ticks(low, high, whole)
    slack = span * 1e-6 + 1e-6
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert len(found) <= 7 and (whole or len(found) >= 2)


def test_tool_use_is_counted_per_episode_before_and_after(tmp_path: Path) -> None:
    sft = [episode("sft", tool_counts={"edit": 4}), episode("sft", tool_counts={"view": 1})]
    without = episode("rl")
    del without["tool_counts"]  # then the calls themselves are counted
    page = page_of(run_folder(tmp_path, eval_sft_s3=sft, eval_rl=[without], rl=[episode("rl")] * 5))
    assert "(2 SFT, 1 SFT+RL)" in page.words
    assert "edit 2.00 1.00 -1.00" in re.sub(r"\s+", " ", _spaced(page, tmp_path))


def test_episodes_are_embedded_without_their_token_ids(tmp_path: Path) -> None:
    runs = {"eval_rl": [episode("rl"), episode("rl")], "eval_sft": [episode("sft")]}
    page = page_of(run_folder(tmp_path, **runs))
    index = page.data("index")
    assert [(e["policy"], e["source"], e["nth"], e["outcome"]) for e in index] == [
        ("rl", "eval-rl", 0, "pass"),
        ("rl", "eval-rl", 1, "pass"),
        ("sft", "eval-sft", 0, "pass"),
    ]
    assert page.unpacked("prompts") == ["Repair t-1."]
    body = page.unpacked("chunk-0")[2]
    assert body["turns"][0]["observations"] == ["hello"]
    assert (body["tokens"], body["sampled"]) == (4, 2)
    assert not {"ids", "author", "logprobs"} & body.keys()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = episode("rl", task=HOSTILE, text=HOSTILE, operator=HOSTILE, stop=HOSTILE)
    hostile |= {"prompt": HOSTILE, "tool_counts": {HOSTILE: 1}}
    folder = run_folder(tmp_path / "<b>", eval_rl=[hostile])
    write_jsonl(folder / "metrics.jsonl", [{"phase": HOSTILE, "step": 1, "loss": 1.0}])
    page = page_of(folder)
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "script"),
        *("h1", "h2", "p", "span", "strong", "b", "i", "kbd", "code", "div", "article", "output"),
        *("table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "details", "summary"),
        *("form", "label", "select", "input", "button", "figure", "figcaption"),
        *("svg", "line", "circle", "rect", "text", "polyline"),
    }
    assert not [
        attrs for _, attrs in page.tags if {"src", "href", "onerror", "style"} & attrs.keys()
    ]
    assert page.unpacked("chunk-0")[0]["turns"][0]["text"] == HOSTILE
    assert page.data("index")[0]["task"] == HOSTILE
    assert "<b>" in page.words and HOSTILE.split("\u2028")[0].strip() in page.words


def test_the_policy_admits_the_pages_own_script_and_nothing_else(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path, eval_rl=[episode("rl")]))
    policy = next(
        attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs and attrs["content"]
    )
    own = [page.scripts[""], *page.styles]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert re.findall(r"sha256-([^']+)", policy) == [hashes[1], hashes[0]]
    script = page.scripts[""]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", "".join(own))


def test_numbers_that_json_has_not_do_not_break_the_data(tmp_path: Path) -> None:
    record = episode("rl", reward=math.nan, seconds=math.inf)
    page = page_of(run_folder(tmp_path, eval_rl=[record]))
    text = gzip.decompress(base64.b64decode(page.scripts["chunk-0"])).decode()
    body = json.loads(text, parse_constant=pytest.fail)[0]
    assert body["reward"] is None and body["seconds"] is None


def test_parts_that_have_not_run_say_so(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "Not evaluated yet." in page.words
    assert page.words.count("not run") == 7  # four policies, curves, tools, breakdown
    assert page.data("index") == []
    only_sft = {"success": {"sft": SUMMARY["success"]["sft"]}, "gain": None, "phases": 3}
    write_atomic(tmp_path / "summary.json", json.dumps(only_sft))
    words = page_of(tmp_path).words
    assert "SFT repairs 39.2 % of held-out bugs; RL has not been evaluated." in words


def test_too_many_episodes_keep_every_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_EPISODES", 5)
    training = [episode("rl", task=f"t-{n}") for n in range(30)]
    page = page_of(run_folder(tmp_path, rl=training, eval_rl=[episode("rl"), episode("rl")]))
    index = page.data("index")
    assert [entry["source"] for entry in index] == ["eval-rl"] * 2 + ["rl"] * 3
    assert [entry["task"] for entry in index[2:]] == ["t-0", "t-10", "t-20"]
    assert "5 of 32 episodes" in page.words


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{oops\n', r"metrics\.jsonl:2: not a JSON object"),
        ("trajectories/rl.jsonl", "[]\n", r"rl\.jsonl:1: not a JSON object"),
        ("trajectories/rl.jsonl", '{"task": "a"}\n', r"rl\.jsonl:1: not a trajectory"),
        ("trajectories/rl.jsonl", '{"task": "a", "turns": 3}\n', r"rl\.jsonl:1: not a trajectory"),
        ("summary.json", "{oops", r"summary\.json: not valid JSON"),
        ("summary.json", "[]", r"summary\.json: expected a JSON object"),
    ],
)
def test_a_corrupt_file_is_named_and_the_old_page_stays(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    before = write_report(tmp_path).read_bytes()
    write_atomic(tmp_path / name, text)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_what_the_summary_lacks_is_computed_from_the_episodes(tmp_path: Path) -> None:
    failed = {"verdict": "fail", "flags": []}
    sft = [episode("sft", "t-1", verdict=failed), episode("sft", "t-2")]
    rl = [episode("rl", "t-1"), episode("rl", "t-2")]
    for name, records in (("eval-sft", sft), ("eval-rl", rl)):
        write_jsonl(tmp_path / "trajectories" / f"{name}.jsonl", records)
    words = page_of(tmp_path).words
    assert "SFT+RL repairs 100.0 % of held-out bugs, 50.0 points more than SFT alone" in words
    assert "The interval includes zero." in words


def test_two_runs_are_paired_by_task(tmp_path: Path) -> None:
    failed = {"verdict": "fail", "flags": ["outside:a.py"]}
    tasks = [f"t-{n}" for n in range(40)]
    first = run_folder(
        tmp_path / "a",
        eval_rl=[episode("rl", t, verdict=failed) for t in [*tasks, "alone"]],
    )
    second = run_folder(
        tmp_path / "<b>",
        eval_rl=[
            episode("rl", t, **({"verdict": failed} if n % 4 else {})) for n, t in enumerate(tasks)
        ],
    )
    path, found = write_comparison(first, second)
    row = found["rl"]
    assert (row["first"]["mean"], row["second"]["mean"]) == (0.0, 0.25)
    gap = row["difference"]
    assert gap["mean"] == 0.25 and 0 < gap["low"] < 0.25 < gap["high"] and gap["n"] == 40
    assert row["left_out"] == 1
    page = Page(path.read_text(encoding="utf-8"))
    assert path == first / "compare-<b>.html"
    assert "SFT+RL of <b> repairs 25.0 points more of 40 held-out bugs than that of a" in page.words
    assert [entry["run"] for entry in page.data("index")] == ["a"] * 41 + ["<b>"] * 40
    assert page.data("index")[0]["flags"] == ["outside:a.py"]
    with pytest.raises(InputError, match="same run"):
        write_comparison(first, first / ".")


def test_figures_are_whole_files_whatever_names_a_run_has(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, eval_rl=[episode("rl", tool_counts={HOSTILE: 1})])
    written = [path for path in write_figures(figures_of(folder), tmp_path / "figures")]
    drawn = {
        path.name: path.read_text(encoding="utf-8") for path in written if path.suffix == ".svg"
    }
    assert {"held-out-success.svg", "sft-loss.svg", "rl-reward.svg"} <= drawn.keys()
    for text in drawn.values():
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
        assert tags <= {"svg", "style", "rect", "text", "line", "circle", "polyline", "g"}
    success = ElementTree.fromstring(drawn["held-out-success.svg"])
    assert len(success.findall("{*}circle")) == 4


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder at"):
        write_report(tmp_path / "nowhere")


def _spaced(page: Page, folder: Path) -> str:
    """The page's text with a space between neighbouring cells."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    return Page(html.replace("<td", " <td").replace("<th", " <th")).words


def test_both_verdicts_make_a_table(tmp_path: Path) -> None:
    """From the episodes, by policy; where only one judged there is none."""
    folder = run_folder(tmp_path / "one", eval_rl=[episode("rl")])
    assert "both environments" not in page_of(folder).words
    full = [
        episode("rl", f"t-{n}", environment="full", other_verdict={"verdict": verdict})
        for n, verdict in enumerate(["pass", "pass", "fail"])
    ]
    page = page_of(run_folder(tmp_path / "two", eval_rl=full))
    assert "Verdicts of both environments on the same diffs" in page.words
    # both pass, simplified only, full only, neither, n, agree, kappa
    assert "SFT+RL 2 0 1 0 3 66.7 % –" in _spaced(page, tmp_path / "two")
    assert page.unpacked("chunk-0")[0]["other_verdict"] == {"verdict": "pass"}
