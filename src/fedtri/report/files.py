"""Figures as SVG or PNG files for papers, drawn by a headless Chromium: the binary alone, no Python package."""

import base64
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fedtri.errors import FedtriError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
KINDS = ("svg", "png")
WIDTH = 760

PAGE = """<!doctype html><meta charset="utf-8"><pre id="out"></pre><script>{plotly}</script><script>
(async () => {{
  for (const [name, figure] of Object.entries({figures})) {{
    const {{ width = {width}, height }} = figure.layout;
    const size = {{ format: "{kind}", width, height, scale: {scale} }};
    const line = document.createElement("div");
    line.textContent = name + "=" + await Plotly.toImage(figure, size);
    document.getElementById("out").append(line);
  }}
  document.title = "done";
}})();
</script>"""


def browser() -> str:
    """The Chromium there is. Raises FedtriError saying what to install."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise FedtriError("--figures: draws with a headless Chromium, which is not there; `apt-get install chromium`")
    return found


def write(figures: Mapping[str, go.Figure], folder: Path, kind: str = "svg", timeout: float = 120) -> list[Path]:
    """One file a figure, NAME.svg or NAME.png, on white. Raises FedtriError where no browser can draw them."""
    if kind not in KINDS:
        raise FedtriError(f"--format: expected one of {', '.join(KINDS)}, got {kind!r}")
    program = browser()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = ", ".join(f'"{name}": {_paper(figure).to_json(validate=False)}' for name, figure in figures.items())
    text = PAGE.format(
        plotly=get_plotlyjs(), figures="{" + drawn.replace("</", "<\\/") + "}", kind=kind, width=WIDTH,
        scale=1 if kind == "svg" else 2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fedtri-") as place:
        (page := Path(place) / "figures.html").write_text(text)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        command = [program, "--headless", *sandbox, "--disable-gpu", f"--user-data-dir={place}/profile"]
        command += ["--virtual-time-budget=60000", "--dump-dom", page.as_uri()]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False).stdout
        except subprocess.TimeoutExpired:
            raise FedtriError(f"--figures: {program} did not draw the figures within {timeout:.0f} s") from None
    found = re.findall(r"<div>([\w-]+)=data:image/\w+(?:\+xml)?(;base64)?,(.*?)</div>", shown, re.DOTALL)
    if {name for name, _, _ in found} != set(figures):
        raise FedtriError(f"--figures: {program} drew {len(found)} of {len(figures)} figures; try again")
    paths = []
    for name, encoded, data in found:
        path = folder / f"{name}.{kind}"
        path.write_bytes(base64.b64decode(data) if encoded else unquote(data).replace("&amp;", "&").encode())
        paths.append(path)
    return paths


def _paper(figure: go.Figure) -> go.Figure:
    """The figure on white, with its legend, without what only a page uses."""
    drawn = figure.to_dict()
    drawn["data"] = [trace for trace in drawn["data"] if trace.get("visible") != "legendonly"]
    drawn["layout"] |= {"paper_bgcolor": "white", "plot_bgcolor": "white", "meta": None}
    if drawn["layout"].get("yaxis", {}).get("scaleanchor"):
        drawn["layout"]["width"] = drawn["layout"]["height"] + 80
    return go.Figure(drawn)
