"""The report's page in headless Chromium: filters, links, keys, side by side, speed.

Needs playwright (the extra `browser`) and a Chromium: that of the system, or REMEND_CHROMIUM.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.files import write_jsonl
from rl.report import write_comparison, write_report
from rl.report_study import write_study
from tests import studies

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = (
    os.environ.get("REMEND_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
)
pytestmark = [pytest.mark.service, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

HOSTILE = "</script><img src=x onerror=document.title='owned'><!--"


def records(
    policy: str, tasks: int, tries: int, seed: int, share: float
) -> Iterator[dict[str, Any]]:
    """Episodes of the size of real ones: three turns, about 6 KB of text."""
    rng = random.Random(seed)
    for n in range(tasks):
        for _ in range(tries):
            verdict = "pass" if rng.random() < share else "fail"
            flags = ["protected:tests/test_a.py"] if n % 50 == 7 else []
            tool = "view" if n % 3 else "search"
            text = "".join(f"    value_{rng.randrange(999)} = {k}\n" for k in range(60))
            yield {
                "task": f"package-{n:04d}", "package": f"package{n % 7}", "operator": "boundary",
                "split": "heldout", "policy": policy, "seed": rng.randrange(1 << 30),
                "weight_version": 1, "prompt": f"Repair function number {n}.\n" + text[:400],
                "ids": [1, 2], "author": [0, 1], "logprobs": [0.0, -0.1],
                "turns": [
                    {"text": f"{policy} looks {k} {HOSTILE}",
                     "calls": [{"name": tool if k else "edit", "arguments": {"old": HOSTILE}}],
                     "observations": [text]} for k in range(3)
                ],
                "patch": f"--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+{policy}\n same\n",
                "verdict": {"verdict": "quarantine" if flags else verdict, "flags": flags},
                "reward": float(verdict == "pass"), "stop": "submit", "seconds": 1.0,
            }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found = []
    for name, share in (("one", 0.4), ("two", 0.6)):
        run = tmp_path_factory.mktemp(name) / name
        for n, policy in enumerate(("sft", "rl")):
            path = run / "trajectories" / f"eval-{policy}.jsonl"
            write_jsonl(path, records(policy, 1250, 2, n, share))
        lines = [{"phase": "rl", "step": k, "rl/reward": k / 60} for k in range(60)]
        write_jsonl(run / "metrics.jsonl", lines)
        found.append(run)
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 5,000 episodes and more to browse."""
    return studies.write(tmp_path_factory.mktemp("study") / "study", tasks=120, tries=4)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as start:
        # root has no sandbox in containers; the page is our own file
        browser = start.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda r: said.append(r.url) if not r.url.startswith("file:") else None)
    yield page
    assert said == []  # no error, no request
    assert page.title() != "owned"
    page.close()


def test_first_paint_and_no_lag_at_5000_trajectories(runs: list[Path], page: Any) -> None:
    path = write_report(runs[0])
    page.goto(path.as_uri())
    page.wait_for_selector("#list .row")
    assert page.inner_text("#found").startswith("5,000 shown")
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 1e9"
    )
    ready = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert page.locator("#list .row").count() < 60
    filtering = page.evaluate(
        """() => { const began = performance.now(); const f = document.getElementById('filters');
        f.elements.text.value = 'number 7';
        f.dispatchEvent(new Event('input'));
        document.body.offsetTop;
        return performance.now() - began; }"""
    )
    size = path.stat().st_size / 1e6
    print(
        f"first paint {paint:.0f} ms, ready {ready:.0f} ms, filter {filtering:.0f} ms, {size:.1f}MB"
    )
    assert paint <= 1000


def test_filter_open_and_a_copied_link_opens_the_same(runs: list[Path], page: Any) -> None:
    address = write_report(runs[0]).as_uri()
    page.goto(address)
    page.select_option("[name=flag]", "any flag")
    page.select_option("[name=policy]", "rl")
    page.select_option("[name=tool]", "view")
    page.select_option("[name=outcome]", "quarantine")
    count = page.inner_text("#found")
    assert 0 < int(count.split()[0]) < 100
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#detail .turn")
    page.wait_for_selector("#row-" + page.evaluate("String(chosen)") + "[aria-selected]")
    opened, link = page.inner_text("#detail .facts"), page.url
    assert HOSTILE in page.inner_text("#detail")
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#detail .turn")
    assert page.inner_text("#found") == count
    assert page.inner_text("#detail .facts") == opened
    assert page.url == link


