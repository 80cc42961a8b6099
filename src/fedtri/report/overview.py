"""Figures that compare runs: accuracy against bytes, communication, worst and best client, accuracy by round."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from fedtri.report.colours import GREY, faint, style
from fedtri.report.drawing import MOST_POINTS, STAGE_COLOURS, accuracy_axis, rounded_one, thinned, titled, whole_rounds
from fedtri.report.names import amount, share
from fedtri.report.tables import Group


def front(groups: Sequence[Group]) -> go.Figure:
    """Mean accuracy against a client's bytes of the whole run, both ways, with the Pareto front."""
    sending = {i: (g.mean("bytes_per_client"), g.mean("mean")) for i, g in enumerate(groups)}
    costs = {i: (x, y) for i, (x, y) in sending.items() if x > 0 and math.isfinite(y)}
    best, edge = -math.inf, []
    for i in sorted(costs, key=lambda i: (costs[i][0], -costs[i][1])):
        if costs[i][1] > best:
            best = costs[i][1]
            edge.append(i)
    figure = titled(
        "Accuracy against bytes",
        "Up is more accurate, left is cheaper. The stepped line is the Pareto front: no method is above it and to its "
        f"left. {_bars(groups)} A method that sends nothing has no place on a logarithmic axis: it is a dashed line.",
        "; ".join(f"{groups[i].label}: accuracy {share(y)} for {amount(x)}" for i, (x, y) in sending.items()),
        x="bytes a client in the whole run, both ways (log)", y="mean accuracy over clients", height=440,
    )  # fmt: skip
    if len(edge) > 1:
        figure.add_scatter(
            x=[costs[i][0] for i in edge], y=[costs[i][1] for i in edge], mode="lines", name="front", hoverinfo="skip",
            line={"color": GREY, "width": 1.5, "shape": "hv"},
        )  # fmt: skip
    ends = [min((x for x, _ in costs.values()), default=1) / 2, max((x for x, _ in costs.values()), default=10) * 2]
    for i, group in enumerate(groups):
        colour, _, symbol = style(i)
        x, y = sending[i]
        spread = group.half_interval() if len(group.runs) > 1 else group.standard_error()
        bar = {"color": colour, "thickness": 1.5, "width": 5}
        if i in costs:
            figure.add_scatter(
                x=[x], y=[y], name=group.label, mode="markers", marker={"color": colour, "symbol": symbol, "size": 13},
                error_y={"array": [spread], **bar} if math.isfinite(spread) else None,
                hovertemplate=f"{amount(x)}: %{{y:.3f}}",
            )  # fmt: skip
        elif math.isfinite(y):
            figure.add_scatter(
                x=ends, y=[y, y], name=f"{group.label}, sends nothing", mode="lines",
                line={"color": colour, "dash": "dash", "width": 2},
                error_y={"array": [spread, None], **bar} if math.isfinite(spread) else None,
            )  # fmt: skip
    figure.update_xaxes(type="log", ticksuffix="B", dtick=1, exponentformat="SI", minexponent=2)
    figure.update_layout(hovermode="closest")
    return accuracy_axis(_one_seed(figure, groups))


def communicated(groups: Sequence[Group]) -> go.Figure:
    """Parameters a client sends each round, on a log axis (figure 1 of the CE-LoRA paper)."""
    counts = [g.mean("parameters") for g in groups]
    known = [c for c in counts if math.isfinite(c) and c > 0]
    figure = titled(
        "Communicated parameters",
        "How many numbers a client sends in a round. The axis is logarithmic: a grid line is ten times the one before.",
        "; ".join(f"{g.label}: {_count(c)}" for g, c in zip(groups, counts, strict=True)),
        x="parameters up per client and round (log)", height=150 + 34 * len(groups),
    )  # fmt: skip
    labels = [g.label for g in groups]
    figure.add_bar(
        y=labels, x=[c if math.isfinite(c) and c > 0 else None for c in counts], orientation="h", name="parameters up",
        marker={"color": [style(i)[0] for i in range(len(groups))]}, textposition="auto", cliponaxis=False,
        text=[_count(c) if c > 0 else "" for c in counts], hovertemplate="%{y}: %{x:,}<extra></extra>",
    )  # fmt: skip
    floor = 10 ** math.floor(math.log10(min(known, default=10))) / 10
    for label, count in zip(labels, counts, strict=True):
        if not count > 0:
            figure.add_annotation(
                x=math.log10(floor), y=label, text=_count(count), showarrow=False, xanchor="left", xshift=6
            )
    figure.update_xaxes(type="log", range=[math.log10(floor), math.log10(max(known, default=100)) + 0.3], dtick=1)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(hovermode="closest", showlegend=False)
    return figure


