"""The page in a real headless Chromium: network cut, nothing in the console, every figure drawn, keys reach everything.

Set FEDTRI_SHOTS=FOLDER to keep the screenshots at phone and desktop width, light and dark, and look at them.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedtri.report import page, reading
from report import browsers, synthetic

if TYPE_CHECKING:
    from playwright.sync_api import Browser

AT_LOAD = """addEventListener("load", () => {
  window.before = { library: "Plotly" in window, text: document.querySelector("main").innerText.length };
}, { capture: true });"""
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if (program := browsers.program()) is None:
        pytest.skip(browsers.ABSENT)
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """One run with every figure a run can have, and a comparison over seeds."""
    folder = tmp_path_factory.mktemp("pages")
    methods = ("local", "fedit", "flora_na", "ce_lora")
    mixed = synthetic.write(folder / "mixed", "ce_lora")
    lines = (synthetic.write(folder / "rho", "flora_na") / "rounds.jsonl").read_text().splitlines()
    own = (mixed / "rounds.jsonl").read_text().splitlines()
    joined = [row[:-1] + ', "rho"' + other.partition('"rho"')[2] for row, other in zip(own, lines, strict=True)]
    (mixed / "rounds.jsonl").write_text("\n".join(joined) + "\n")
    few = [reading.load(synthetic.write(folder / f"{m}-{s}", m, seed=s)) for m in methods for s in range(3)]
    return {
        "run": page.write([reading.load(mixed)], folder / "run.html"),
        "comparison": page.write(few, folder / "comparison.html"),
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, Path]:
    """The most the page is made for, 20 runs of 50 clients and 100 rounds, and one of them."""
    folder = tmp_path_factory.mktemp("large")
    runs = [
        reading.load(synthetic.write(folder / f"{method}-{seed}", method, seed=seed, clients=50, rounds=100))
        for method in ("local", "fedit", "flora_na", "ce_lora")
        for seed in range(5)
    ]
    return {
        "large": page.write(runs, folder / "large.html"),
        "large-run": page.write(runs[-1:], folder / "large-run.html"),
    }


class Opened:
    """A page in a context of its own, with what the console and the network saw."""

    def __init__(self, browser, path: Path, width: str = "desktop", scheme: str = "light") -> None:
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        self.context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.said.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda r: self.asked.append(r.url) if r.url.startswith("http") else None)
        self.page.add_init_script(AT_LOAD)
        self.page.goto(path.as_uri(), wait_until="load")
        self.before = self.page.evaluate("window.before")

    def draw_all(self) -> int:
        """Scroll through the page until every figure is drawn; how many there are."""
        for figure in self.page.query_selector_all("figure"):
            figure.scroll_into_view_if_needed()
            self.page.wait_for_function("f => f.dataset.drawn", arg=figure, timeout=20_000)
        return len(self.page.query_selector_all("figure"))


@pytest.fixture
def opened(browser, pages) -> Iterator:
    """Open a page by name; what it said is checked at the end."""
    made: list[Opened] = []

    def open_(name: str, *more: str) -> Opened:
        made.append(Opened(browser, pages[name], *more))
        return made[-1]

    yield open_
    for one in made:
        one.context.close()
        assert one.said == []
        assert one.asked == []


@pytest.mark.parametrize(
    ("name", "count", "width", "scheme"),
    [
        ("run", 11, "phone", "light"), ("run", 11, "desktop", "dark"),
        ("comparison", 6, "phone", "dark"), ("comparison", 6, "desktop", "light"),
    ],
)  # fmt: skip
def test_every_figure_draws(opened, name, count, width, scheme):
    one = opened(name, width, scheme)
    assert one.draw_all() == count
    for figure in one.page.query_selector_all("figure"):
        marks = figure.query_selector_all(".plot path.js-line, .plot .point, .plot .hm image, .plot .points path")
        assert marks, figure.get_attribute("id")
    assert one.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    if shots := os.environ.get("FEDTRI_SHOTS"):
        one.page.evaluate("scrollTo(0, 0)")
        one.page.screenshot(path=Path(shots) / f"{name}-{width}-{scheme}.png", full_page=True)


def test_text_and_lines_change_with_the_scheme(opened):
    one = opened("run")
    one.draw_all()
    colour = "getComputedStyle(document.querySelector('#accuracy .xtick text')).fill"
    light = one.page.evaluate(colour)
    one.page.emulate_media(color_scheme="dark")
    one.page.wait_for_function(f"() => {colour} !== '{light}'")
    assert one.page.query_selector("#accuracy path.js-line[style*='86, 180, 233']"), (
        "lines have the dark page's colours"
    )


def test_hover_tells_the_numbers(opened):
    one = opened("run")
    one.page.wait_for_function("() => document.querySelector('#accuracy').dataset.drawn")
    box = one.page.query_selector("#accuracy .plot .nsewdrag")
    box.hover()
    one.page.wait_for_selector("#accuracy .hoverlayer text")
    assert "mean" in one.page.text_content("#accuracy .hoverlayer")


def test_legend_hides_and_shows(opened):
    one = opened("run")
    one.draw_all()
    button = one.page.get_by_role("button", name="mean", exact=True)
    lines = "document.querySelectorAll('#accuracy .scatterlayer .trace').length"
    before = one.page.evaluate(lines)
    button.focus()
    one.page.keyboard.press("Enter")
    one.page.wait_for_function(f"() => {lines} === {before} - 1")
    assert button.get_attribute("aria-pressed") == "false"
    one.page.emulate_media(color_scheme="dark")
    one.page.wait_for_timeout(300)
    assert one.page.evaluate(lines) == before - 1, "stays hidden when the colours change"
    one.page.keyboard.press("Enter")
    one.page.wait_for_function(f"() => {lines} === {before}")


def test_each_client_on_demand(opened):
    one = opened("run")
    one.draw_all()
    lines = "document.querySelectorAll('#accuracy .scatterlayer .trace').length"
    before = one.page.evaluate(lines)
    one.page.select_option("#accuracy select", label="client-03")
    one.page.wait_for_function(f"() => {lines} === {before} + 1")
    one.page.select_option("#accuracy select", label="all")
    one.page.wait_for_function(f"() => {lines} === {before} + 8")


def test_the_slider_shows_another_round(opened):
    one = opened("run")
    one.draw_all()
    one.page.click("#model-matrix summary")
    one.page.wait_for_selector("#model-matrix table")  # filled when the summary's toggle event has run
    cell = "document.querySelector('#model-matrix table').rows[1].cells[3].textContent"
    last = one.page.evaluate(cell)
    one.page.focus("#model-matrix input[type=range]")
    one.page.keyboard.press("Home")
    one.page.wait_for_function(f"() => {cell} !== '{last}'")
    assert one.page.text_content("#model-matrix output") == "round 1"


def test_keys_reach_everything(opened):
    one = opened("run")
    one.draw_all()
    one.page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    wanted = one.page.evaluate("""() => {
      const all = [...document.querySelectorAll('a[href], button, select, input, summary, [tabindex="0"]')];
      const shown = all.filter((e) => e.checkVisibility());
      shown.forEach((e, i) => e.dataset.place = i);
      return shown.length; }""")
    reached = set()
    for _ in range(wanted + 5):
        one.page.keyboard.press("Tab")
        reached.add(one.page.evaluate("document.activeElement.dataset.place"))
    assert {str(i) for i in range(wanted)} <= reached


def test_every_figure_has_words_and_a_table(opened):
    one = opened("comparison")
    one.draw_all()
    for figure in one.page.query_selector_all("figure"):
        assert len(figure.query_selector("[role=img]").get_attribute("aria-label")) > 10
        figure.query_selector("summary").click()
        cells = figure.wait_for_selector("table").query_selector_all("tbody td")
        assert cells, figure.get_attribute("id")
        assert any(cell.text_content() not in ("–", "") for cell in cells)


def test_large_pages_stay_small(large):
    assert all(path.stat().st_size < 6e6 for path in large.values())


@pytest.mark.parametrize("name", ["large", "large-run"])
def test_a_large_page_can_be_read_before_its_figures_are_drawn(opened, pages, large, name):
    """What opens it in under 2 s (benchmarks/report_page.py): nothing long runs first, and what is not seen waits."""
    pages |= large
    one = opened(name)
    run_first = "[...document.scripts].filter((s) => !s.type && s.id !== 'plotly').map((s) => s.text.length)"
    assert one.page.evaluate(run_first) == [len((Path(page.__file__).parent / "page.js").read_text())]
    assert one.before["library"] is False
    assert one.before["text"] > 500
    one.page.wait_for_selector("figure[data-drawn]")
    every = len(one.page.query_selector_all("figure"))
    assert len(one.page.query_selector_all("figure[data-drawn]")) < every
    assert one.draw_all() == every