def test_keys_search_read_compare_and_back(runs: list[Path], page: Any) -> None:
    page.goto(write_report(runs[0]).as_uri())
    page.keyboard.press("/")
    page.keyboard.type("package-0123")
    assert page.inner_text("#found").startswith("4 shown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail .turn")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("d")
    page.wait_for_selector("#viewer.two .lines")
    heads = page.locator("#detail .panes").first.inner_text()
    assert heads.index("SFT (eval-sft") < heads.index("SFT+RL (eval-rl")
    assert page.locator("#detail .only.added", has_text="+rl").count() == 1
    assert page.locator("#detail .only.removed", has_text="+sft").count() == 1
    link = page.url
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer:not(.two) .turn")
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#viewer.two .lines")


def test_the_list_scrolls_to_its_end(runs: list[Path], page: Any) -> None:
    page.goto(write_report(runs[0]).as_uri())
    page.focus("#list")
    page.keyboard.press("End")
    page.wait_for_selector("[aria-posinset='5000'][aria-selected]")
    page.keyboard.press("Home")
    page.wait_for_selector("[aria-posinset='1'][aria-selected]")


def test_two_runs_on_one_page(runs: list[Path], page: Any) -> None:
    path, found = write_comparison(*runs)
    page.goto(path.as_uri())
    assert "points more" in page.inner_text("h1")
    assert found["rl"]["difference"]["mean"] > 0
    page.select_option("[name=run]", "two")
    page.keyboard.press("j")
    page.wait_for_selector("#detail .turn")
    page.keyboard.press("d")
    page.wait_for_selector("#viewer.two .lines")
    heads = page.locator("#detail .panes").first.inner_text()
    assert "one · SFT+RL" in heads and "two · SFT+RL" in heads


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_is_wider_than_the_window(
    runs: list[Path], page: Any, scheme: str, width: int
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(write_report(runs[0]).as_uri())
    page.keyboard.press("j")
    page.wait_for_selector("#detail .turn")
    folder = os.environ.get("REMEND_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/report-{scheme}-{width}.png", full_page=True)
        page.keyboard.press("d")
        page.wait_for_selector("#viewer.two .lines")
        page.locator("#episodes").screenshot(path=f"{folder}/beside-{scheme}-{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_study_page_shows_claims_first_and_browses_its_cells(study: Path, page: Any) -> None:
    page.goto(write_study(study).as_uri())
    page.wait_for_selector("#list .row")
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 1e9"
    )
    print(f"first paint {paint:.0f} ms, {page.inner_text('#found')}")
    assert paint <= 1000
    assert "of the paper's six claims" in page.inner_text("h1").lower()
    assert page.locator("section h2").first.inner_text() == "The paper's claims"
    assert page.locator(".claims tbody tr").count() == 6
    assert page.locator(".claims .verdict").count() == 6
    assert page.locator(".chart .band").count() == 8  # four measures, guard off and on
    page.select_option("[name=run]", "simplified → simplified")
    page.select_option("[name=policy]", "sft")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.wait_for_selector("#detail .turn")
    page.keyboard.press("d")
    page.wait_for_selector("#viewer.two .lines")
    heads = page.locator("#detail .panes").first.inner_text()
    assert "simplified → simplified · SFT" in heads and "SFT+RL" in heads


def test_exploits_of_a_study_can_be_looked_at(study: Path, page: Any) -> None:
    address = write_study(study).as_uri()
    page.goto(address)
    page.select_option("[name=run]", "guard off")
    page.select_option("[name=flag]", "guard:validation-deleted:x.py")
    assert int(page.inner_text("#found").split()[0]) > 0
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.wait_for_selector("#detail .turn")
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#detail .turn")
    assert "validation-deleted" in page.inner_text("#detail")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_no_part_of_a_study_is_wider_than_the_window(
    study: Path, page: Any, scheme: str, width: int
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(write_study(study).as_uri())
    page.wait_for_selector("#list .row")
    folder = os.environ.get("REMEND_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/study-{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
