"""One run's figures about its clients: label mixes, similarity, and accuracy before and after aggregation."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from fedtri.report.colours import BLUE, GREY, LIGHT, ORANGE, PAGE_LIGHT
from fedtri.report.drawing import accuracy_axis, cells, rounded_one, settled, spaced, stroke, tall, titled
from fedtri.report.reading import Run

MOST_CELLS = 120_000
"""Cells of all matrices together that a page's slider holds."""
MATRICES = {"data": "data similarity", "model": "model similarity", "weights": "mixing weights"}


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
            height=tall(len(clients)),
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
        x="training examples", height=tall(len(clients)),
    )  # fmt: skip
    for place, name in enumerate(counts.columns):
        figure.add_bar(
            y=clients, x=counts[name].tolist(), name=str(name), orientation="h",
            marker={"color": LIGHT[place], "line": {"width": 1, "color": PAGE_LIGHT}},
        )  # fmt: skip
    figure.update_layout(barmode="stack", hovermode="y unified")
    figure.update_yaxes(autorange="reversed", type="category")
    return settled(figure)


def similarity(run: Run, which: str, round: int | None = None) -> go.Figure:
    """One of the matrices between clients ("data", "model" or "weights") in one round (by default the last).

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
        z=cells(matrix), x=names, y=names, zmin=low, zmax=max(high, low + 1e-6), colorscale="Cividis",
        name=f"round {shown}", colorbar={"thickness": 12}, hovertemplate="%{y} → %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", scaleanchor="x", constrain="domain")
    figure.update_xaxes(type="category", constrain="domain")
    rounds = spaced(sorted(found), max(2, MOST_CELLS // max(1, 3 * len(matrix) ** 2)))
    steps, before = [], None
    for r in rounds:
        step = {"round": r, "names": found[r][0], "z": cells(found[r][1])}
        same = before is not None and (step["names"], step["z"]) == (before["names"], before["z"])
        steps.append({"round": r, "same": True} if same else step)
        before = step if not same else before
    figure.update_layout(meta={**figure.to_dict()["layout"]["meta"], "steps": steps})
    return figure


def local_against_aggregated(run: Run) -> go.Figure:
    """Each client's last accuracy after local training and after aggregation, beside that of guessing."""
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
        x="accuracy", height=tall(len(clients)),
    )  # fmt: skip
    joined: list[Any] = []
    for client in clients:
        joined += [(local.get(client), client), (after.get(client), client), (None, None)]
    figure.add_scatter(
        x=[x for x, _ in joined], y=[y for _, y in joined], mode="lines", line=stroke(GREY, width=1.5),
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
                x=[rounded_one(values.get(c)) for c in clients], y=clients, name=name, mode="markers",
                marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2}},
                hovertemplate="%{y}: %{x:.3f}",
            )  # fmt: skip
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=clients)
    return accuracy_axis(settled(figure, hover="closest"), "x")


def _names(run: Run) -> list[str]:
    most = max(len(about.get("labels") or []) for about in run.client_table.values())
    return run.labels if len(run.labels) == most else [f"class {i}" for i in range(most)]
