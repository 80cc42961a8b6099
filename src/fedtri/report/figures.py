"""One run's figures by round: functions from a run to a plotly figure, for the page, for papers and for notebooks.

`layout.meta` of each holds "alt", what the figure shows in words, and "read", how to read it.
"""

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from fedtri.report.client_figures import MATRICES, label_mix, local_against_aggregated, similarity
from fedtri.report.colours import BLUE, GREEN, GREY, ORANGE
from fedtri.report.drawing import (
    MOST_POINTS,
    STAGE_COLOURS,
    accuracy_axis,
    band,
    each_client,
    known,
    rounded,
    rounded_one,
    settled,
    spaced,
    stroke,
    tall,
    thinned,
    titled,
    trend,
    whole_rounds,
)
from fedtri.report.names import amount
from fedtri.report.reading import Run


def accuracy(run: Run) -> go.Figure:
    """Test accuracy by round: the mean over clients, an area from worst to best, and each client on demand."""
    rounds = thinned(run.rounds, MOST_POINTS)
    figure = titled(
        "Accuracy by round",
        "The thick line is the accuracy after aggregation on each client's own test examples, averaged over clients. "
        "The area goes from the worst client to the best. The dashed line is the accuracy after local training, before "
        "the server's answer came.",
        trend(run, "accuracy", "accuracy"),
        x="round", y="accuracy",
    )  # fmt: skip
    band(figure, rounds, "accuracy", "worst to best")
    figure.add_scatter(x=rounds.index, y=rounded(rounds["accuracy"]), name="mean", line=stroke(BLUE, width=3.0))
    if known(rounds["accuracy_local"]):
        figure.add_scatter(
            x=rounds.index, y=rounded(rounds["accuracy_local"]), name="mean after local training",
            line=stroke(ORANGE, "dash"),
        )  # fmt: skip
    guesses = [about["guess"] for about in run.client_table.values() if about.get("guess") is not None]
    if guesses and len(rounds):
        ends = [rounds.index[0], rounds.index[-1]]
        figure.add_scatter(
            x=ends, y=[round(float(np.mean(guesses)), 4)] * 2, mode="lines",
            name="guessing each client's largest class", line=stroke(GREY, "dot"),
        )  # fmt: skip
    each_client(figure, run.by_client("accuracy"))
    whole_rounds(figure, list(run.rounds.index))
    return accuracy_axis(settled(figure))


def loss(run: Run) -> go.Figure:
    """Training loss, and test loss after local training and after aggregation, by round."""
    rounds = thinned(run.rounds, MOST_POINTS)
    figure = titled(
        "Loss by round",
        "The training loss is the mean over clients and steps of the round. The area goes from the client with the "
        "highest test loss to the one with the lowest.",
        trend(run, "loss", "training loss"),
        x="round", y="loss",
    )  # fmt: skip
    band(figure, rounds, "test_loss", "test, worst to best")
    for column, name, drawn in (
        ("loss", "training", stroke(GREEN, "dot")),
        ("test_loss", "test, after aggregation", stroke(BLUE, width=3.0)),
        ("test_loss_local", "test, after local training", stroke(ORANGE, "dash")),
    ):
        if known(rounds[column]):
            figure.add_scatter(x=rounds.index, y=rounded(rounds[column]), name=name, line=drawn)
    each_client(figure, run.by_client("test_loss"))
    whole_rounds(figure, list(run.rounds.index))
    return settled(figure)


def accuracy_by_bytes(run: Run) -> go.Figure:
    """Mean accuracy against the bytes that all clients together have sent so far."""
    rounds, sent = thinned(run.rounds, MOST_POINTS), run.cumulative_bytes
    figure = titled(
        "Accuracy against bytes sent",
        "Each point is a round. The horizontal axis is what all clients together have sent by then, bases and sketches "
        "included. "
        "A method that is cheap and accurate rises early.",
        f"Mean accuracy against bytes sent: {amount(sent.iloc[-1] if len(sent) else math.nan)} in all at the end.",
        x="bytes sent by all clients", y="accuracy",
    )  # fmt: skip
    figure.add_scatter(
        x=sent.reindex(rounds.index), y=rounded(rounds["accuracy"]), name="mean accuracy", line=stroke(BLUE, width=3.0),
        mode="lines+markers", customdata=[f"round {r}" for r in rounds.index],
        hovertemplate="%{customdata}: %{y:.3f} at %{x:.3s}B<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(ticksuffix="B", rangemode="tozero")
    return accuracy_axis(settled(figure, hover="closest"))


def rho(run: Run, which: str = "exact") -> go.Figure:
    """ρ by layer and round: the distance of what was sent down from the mean of the clients' products B·A."""
    table = run.rho(which).dropna(how="all")
    table = table.loc[spaced(list(table.index), MOST_POINTS)]
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
        x="round", height=tall(table.shape[1]),
    )  # fmt: skip
    figure.add_heatmap(
        z=[[rounded_one(x, 4) for x in row] for row in values.T], x=[str(r) for r in table.index],
        y=_short(list(table.columns)), colorscale="Cividis", zmin=0, colorbar={"title": {"text": "ρ"}, "thickness": 12},
        hovertemplate="%{y}, round %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def time_by_phase(run: Run) -> go.Figure:
    """Seconds of each phase, by round."""
    rounds = thinned(run.rounds, MOST_POINTS)
    totals = {p: float(np.nansum(run.rounds[f"seconds_{p}"].to_numpy(dtype=float))) for p in STAGE_COLOURS}
    whole = sum(totals.values())
    figure = titled(
        "Time by phase",
        "Seconds of each round. Sketching happens once for each client, before its first round.",
        "Seconds in all: " + ", ".join(f"{p} {s:.1f} ({s / whole:.0%})" for p, s in totals.items() if whole),
        x="round", y="seconds",
    )  # fmt: skip
    for phase, colour in STAGE_COLOURS.items():
        if totals[phase]:
            figure.add_bar(x=rounds.index, y=rounded(rounds[f"seconds_{phase}"]), name=phase, marker={"color": colour})
    figure.update_layout(barmode="stack")
    whole_rounds(figure, list(run.rounds.index))
    return settled(figure)


def _short(layers: Sequence[str]) -> list[str]:
    """Layer names without the leading parts that all of them share."""
    split = [name.split(".") for name in layers]
    if len(split) < 2:
        return list(layers)
    start = 0
    while all(len(parts) > start + 1 for parts in split) and len({parts[start] for parts in split}) == 1:
        start += 1
    return [".".join(parts[start:]) for parts in split]


def of_run(run: Run) -> dict[str, go.Figure]:
    """Every figure for which this run has the numbers, by name."""
    found: dict[str, go.Figure] = {}
    if known(run.rounds["accuracy"]):
        found["accuracy"] = accuracy(run)
    if known(run.rounds[["loss", "test_loss", "test_loss_local"]]):
        found["loss"] = loss(run)
    if known(run.rounds["accuracy"]) and run.cumulative_bytes.sum() > 0:
        found["accuracy-by-bytes"] = accuracy_by_bytes(run)
    if run.latest("accuracy") or run.latest("accuracy_local"):
        found["clients"] = local_against_aggregated(run)
    if any(about.get("labels") for about in run.client_table.values()):
        found["label-mix"] = label_mix(run)
    present = {which for _, square in run.matrices().values() for which in square}
    found |= {f"{which}-matrix": similarity(run, which) for which in MATRICES if which in present}
    found |= {f"rho-{which}": rho(run, which) for which in ("exact", "best_rank_r") if known(run.rho(which))}
    if run.total_seconds > 0:
        found["time"] = time_by_phase(run)
    return found
