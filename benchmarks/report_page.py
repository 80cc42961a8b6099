"""How long the report's page takes to open in a browser, and until its first figures are drawn; and how large it is.

    python benchmarks/report_page.py [--quick]

The largest comparison that the page is made for: 20 runs of 50 clients and 100 rounds; and one of those runs. Made-up
runs, the tests' own. Target: open in under 2 s, under 6 MB. Needs a Chromium and `pip install playwright`.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine
from playwright.sync_api import Browser, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fedtri.report import page, reading
from report import browsers, synthetic

METHODS = ("local", "fedit", "flora_na", "ce_lora")


def pages(folder: Path, seeds: int, clients: int, rounds: int) -> dict[str, Path]:
    """A page of many runs and one of a single run."""
    runs = [
        reading.load(synthetic.write(folder / f"{method}-{seed}", method, seed=seed, clients=clients, rounds=rounds))
        for method in METHODS
        for seed in range(seeds)
    ]
    return {
        f"{len(runs)} runs": page.write(runs, folder / "many.html"),
        "one run": page.write(runs[-1:], folder / "one.html"),
    }


def opening(browser: Browser, path: Path) -> tuple[float, float]:
    """Seconds to the page's load event, and to its first figure."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    try:
        view = context.new_page()
        began = time.perf_counter()
        view.goto(path.as_uri(), wait_until="load")
        loaded = time.perf_counter() - began
        view.wait_for_selector("figure[data-drawn]")
        return loaded, time.perf_counter() - began
    finally:
        context.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 runs of 8 clients and 10 rounds")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if (program := browsers.program()) is None:
        raise SystemExit(browsers.ABSENT)
    size = {"seeds": 1, "clients": 8, "rounds": 10} if options.quick else {"seeds": 5, "clients": 50, "rounds": 100}
    print(f"{machine.describe()}; {machine.versions('plotly')}\n")
    print(f"{size['clients']} clients, {size['rounds']} rounds, median of {options.repeats}\n")
    print("| page | MB | opens, s | first figure, s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=program, args=sandbox)
        for name, path in pages(Path(folder), **size).items():
            times = [opening(browser, path) for _ in range(options.repeats)]
            opens, draws = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {name} | {path.stat().st_size / 1e6:.2f} | {opens:.2f} | {draws:.2f} |")
        browser.close()


if __name__ == "__main__":
    main()
