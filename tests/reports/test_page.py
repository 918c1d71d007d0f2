"""Reports of real tiny runs, opened and used in Chromium without a network."""

import json
import shutil
from pathlib import Path

import pytest
from chromium import opened, start
from conftest import make_reviews
from launching import run_here
from playwright.sync_api import sync_playwright

from pipeline import report, train
from pipeline.frontiers import load_frontier
from pipeline.plane import curve_of

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>&amp;"
LINK = '<a href="https://evil.example/x">calm</a> &lt;'  # a component's name, which Plotly would make a link of
STEPS, PROMPTS = 3, 30
# Title of each chart over steps and its lines, a point a step.
OVER_STEPS = {
    "Reward": 2, "KL from the original": 2, "KL coefficient β": 1, "Entropy": 1, "Response length": 3,
    "Clip fractions": 2, "Value explained variance": 1, "Size of the updates": 1,
    "Reward components, raw": 2, "Reward components, weighted": 2,
}  # fmt: skip
DRAWN = """card => {
  const plot = card.querySelector(".plot");
  return { points: plot.data.map((trace) => trace.x.length), shapes: plot.querySelectorAll(".trace path").length,
           names: plot.data.map((trace) => trace.name), y: plot.data.map((trace) => trace.y) };
}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_recipe):
    """Two seeds of the tiny recipe, finished."""
    place = tmp_path_factory.mktemp("reported")
    reviews = place / "reviews.txt"
    reviews.write_text("\n".join(make_reviews(400).texts))
    for seed in (0, 1):
        settings = ["--dataset", reviews, "--evaluation_prompts", PROMPTS, "--seed", seed]
        assert run_here(train.main, "--config", tiny_recipe, "--output_dir", place / f"seed_{seed}", *settings) == 0
    return [place / "seed_0", place / "seed_1"]


@pytest.fixture(scope="module")
def told_all(runs, tmp_path_factory):
    """A run's report with all a report can have: a composed reward, a frontier, and text that would break a page."""
    run = tmp_path_factory.mktemp("all") / "run <b>&lt;"
    shutil.copytree(runs[0], run)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        for name in ("fluency", LINK):
            step |= {f"reward/{name}/raw_mean": -2.0 + step["step"], f"reward/{name}/weighted_mean": 0.3 * step["step"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    samples = samples_of(run)
    samples[2] |= {"prompt": HOSTILE, "after": HOSTILE, "before": "\u2028 \x00 ]]> <!-- {{ 7 * 7 }}"}
    (run / "evaluation_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    figures = json.loads((run / "evaluation.json").read_text())
    figures["frontier"] = {
        "reward": 0.8, "kl": 2.5, "kl_needed": 1.0, "kl_needed_ci95": [0.9, 1.1], "kl_overspend": 2.5,
        "kl_overspend_ci95": [2.2, 2.8],
    }  # fmt: skip
    figures["frontier_curve"] = curve_of(load_frontier(ROOT / "assets/frontiers/quickstart.json"))
    (run / "evaluation.json").write_text(json.dumps(figures))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + f"an_older_setting: {json.dumps(HOSTILE)}\n")
    assert run_here(report.main, run) == 0
    return run


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = start(playwright)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser, told_all):
    with opened(browser, told_all / "report.html") as (page, told):
        yield page
        assert told == []


@pytest.fixture
def table(page):
    """The page with the table of samples as it is at first, but with all rows."""
    page.evaluate("document.querySelector('#filters').reset()")
    page.select_option("#size", label="all")
    page.locator("#sample-table th button", has_text="prompt").click()
    page.locator("#sample-table th button", has_text="#").click()
    return page


def cards(page) -> dict[str, dict]:
    """What is drawn under each title."""
    found = page.query_selector_all("figure:has(.plot)")
    return {card.query_selector("h3").inner_text(): card.evaluate(DRAWN) for card in found}


def samples_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluation_samples.jsonl").read_text().splitlines()]


def column(page, number: int) -> list[str]:
    return page.locator(f"#sample-table tbody td:nth-child({number})").all_inner_texts()


def test_every_training_ends_with_a_report_that_opens_offline_in_silence_and_is_small(runs, browser):
    file = runs[0] / "report.html"
    assert 1_000_000 < file.stat().st_size < 5_000_000
    with opened(browser, file) as (page, told):
        assert "seed_0" in page.title() and page.locator(".badge").inner_text() == "finished"
        assert page.locator(".missing:visible").count() == 0
        page.wait_for_timeout(200)
        assert told == []


def test_each_chart_over_steps_is_drawn_with_a_point_a_step(page):
    drawn = cards(page)
    for title, lines in OVER_STEPS.items():
        assert drawn[title]["points"] == [STEPS] * lines, title
        assert drawn[title]["shapes"] >= lines, title
    assert drawn["Reward components, raw"]["y"][1] == [-1, 0, 1]


def test_score_histograms_hold_all_samples_and_the_plane_the_frontier_the_way_and_the_overspend(page):
    drawn = cards(page)
    for measure in ("P(POSITIVE)", "logit of POSITIVE", "log odds of POSITIVE"):
        title = f"{measure}, before and after"
        assert drawn[title]["points"] == [PROMPTS, PROMPTS] and drawn[title]["shapes"] > 2
    plane = drawn["Reward against KL"]
    points = dict(zip(plane["names"], plane["points"], strict=True))
    assert points["training, means of steps"] == STEPS and points["best possible"] > 20
    assert points["original, held-out prompts"] == points["tuned, held-out prompts (95 % interval)"] == 1
    assert points["KL spent beyond need"] == 2
    assert "overspend 2.50 ×" in page.locator("#chart-plane .annotation-text").text_content()


def test_headline_time_settings_and_versions_are_told(page):
    tiles = dict(zip(page.locator(".tile .label").all_inner_texts(), page.locator(".tile .value").all_inner_texts()))  # noqa: B905
    assert "→" in tiles["P(POSITIVE)"] and tiles["KL overspend"] == "2.50 ×"
    time = page.locator("#time").inner_text()
    assert "core-hours" in time and "updates" in time and "not recorded" not in time
    settings = page.locator("#settings").inner_text()
    for name in ("learning_rate", "transformers", "git commit", "CPU"):
        assert name in settings
    assert page.locator("dd.changed", has_text="0.001").count() == 1, "a setting that is not the default's"


def test_text_of_models_and_settings_stays_text(page):
    assert page.evaluate("window.broken") is None and page.locator("img").count() == 0
    assert column(page, 2)[2] == column(page, 5)[2] == HOSTILE
    assert "{{ 7 * 7 }}" in column(page, 3)[2]
    assert page.locator("h1").inner_text() == "run <b>&lt;"
    assert HOSTILE in page.locator("#settings").inner_text()
    legend = page.locator("#chart-components_raw .legendtext").all_text_contents()
    assert legend == ["fluency", LINK] and page.locator("svg a").count() == 0


def test_samples_are_sorted_by_a_click_and_the_other_way_by_another(table, told_all):
    kls = sorted((row["after_kl"] for row in samples_of(told_all)), reverse=True)
    table.locator("#sample-table th button", has_text="KL").click()
    assert [float(kl) for kl in column(table, 8)] == pytest.approx(kls, abs=0.006)
    table.locator("#sample-table th button", has_text="KL").click()
    assert [float(kl) for kl in column(table, 8)] == pytest.approx(kls[::-1], abs=0.006)
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    table.locator("#sample-table th button", has_text="#").click()
    assert column(table, 1) == [str(i + 1) for i in range(PROMPTS)]


def test_samples_are_filtered_by_text_by_change_and_by_score_in_any_measure(table, told_all):
    samples = samples_of(told_all)
    table.fill("#search", "WINDOW.broken")
    assert column(table, 1) == ["3"]
    assert table.locator("#place").inner_text() == f"1–1 of 1 (filtered from {PROMPTS})"
    table.fill("#search", "no response says this")
    assert column(table, 1) == [] and table.locator("#place").inner_text().startswith("none")
    table.fill("#search", "")
    table.select_option("#measure", label="logit of POSITIVE")
    before, after = (
        [float(f"{row[f'{side}_measures']['logit']:.6g}") for row in samples] for side in ("before", "after")
    )
    better = [str(i + 1) for i in range(PROMPTS) if after[i] > before[i]]
    table.select_option("#which", "up")
    assert column(table, 1) == better and 0 < len(better) < PROMPTS
    table.select_option("#which", "all")
    low, high = sorted(after)[10], sorted(after)[19]
    table.fill("#low", str(low - 1e-3))
    table.fill("#high", str(high + 1e-3))
    within = [score for score in after if low - 1e-3 <= score <= high + 1e-3]
    assert [float(score) for score in column(table, 6)] == pytest.approx(within, abs=2e-3) and len(within) >= 10


def test_samples_come_in_pages(table):
    table.select_option("#size", label="25")
    assert len(column(table, 1)) == 25 and table.locator("#previous").is_disabled()
    table.click("#next")
    assert column(table, 1) == ["26", "27", "28", "29", "30"] and table.locator("#next").is_disabled()
    table.click("#previous")
    assert column(table, 1)[0] == "1"


def test_it_follows_light_and_dark_and_fits_a_phone(browser, told_all):
    file = told_all / "report.html"
    with opened(browser, file, color_scheme="dark", viewport={"width": 390, "height": 800}) as (page, told):
        ground = "document.querySelector('.plot')._fullLayout.paper_bgcolor"
        assert page.evaluate(ground) == "#1b2027"
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("Math.max(...[...document.querySelectorAll('.plot svg')].map(s => s.clientWidth))") < 390
        page.emulate_media(color_scheme="light")
        page.wait_for_timeout(1000)
        assert page.evaluate(ground) == "#ffffff"
        assert told == []


def test_seeds_are_compared_with_their_mean_and_spread(runs, browser, tmp_path):
    file = tmp_path / "new" / "comparison.html"
    assert run_here(report.main, *runs, "--to", file) == 0
    with opened(browser, file) as (page, told):
        drawn = cards(page)
        reward = dict(zip(drawn["Reward"]["names"], drawn["Reward"]["y"], strict=True))
        means = [(a + b) / 2 for a, b in zip(reward["seed_0"], reward["seed_1"], strict=True)]
        assert reward["all runs (2 seeds)"] == pytest.approx(means, abs=1e-5)
        assert all(drawn[title]["shapes"] for title in list(OVER_STEPS)[:8])
        assert drawn["P(POSITIVE), before and after"]["points"] == [PROMPTS, 2 * PROMPTS]
        assert drawn["Result of each run"]["points"] == [2, 2]
        assert "±" in page.locator("tr.spread").inner_text()
        assert told == []
    assert file.stat().st_size < 5_000_000