def worst_and_best(groups: Sequence[Group]) -> go.Figure:
    """Worst, mean and best client of every method, averaged over seeds (figure 4 of the CE-LoRA paper)."""
    measures = {m: [g.mean(m) for g in groups] for m in ("worst", "mean", "best")}
    figure = titled(
        "Worst and best client",
        "A line goes from the accuracy of the worst client to that of the best. The circle is the mean over clients. A "
        "short line far to the right means that all clients are served well.",
        "; ".join(
            f"{g.label}: " + ", ".join(f"{m} {share(values[i])}" for m, values in measures.items())
            for i, g in enumerate(groups)
        ),
        x="accuracy", height=150 + 34 * len(groups),
    )  # fmt: skip
    labels = [g.label for g in groups]
    ends: list[Any] = []
    for i, label in enumerate(labels):
        ends += [(measures["worst"][i], label), (measures["best"][i], label), (None, None)]
    figure.add_scatter(
        x=[rounded_one(x) for x, _ in ends], y=[y for _, y in ends], mode="lines", line={"color": GREY, "width": 2},
        name="range", hoverinfo="skip", showlegend=False, meta="hidden",
    )  # fmt: skip
    for place, (measure, symbol) in enumerate(
        (("worst", "triangle-left"), ("mean", "circle"), ("best", "triangle-right"))
    ):
        name = f"{measure} client" if measure != "mean" else "mean over clients"
        colour = (style(1)[0], style(0)[0], style(2)[0])[place]
        figure.add_scatter(
            x=[rounded_one(x) for x in measures[measure]], y=labels, mode="markers", name=name,
            marker={"symbol": symbol, "size": 12, "color": colour}, hovertemplate="%{y}: %{x:.3f}",
        )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", categoryorder="array", categoryarray=labels)
    figure.update_layout(hovermode="closest")
    return accuracy_axis(figure, "x")


def courses(groups: Sequence[Group], against: str = "round") -> go.Figure:
    """Mean accuracy over clients and seeds by round, or against the bytes all clients have sent ("bytes")."""
    by_bytes = against == "bytes"
    figure = titled(
        "Accuracy against bytes sent so far" if by_bytes else "Accuracy by round",
        "Each line is a method: the mean over clients, averaged over seeds"
        + (", against what all clients have sent." if by_bytes else f". {_area(groups)}"),
        "; ".join(f"{g.label} ends at {share(g.mean('mean'))}" for g in groups),
        x="bytes sent by all clients (log)" if by_bytes else "round", y="mean accuracy over clients", height=440,
    )  # fmt: skip
    for place, group in enumerate(groups):
        seeds = pd.DataFrame({seed: run.rounds["accuracy"] for seed, run in group.runs.items()}).sort_index()
        mean = thinned(seeds.mean(axis=1).to_frame("y").dropna(), MOST_POINTS)["y"]
        if mean.empty:
            continue
        x = list(mean.index)
        if by_bytes:
            sent = pd.DataFrame({seed: run.cumulative_bytes for seed, run in group.runs.items()}).mean(axis=1)
            if not sent.max() > 0:
                continue
            x = sent.reindex(mean.index).tolist()
        colour, dash, symbol = style(place)
        spread = seeds.std(axis=1).reindex(mean.index)
        if not by_bytes and spread.notna().any():
            both = {
                "mode": "lines",
                "line": {"width": 0, "color": colour},
                "hoverinfo": "skip",
                "legendgroup": group.label,
            }
            both |= {"showlegend": False, "meta": "hidden"}
            figure.add_scatter(x=x, y=(mean + spread).round(4).tolist(), name=group.label, **both)
            figure.add_scatter(
                x=x,
                y=(mean - spread).round(4).tolist(),
                name=group.label,
                fill="tonexty",
                fillcolor=faint(colour),
                **both,
            )
        figure.add_scatter(
            x=x, y=mean.round(4).tolist(), name=group.label, legendgroup=group.label,
            mode="lines+markers" if len(x) <= 30 else "lines", marker={"symbol": symbol, "size": 7},
            line={"color": colour, "dash": dash, "width": 2.5},
        )  # fmt: skip
    if not by_bytes:
        whole_rounds(figure, sorted({r for g in groups for run in g.runs.values() for r in run.rounds.index}))
    else:
        figure.update_xaxes(type="log", ticksuffix="B", dtick=1, exponentformat="SI", minexponent=2)
        figure.update_layout(hovermode="closest")
    return accuracy_axis(_one_seed(figure, groups))


