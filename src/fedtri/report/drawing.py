"""What all figures share: their frame, axes whose range does not exaggerate, thinned series, and rounded numbers."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from fedtri.report.colours import BLUE, GREEN, LIGHT, OCHRE, ORANGE, PURPLE, faint
from fedtri.report.names import NARROWEST_SPAN, share
from fedtri.report.reading import Run

MOST_POINTS = 200
"""Rounds that a line shows at most."""
MOST_CLIENT_POINTS = 30_000
"""Points of all clients' lines together."""
EACH = "each client"
STAGE_COLOURS = {"basis": PURPLE, "sketch": OCHRE, "train": BLUE, "aggregate": ORANGE, "evaluate": GREEN}


def titled(title: str, read: str, alt: str, *, x: str = "", y: str = "", height: int = 380) -> go.Figure:
    """An empty figure with its title, how to read it, and what it shows in words."""
    figure = go.Figure()
    figure.update_layout(
        template="none", title={"text": title}, meta={"alt": alt, "read": read}, height=height, hovermode="x unified",
        margin={"l": 56, "r": 16, "t": 48, "b": 48}, font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}, colorway=LIGHT,
    )  # fmt: skip
    figure.update_xaxes(title={"text": x}, automargin=True, showgrid=True, zeroline=False, gridcolor="#E3E7EB")
    figure.update_yaxes(title={"text": y}, automargin=True, showgrid=True, zeroline=False, gridcolor="#E3E7EB")
    return figure


def accuracy_axis(figure: go.Figure, axis: str = "y") -> go.Figure:
    """The figure, with its axis of accuracies never narrower than NARROWEST_SPAN, so that noise does not look large.

    The range holds every value with its error bar, also of series that are hidden until asked for.

    Args:
        axis: "x" or "y": where the accuracies are.
    """
    ends: list[float] = []
    for trace in figure.to_dict()["data"]:
        spread = (trace.get(f"error_{axis}") or {}).get("array") or [0.0] * len(trace[axis])
        pairs = [(v, e or 0.0) for v, e in zip(trace[axis], spread, strict=True) if v is not None and math.isfinite(v)]
        ends += [bound for value, error in pairs for bound in (value - error, value + error)]
    if not ends:
        return figure
    low, high = min(ends), max(ends)
    middle, half = (low + high) / 2, max(high - low, NARROWEST_SPAN) / 2
    low, high = middle - half, middle + half
    margin = 0.04 * (high - low)
    figure.update_layout({f"{axis}axis": {"range": [low - margin, high + margin]}})
    return figure


def whole_rounds(figure: go.Figure, rounds: Sequence[int]) -> None:
    """Ticks at whole rounds where there are few."""
    if len(rounds) <= 12:
        figure.update_xaxes(tickvals=list(rounds))


def thinned(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows, evenly spaced, first and last among them."""
    return table.loc[spaced(list(table.index), most)]


def known(table: pd.DataFrame | pd.Series) -> bool:
    """Whether a table holds any finite number."""
    return bool(np.isfinite(table.to_numpy(dtype=float)).any())


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def band(figure: go.Figure, rounds: pd.DataFrame, metric: str, name: str) -> None:
    """Add the area from a metric's worst client to its best."""
    both = rounds[[f"{metric}_worst", f"{metric}_best"]].dropna()
    if both.empty:
        return
    low, high = both.min(axis=1), both.max(axis=1)
    group = {"legendgroup": name, "line": stroke(BLUE, width=0.5), "mode": "lines", "hoverinfo": "skip"}
    figure.add_scatter(x=both.index, y=rounded(high), name=name, showlegend=False, **group)
    figure.add_scatter(x=both.index, y=rounded(low), name=name, fill="tonexty", fillcolor=faint(BLUE), **group)


def each_client(figure: go.Figure, table: pd.DataFrame) -> None:
    """A line for each client, hidden until asked for."""
    table = thinned(table, max(20, MOST_CLIENT_POINTS // max(1, table.shape[1])))
    for place, client in enumerate(table.columns):
        figure.add_scatter(
            x=table.index, y=rounded(table[client]), name=client, meta="client", legendgroup=EACH, visible="legendonly",
            legendgrouptitle={"text": EACH} if place == 0 else None, line=stroke(LIGHT[place % 8], width=1.2),
            connectgaps=True,
        )  # fmt: skip


def settled(figure: go.Figure, hover: str | None = None) -> go.Figure:
    """The figure with a marker at each point of short lines, and with plotly's mode of hovering where one is given."""
    if hover:
        figure.update_layout(hovermode=hover)
    for place, trace in enumerate(figure.to_dict()["data"]):
        if trace["type"] == "scatter" and "mode" not in trace:
            figure.update_traces(mode="lines+markers" if len(trace["x"]) <= 30 else "lines", selector=place)
    return figure


def trend(run: Run, column: str, name: str) -> str:
    """Where a column of the run's rounds began and ended, in words."""
    values = run.rounds[column].dropna()
    if values.empty:
        return f"No {name} was recorded."
    first, end = values.index[0], values.index[-1]
    last = run.rounds.loc[end]
    begun, ended = float(values.iloc[0]), float(values.iloc[-1])
    text = f"Mean {name} goes from {share(begun)} in round {first} to {share(ended)} in round {end}"
    if f"{column}_worst" in last and math.isfinite(last[f"{column}_worst"]):
        text += (
            f", the worst client at {share(last[f'{column}_worst'])} and the best at {share(last[f'{column}_best'])}"
        )
    return f"{run.paper}: {text}."


def stroke(colour: str, dash: str = "solid", width: float = 2.0) -> dict[str, Any]:
    """A line's style, as plotly takes it; `width` in pixels."""
    return {"color": colour, "dash": dash, "width": width}


def rounded(values: Iterable[float]) -> list[float | None]:
    """Numbers to four places, None for what is not finite."""
    return [rounded_one(value, 4) for value in values]


def rounded_one(value: float | None, places: int = 3) -> float | None:
    """A number to so many places, None for what is not finite."""
    return None if value is None or not math.isfinite(value) else round(float(value), places)


def cells(matrix: np.ndarray) -> list[list[float | None]]:
    """A matrix as rows of rounded numbers."""
    return [[rounded_one(x) for x in row] for row in matrix]


def tall(rows: int) -> int:
    """The height of a figure with so many rows, in pixels."""
    return min(1200, 140 + 20 * max(rows, 6))
