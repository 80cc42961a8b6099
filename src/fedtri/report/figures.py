"""One run's figures: functions from a run to a plotly figure, for the page, for papers and for notebooks.

`layout.meta` of each holds "alt", what the figure shows in words, and "read", how to read it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from fedtri.report.colours import BLUE, GREEN, GREY, LIGHT, OCHRE, ORANGE, PAGE_LIGHT, faint
from fedtri.report.names import amount, share
from fedtri.report.reading import Run

MOST_POINTS = 200
MOST_CLIENT_POINTS = 30_000
MOST_CELLS = 120_000
MATRICES = {"data": "data similarity", "model": "model similarity", "weights": "mixing weights"}
EACH = "each client"


def accuracy(run: Run) -> go.Figure:
    """Test accuracy by round: mean over clients with worst to best as an area; each client on demand."""
    rounds = thinned(run.rounds, MOST_POINTS)
    figure = titled(
        "Accuracy by round",
        "The thick line is the mean over clients of the accuracy on their own test examples after aggregation, the "
        "area goes from the worst client to the best. Dashed: the same after local training, before the "
        "server's answer came.",
        _trend(run, "accuracy", "accuracy"),
        x="round", y="accuracy",
    )  # fmt: skip
    _band(figure, rounds, "accuracy", "worst to best")
    figure.add_scatter(x=rounds.index, y=_round(rounds["accuracy"]), name="mean", line=_line(BLUE, width=3.0))
    if _any(rounds["accuracy_local"]):
        figure.add_scatter(
            x=rounds.index, y=_round(rounds["accuracy_local"]), name="mean after local training",
            line=_line(ORANGE, "dash"),
        )  # fmt: skip
    guesses = [about["guess"] for about in run.client_table.values() if about.get("guess") is not None]
    if guesses and len(rounds):
        ends = [rounds.index[0], rounds.index[-1]]
        figure.add_scatter(
            x=ends, y=[round(float(np.mean(guesses)), 4)] * 2, mode="lines",
            name="guessing each client's largest class", line=_line(GREY, "dot"),
        )  # fmt: skip
    _each_client(figure, run.by_client("accuracy"))
    whole_rounds(figure, list(run.rounds.index))
    return _settled(figure)


def loss(run: Run) -> go.Figure:
    """Training loss, and test loss after local training and after aggregation, by round."""
    rounds = thinned(run.rounds, MOST_POINTS)
    figure = titled(
        "Loss by round",
        "The training loss is the mean over clients and steps of the round. The area goes from the client with the "
        "highest test loss to the one with the lowest.",
        _trend(run, "loss", "training loss"),
        x="round", y="loss",
    )  # fmt: skip
    _band(figure, rounds, "test_loss", "test, worst to best")
    for column, name, line in (
        ("loss", "training", _line(GREEN, "dot")),
        ("test_loss", "test, after aggregation", _line(BLUE, width=3.0)),
        ("test_loss_local", "test, after local training", _line(ORANGE, "dash")),
    ):
        if _any(rounds[column]):
            figure.add_scatter(x=rounds.index, y=_round(rounds[column]), name=name, line=line)
    _each_client(figure, run.by_client("test_loss"))
    whole_rounds(figure, list(run.rounds.index))
    return _settled(figure)


def accuracy_by_bytes(run: Run) -> go.Figure:
    """Mean accuracy against the bytes that all clients together have sent so far."""
    rounds, sent = thinned(run.rounds, MOST_POINTS), run.cumulative_bytes
    figure = titled(
        "Accuracy against bytes sent",
        "Each point is a round; to the right is what all clients together have sent by then, their sketches included. "
        "A method that is cheap and good rises early.",
        f"Mean accuracy against bytes sent: {amount(sent.iloc[-1] if len(sent) else math.nan)} in all at the end.",
        x="bytes sent by all clients", y="accuracy",
    )  # fmt: skip
    figure.add_scatter(
        x=sent.reindex(rounds.index), y=_round(rounds["accuracy"]), name="mean accuracy", line=_line(BLUE, width=3.0),
        mode="lines+markers", customdata=[f"round {r}" for r in rounds.index],
        hovertemplate="%{customdata}: %{y:.3f} at %{x:.3s}B<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(ticksuffix="B", rangemode="tozero")
    figure.update_layout(hovermode="closest")
    return _settled(figure)


def label_mix(run: Run) -> go.Figure:
    """How many training examples of each class each client has."""
    clients = list(run.client_table)
    counts = pd.DataFrame({c: run.client_table[c].get("labels") or [] for c in clients}, index=_names(run)).T
    largest = {c: counts.columns[int(row.argmax())] for c, row in zip(clients, counts.to_numpy(), strict=True)}
    alt = f"Training examples of {len(clients)} clients by class. Largest class: " + "; ".join(
        f"{c} {largest[c]} ({counts.loc[c].max():.0f} of {counts.loc[c].sum():.0f})" for c in clients[:8]
    )
    if len(counts.columns) > len(LIGHT):
        shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        figure = titled(
            "Each client's label mix",
            "A row is a client, a column a class; the colour is that class's share of the client's training examples.",
            alt,
            height=_tall(len(clients)),
        )
        figure.add_heatmap(
            z=shares.round(3).to_numpy().tolist(), x=list(shares.columns), y=clients, colorscale="Cividis",
            colorbar={"title": {"text": "share"}, "thickness": 12},
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", type="category")
        return figure
    figure = titled(
        "Each client's label mix",
        "A bar is a client, its length the number of training examples, its parts the classes. "
        "The more the bars differ in colour, the more the clients' data differ.",
        alt,
        x="training examples", height=_tall(len(clients)),
    )  # fmt: skip
    for place, name in enumerate(counts.columns):
        figure.add_bar(
            y=clients, x=counts[name].tolist(), name=str(name), orientation="h",
            marker={"color": LIGHT[place], "line": {"width": 1, "color": PAGE_LIGHT}},
        )  # fmt: skip
    figure.update_layout(barmode="stack", hovermode="y unified")
    figure.update_yaxes(autorange="reversed", type="category")
    return _settled(figure)


def similarity(run: Run, which: str, round: int | None = None) -> go.Figure:
    """One of the matrices between clients ("data", "model", "weights"), of a round (the last by default).

    `layout.meta["steps"]` holds the rounds and matrices of up to some rounds for a page's slider.
    """
    found = {r: (names, m[which]) for r, (names, m) in run.matrices().items() if which in m}
    if not found:
        raise ValueError(f"{run.folder}: has no {MATRICES[which]}")
    shown = max(found) if round is None else round
    names, matrix = found[shown]
    reading = (
        "Row i shows with which weights client i's new core is mixed from the cores of the clients in the columns; "
        "a row sums to 1."
        if which == "weights"
        else "How alike two clients are, from 0 to 1; a client is 1 to itself."
    )
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    figure = titled(
        MATRICES[which].capitalize(),
        reading + " The colours span the values off the diagonal over all rounds.",
        f"{MATRICES[which].capitalize()} of {len(names)} clients in round {shown}"
        + (f": between {np.nanmin(off):.3f} and {np.nanmax(off):.3f} off the diagonal." if len(off) else "."),
        height=460,
    )
    values = np.concatenate([m[~np.eye(len(m), dtype=bool)] for _, m in found.values()])
    low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if np.isfinite(values).any() else (0.0, 1.0)
    figure.add_heatmap(
        z=_cells(matrix), x=names, y=names, zmin=low, zmax=max(high, low + 1e-6), colorscale="Cividis",
        name=f"round {shown}", colorbar={"thickness": 12}, hovertemplate="%{y} → %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", scaleanchor="x", constrain="domain")
    figure.update_xaxes(type="category", constrain="domain")
    rounds = _spaced(sorted(found), max(2, MOST_CELLS // max(1, 3 * len(matrix) ** 2)))
    steps, before = [], None
    for r in rounds:
        step = {"round": r, "names": found[r][0], "z": _cells(found[r][1])}
        same = before is not None and (step["names"], step["z"]) == (before["names"], before["z"])
        steps.append({"round": r, "same": True} if same else step)
        before = step if not same else before
    figure.update_layout(meta={**figure.to_dict()["layout"]["meta"], "steps": steps})
    return figure


def local_against_aggregated(run: Run) -> go.Figure:
    """Each client's last accuracy after local training and after aggregation, and what guessing would score."""
    after, local = run.latest("accuracy"), run.latest("accuracy_local")
    clients = sorted({*after, *local}, key=lambda c: (after.get(c, -1.0), c))
    gains = [after[c] - local[c] for c in clients if c in after and c in local]
    lost = sum(g < 0 for g in gains)
    figure = titled(
        "Each client: after local training, and after aggregation",
        "A line joins a client's accuracy after its own training (square) to its accuracy with what the server sent "
        "back (circle): a circle to the right gained from the others. The bar marks guessing the largest class.",
        f"Of {len(gains)} clients, {sum(g > 0 for g in gains)} score higher after aggregation than after local "
        f"training, {lost} lower."
        if gains
        else "Accuracy of each client.",
        x="accuracy", height=_tall(len(clients)),
    )  # fmt: skip
    joined: list[Any] = []
    for client in clients:
        joined += [(local.get(client), client), (after.get(client), client), (None, None)]
    figure.add_scatter(
        x=[x for x, _ in joined], y=[y for _, y in joined], mode="lines", line=_line(GREY, width=1.5),
        name="change", hoverinfo="skip", showlegend=False, meta="hidden",
    )  # fmt: skip
    guess = {c: about["guess"] for c, about in run.client_table.items() if about.get("guess") is not None}
    for name, values, symbol, colour in (
        ("guess", guess, "line-ns-open", GREY),
        ("after local training", local, "square-open", ORANGE),
        ("after aggregation", after, "circle", BLUE),
    ):
        if values:
            figure.add_scatter(
                x=[_three(values.get(c)) for c in clients], y=clients, name=name, mode="markers",
                marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2}},
                hovertemplate="%{y}: %{x:.3f}",
            )  # fmt: skip
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=clients)
    return _settled(figure, hover="closest")