def seconds(groups: Sequence[Group]) -> go.Figure:
    """Seconds of each phase of a whole run, averaged over seeds."""
    figure = titled(
        "Time by phase",
        "Seconds of a whole run on the machine it ran on, averaged over seeds.",
        "; ".join(f"{g.label}: {g.mean('seconds'):.0f} s" for g in groups),
        x="seconds", height=150 + 34 * len(groups),
    )  # fmt: skip
    for phase, colour in STAGE_COLOURS.items():
        spent = [
            float(np.mean([np.nansum(run.rounds[f"seconds_{phase}"].to_numpy(dtype=float)) for run in g.runs.values()]))
            for g in groups
        ]
        if any(spent):
            figure.add_bar(
                y=[g.label for g in groups], x=[round(s, 2) for s in spent], name=phase, orientation="h",
                marker={"color": colour},
            )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(barmode="stack", hovermode="y unified")
    return figure


def of_groups(groups: Sequence[Group]) -> Mapping[str, go.Figure]:
    """Every figure for which these runs have the numbers, by name."""
    found: dict[str, go.Figure] = {}
    scored = any(math.isfinite(g.mean("mean")) for g in groups)
    if scored:
        found |= {"front": front(groups), "worst-and-best": worst_and_best(groups), "courses": courses(groups)}
        if any(run.cumulative_bytes.sum() > 0 for g in groups for run in g.runs.values()):
            found["courses-by-bytes"] = courses(groups, "bytes")
    if any(math.isfinite(g.mean("parameters")) for g in groups):
        found["communicated"] = communicated(groups)
    if any(g.mean("seconds") > 0 for g in groups):
        found["time"] = seconds(groups)
    return found


def _single(groups: Sequence[Group]) -> bool:
    """Whether every method ran with one seed."""
    return all(len(group.runs) == 1 for group in groups)


def _bars(groups: Sequence[Group]) -> str:
    """What the error bars are."""
    error = "± one standard error of the mean over clients (standard deviation / √clients)"
    if _single(groups):
        return f"One seed: no interval over seeds. Error bars are {error}."
    alone = f"; for a method with one seed, {error}" if any(len(group.runs) == 1 for group in groups) else ""
    return f"Error bars are the 95 % interval of the mean over seeds{alone}."


def _area(groups: Sequence[Group]) -> str:
    """What the areas around lines are."""
    return "One seed: no interval." if _single(groups) else "The area is ± one standard deviation over seeds."


def _one_seed(figure: go.Figure, groups: Sequence[Group]) -> go.Figure:
    """The figure with a note where there is one seed. In a file it has no text around it that could say so."""
    if _single(groups):
        place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom"}
        figure.add_annotation(text="one seed: no interval over seeds", showarrow=False, **place)
    return figure


def _count(parameters: float) -> str:
    return "unknown" if not math.isfinite(parameters) else f"{parameters:,.0f}" if parameters > 0 else "sends nothing"
