"""The largest comparison the page is made for, written once."""

from pathlib import Path

import pytest

from fedtri.report import page, reading
from report import synthetic


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> dict[str, Path]:
    """The pages of 20 runs of 50 clients and 100 rounds, and of one of them."""
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
