"""Figures as SVG or PNG files for papers, by plotly's own writer, which draws them in a headless Chromium."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import plotly.graph_objects as go
from plotly.io import write_images

from fedtri.errors import FedtriError

KINDS = {"svg": 1, "png": 2}
"""The pixels of a file for each pixel of the page, by kind."""
WIDTH = 760
BESIDE = 80
"""Pixels that a square figure needs for its colour bar."""


def write(figures: Mapping[str, go.Figure], folder: Path, kind: str = "svg") -> list[Path]:
    """One file a figure, NAME.svg or NAME.png, on white; the folder is made where it is absent.

    Raises:
        FedtriError: The kind is neither svg nor png, the extra [figures] is not installed, or there is no Chromium.
    """
    if kind not in KINDS:
        raise FedtriError(f"--format: expected one of {', '.join(KINDS)}, got {kind!r}")
    if find_spec("kaleido") is None:
        raise FedtriError("--figures: plotly's writer is not installed; run: pip install 'fedtri[figures]'")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for name in figures]
    drawn = [_on_white(figure) for figure in figures.values()]
    try:
        write_images(
            drawn, [str(path) for path in paths], scale=KINDS[kind],
            width=[figure.layout.width for figure in drawn],  # pyright: ignore[reportAttributeAccessIssue]
            height=[figure.layout.height for figure in drawn],  # pyright: ignore[reportAttributeAccessIssue]
        )  # fmt: skip
    except RuntimeError as error:
        if "Chrome" not in str(error):
            raise
        raise FedtriError("--figures: found no Chrome or Chromium; run: apt-get install chromium") from None
    return paths


def _on_white(figure: go.Figure) -> go.Figure:
    """The figure with its size and a white ground, without series that only a page can show."""
    drawn = figure.to_dict()
    drawn["data"] = [trace for trace in drawn["data"] if trace.get("visible") != "legendonly"]
    square = bool(drawn["layout"].get("yaxis", {}).get("scaleanchor"))
    width = drawn["layout"]["height"] + BESIDE if square else WIDTH
    drawn["layout"] |= {"width": width, "paper_bgcolor": "white", "plot_bgcolor": "white", "meta": None}
    return go.Figure(drawn)