def rho(run: Run, which: str = "exact") -> go.Figure:
    """ρ by layer and round: how far what was sent down is from the mean of the clients' products."""
    table = run.rho(which).dropna(how="all")
    table = table.loc[_spaced(list(table.index), MOST_POINTS)]
    what = {
        "exact": "what was sent down is from the mean of the clients' products",
        "best_rank_r": "what was sent down is from the best pair of that rank",
    }[which]
    values = table.to_numpy()
    figure = titled(
        f"ρ by layer and round ({'exact' if which == 'exact' else 'best of rank r'})",
        f"How far {what}, relative to its size: 0 is no error, 1 is as large as the update itself.",
        f"ρ of {table.shape[1]} layers over {len(table)} rounds: between {np.nanmin(values):.2g} and "
        f"{np.nanmax(values):.2g}, {np.nanmean(values[-1]):.2g} on average in the last round.",
        x="round", height=_tall(table.shape[1]),
    )  # fmt: skip
    figure.add_heatmap(
        z=[[_three(x, 4) for x in row] for row in values.T], x=[str(r) for r in table.index],
        y=_short(list(table.columns)), colorscale="Cividis", zmin=0, colorbar={"title": {"text": "ρ"}, "thickness": 12},
        hovertemplate="%{y}, round %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def time_by_phase(run: Run) -> go.Figure:
    """Seconds of each phase, by round."""
    rounds = thinned(run.rounds, MOST_POINTS)
    totals = {p: float(np.nansum(run.rounds[f"seconds_{p}"].to_numpy(dtype=float))) for p in PHASES_SHOWN}
    whole = sum(totals.values())
    figure = titled(
        "Time by phase",
        "Seconds of each round. Sketching happens once for each client, before its first round.",
        "Seconds in all: " + ", ".join(f"{p} {s:.1f} ({s / whole:.0%})" for p, s in totals.items() if whole),
        x="round", y="seconds",
    )  # fmt: skip
    for phase, colour in PHASES_SHOWN.items():
        if totals[phase]:
            figure.add_bar(x=rounds.index, y=_round(rounds[f"seconds_{phase}"]), name=phase, marker={"color": colour})
    figure.update_layout(barmode="stack")
    whole_rounds(figure, list(run.rounds.index))
    return _settled(figure)


PHASES_SHOWN = {"sketch": OCHRE, "train": BLUE, "aggregate": ORANGE, "evaluate": GREEN}


def of_run(run: Run) -> dict[str, go.Figure]:
    """Every figure that this run has the numbers for, by name."""
    found: dict[str, go.Figure] = {}
    if _any(run.rounds["accuracy"]):
        found["accuracy"] = accuracy(run)
    if _any(run.rounds[["loss", "test_loss", "test_loss_local"]]):
        found["loss"] = loss(run)
    if _any(run.rounds["accuracy"]) and run.cumulative_bytes.sum() > 0:
        found["accuracy-by-bytes"] = accuracy_by_bytes(run)
    if run.latest("accuracy") or run.latest("accuracy_local"):
        found["clients"] = local_against_aggregated(run)
    if any(about.get("labels") for about in run.client_table.values()):
        found["label-mix"] = label_mix(run)
    present = {which for _, square in run.matrices().values() for which in square}
    found |= {f"{which}-matrix": similarity(run, which) for which in MATRICES if which in present}
    found |= {f"rho-{which}": rho(run, which) for which in ("exact", "best_rank_r") if _any(run.rho(which))}
    if run.total_seconds > 0:
        found["time"] = time_by_phase(run)
    return found


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


def whole_rounds(figure: go.Figure, rounds: Sequence[int]) -> None:
    """Ticks at whole rounds where there are few."""
    if len(rounds) <= 12:
        figure.update_xaxes(tickvals=list(rounds))


def thinned(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows, evenly spaced, first and last among them."""
    return table.loc[_spaced(list(table.index), most)]


def _any(table: pd.DataFrame | pd.Series) -> bool:
    return bool(np.isfinite(table.to_numpy(dtype=float)).any())


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def _band(figure: go.Figure, rounds: pd.DataFrame, metric: str, name: str) -> None:
    known = rounds[[f"{metric}_worst", f"{metric}_best"]].dropna()
    if known.empty:
        return
    low, high = known.min(axis=1), known.max(axis=1)
    group = {"legendgroup": name, "line": _line(BLUE, width=0.5), "mode": "lines", "hoverinfo": "skip"}
    figure.add_scatter(x=known.index, y=_round(high), name=name, showlegend=False, **group)
    figure.add_scatter(x=known.index, y=_round(low), name=name, fill="tonexty", fillcolor=faint(BLUE), **group)


def _each_client(figure: go.Figure, table: pd.DataFrame) -> None:
    """A line for each client, hidden until asked for."""
    table = thinned(table, max(20, MOST_CLIENT_POINTS // max(1, table.shape[1])))
    for place, client in enumerate(table.columns):
        figure.add_scatter(
            x=table.index, y=_round(table[client]), name=client, meta="client", legendgroup=EACH, visible="legendonly",
            legendgrouptitle={"text": EACH} if place == 0 else None, line=_line(LIGHT[place % 8], width=1.2),
            connectgaps=True,
        )  # fmt: skip


def _settled(figure: go.Figure, hover: str | None = None) -> go.Figure:
    if hover:
        figure.update_layout(hovermode=hover)
    for place, trace in enumerate(figure.to_dict()["data"]):
        if trace["type"] == "scatter" and "mode" not in trace:
            figure.update_traces(mode="lines+markers" if len(trace["x"]) <= 30 else "lines", selector=place)
    return figure


def _trend(run: Run, column: str, name: str) -> str:
    known = run.rounds[column].dropna()
    if known.empty:
        return f"No {name} was recorded."
    last = run.rounds.loc[known.index[-1]]
    text = (
        f"Mean {name} goes from {share(known.iloc[0])} in round {known.index[0]} to {share(known.iloc[-1])} in round "
    )
    text += str(known.index[-1])
    if f"{column}_worst" in last and math.isfinite(last[f"{column}_worst"]):
        text += (
            f", the worst client at {share(last[f'{column}_worst'])} and the best at {share(last[f'{column}_best'])}"
        )
    return f"{run.paper}: {text}."


def _line(colour: str, dash: str = "solid", width: float = 2.0) -> dict[str, Any]:
    return {"color": colour, "dash": dash, "width": width}


def _round(values: Iterable[float]) -> list[float | None]:
    return [_three(value, 4) for value in values]


def _three(value: float | None, digits: int = 3) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), digits)


def _cells(matrix: np.ndarray) -> list[list[float | None]]:
    return [[_three(x) for x in row] for row in matrix]


def _names(run: Run) -> list[str]:
    most = max(len(about.get("labels") or []) for about in run.client_table.values())
    return run.labels if len(run.labels) == most else [f"class {i}" for i in range(most)]


def _tall(rows: int) -> int:
    return min(1200, 140 + 20 * max(rows, 6))


def _short(layers: Sequence[str]) -> list[str]:
    """Layer names without the parts that all of them share at both ends."""
    split = [name.split(".") for name in layers]
    if len(split) < 2:
        return list(layers)
    start = 0
    while all(len(parts) > start + 1 for parts in split) and len({parts[start] for parts in split}) == 1:
        start += 1
    return [".".join(parts[start:]) for parts in split]
