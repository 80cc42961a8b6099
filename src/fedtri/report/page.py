"""One self-contained HTML page about a run, or about runs compared: no network, a table behind every figure.

plotly.js is embedded once; each figure is JSON that is drawn when it comes into view, so that large pages open at once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fedtri import atomic
from fedtri.errors import FedtriError
from fedtri.report import figures, network, overview, tables
from fedtri.report.colours import DARK, LIGHT, PAGE_DARK, PAGE_LIGHT
from fedtri.report.names import amount, duration, points, share
from fedtri.report.reading import Run, number

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
HERE = Path(__file__).parent


def write(runs: Sequence[Run], path: Path, baseline: str | None = None) -> Path:
    """Write the page of one run, or of several, atomically. Raises FedtriError if it cannot be written."""
    tables.baselines(tables.grouped(runs), baseline)  # says so where there is none of that name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, of_run(runs[0]) if len(runs) == 1 else of_runs(runs, baseline))
    except OSError as error:
        raise FedtriError(f"{path}: the page cannot be written: {error.strerror}") from None
    return path


def of_run(run: Run) -> str:
    """The page of one run."""
    title = f"{run.paper} on {run.config.get('data', 'unknown data')}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(result(run))}</p>",
        notes({"": run.missing}),
        facts(run),
        drawings(figures.of_run(run)),
        "<h2>Each client</h2>" + static(clients(run)) if run.clients else "",
        titled("On the network", network.latency(run)),
        titled("What went wrong", network.events(run)),
        _source("The whole configuration", run.folder / "config.toml"),
        _source("Versions and machine", run.folder / "environment.json"),
    ]
    return document(title, body, f"fedtri report {run.folder}")


def of_runs(runs: Sequence[Run], baseline: str | None = None) -> str:
    """The page that compares runs."""
    groups = tables.grouped(runs)
    names = list(dict.fromkeys(group.method for group in groups))
    data = ", ".join(sorted({str(run.config.get("data", "unknown data")) for run in runs}))
    title = (
        f"{len(names)} methods compared on {data}" if len(names) > 1 else f"{len(groups)} settings compared on {data}"
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(verdict(groups, baseline))}</p>",
        notes({run.folder.name: run.missing for run in runs}),
        facts(runs[0], shared=runs),
        "<h2>Results</h2>" + static(tables.readable(groups, baseline), tables.caption(groups, baseline)),
        drawings(overview.of_groups(groups)),
        "<h2>Runs</h2>" + static(_folders(runs)),
    ]
    return document(
        title, body, "fedtri report " + " ".join(str(run.folder) for run in runs[:3]) + (" …" if len(runs) > 3 else "")
    )


def result(run: Run) -> str:
    """What came out of a run, in two sentences."""
    scores, rounds = run.latest("accuracy"), len(run.lines)
    if not rounds:
        return "No round has finished, so there is no result yet."
    many = f"{rounds} round{'s' * (rounds != 1)}"
    if scores:
        worst, best = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
        mean = sum(scores.values()) / len(scores)
        first = (
            f"After {many} of {run.paper}, the mean test accuracy over {len(scores)} clients is "
            f"{share(mean)} (worst {worst} {share(scores[worst])}, best {best} {share(scores[best])})"
        )
        guess = number(run.summary.get("guess"))
        if math.isfinite(guess):
            first += f", {points(mean - guess)} points against guessing each client's largest class"
    else:
        last = run.rounds["loss"].dropna()
        first = f"{many} of {run.paper} ran without accuracy being measured"
        first += f"; the last training loss is {share(last.iloc[-1])}" if len(last) else ""
    return (
        f"{first}. A client sent {amount(run.per_round('up'))} and received {amount(run.per_round('down'))} a round, "
        f"{amount(run.total_bytes)} in all for everyone, in {duration(run.total_seconds)}."
    )


def verdict(groups: Sequence[tables.Group], baseline: str | None = None) -> str:
    """What came out of a comparison, in two sentences, with the interval of the difference where there is one."""
    scored = [g for g in groups if math.isfinite(g.mean("mean"))]
    if not scored:
        return "None of these runs has measured accuracy."
    top = max(scored, key=lambda g: g.mean("mean"))
    other = dict(zip(map(id, groups), tables.baselines(groups, baseline), strict=True))[id(top)]
    first = f"{top.label} has the highest mean accuracy, {share(top.mean('mean'))}"
    if other is top:  # nothing to subtract but the next best
        other = max((g for g in scored if g is not top), key=lambda g: g.mean("mean"), default=None)
    if other is not None:
        gap = tables.paired(top, other)
        first += f": {points(gap.mean)} points against {other.label}"
        if math.isfinite(gap.low):
            first += f", 95 % interval {points(gap.low)} to {points(gap.high)} over {gap.seeds} seeds"
            first += ", which holds 0: no difference is shown" if gap.low <= 0 <= gap.high else ""
        else:
            first += " with one seed, so there is no interval"
    sending = [g for g in groups if g.mean("bytes_up") > 0 and g.mean("parameters") != 0]
    if not sending:
        return f"{first}. No method here sends what it learns."
    least, most = (f(sending, key=lambda g: g.mean("bytes_up")) for f in (min, max))
    second = f"Of those that share what they learn, {least.label} sends least"
    second += f", {amount(least.mean('bytes_up'))} per client and round"
    if most is not least:
        second += f", {most.mean('bytes_up') / least.mean('bytes_up'):,.0f} times less than {most.label}"
    return f"{first}. {second}."


def facts(run: Run, shared: Sequence[Run] = ()) -> str:
    """What was run and on which machine: the settings that all shown runs have in common."""
    config, told = run.config, []
    alike = (
        [key for key in config if all(other.config.get(key) == config[key] for other in shared)]
        if shared
        else list(config)
    )
    length = "epochs" if "epochs" in config else "steps"
    wanted = ("model", "data", "partition", "clients", "fraction", "rounds", length, "batch_size", "learning_rate")
    for key in (*wanted, "rank", "lora_alpha", "targets", "head", "seed"):
        if key in alike:
            told.append((key.replace("_", " "), config[key]))
    if not shared and run.clients:
        told[3:4] = [("clients", len(run.clients))]
    machine = run.environment
    told += [(key, machine[key]) for key in ("device", "processor") if machine.get(key)]
    pairs = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in told)
    return f"<dl aria-label='What was run'>{pairs}</dl>"


def clients(run: Run) -> pd.DataFrame:
    """One row per client, as text."""
    after, local, rows = run.latest("accuracy"), run.latest("accuracy_local"), []
    for client in run.clients:
        about = run.client_table.get(client, {})
        counts = about.get("labels") or []
        largest = counts.index(max(counts)) if counts else None
        name = "–" if largest is None else run.labels[largest] if largest < len(run.labels) else f"class {largest}"
        rows.append({
            "client": client,
            "train": str(about.get("train", "–")),
            "test": str(about.get("test", "–")),
            "largest class": name,
            "guess": share(number(about.get("guess"))),
            "after local training": share(local.get(client, math.nan)),
            "after aggregation": share(after.get(client, math.nan)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def notes(missing: Mapping[str, Sequence[str]]) -> str:
    """What is missing, by run, as HTML; empty if nothing is."""
    told = [f"{name}: {text}" if name else text for name, texts in missing.items() for text in texts]
    if not told:
        return ""
    rows = "".join(f"<li>{escape(text)}</li>" for text in told[:40])
    rest = f"<li>… and {len(told) - 40} more</li>" if len(told) > 40 else ""
    heading = "<strong>What is missing</strong>"
    return f"<section class='note' aria-label='What is missing'>{heading}<ul>{rows}{rest}</ul></section>"


def drawings(found: Mapping[str, go.Figure]) -> str:
    """Every figure's frame and numbers; page.js draws them."""
    links = "".join(
        f"<li><a href='#{name}'>{escape(f.to_dict()['layout']['title']['text'])}</a></li>" for name, f in found.items()
    )
    return (
        f"<nav aria-label='Figures'><ul>{links}</ul></nav><div class='figures'>"
        + "".join(_drawing(name, figure) for name, figure in found.items())
        + "</div>"
    )


def titled(title: str, table: pd.DataFrame) -> str:
    """A table under its title; nothing if the table is empty."""
    return f"<h2>{escape(title)}</h2>" + static(table) if len(table) else ""


def static(table: pd.DataFrame, caption: str = "") -> str:
    """A table of text as HTML."""
    head = "".join(f"<th scope='col'>{escape(str(c))}</th>" for c in table.columns)
    rows = "".join(
        "<tr>"
        + f"<th scope='row'>{escape(str(row[0]))}</th>"
        + "".join(f"<td>{escape(str(v))}</td>" for v in row[1:])
        + "</tr>"
        for row in table.to_numpy().tolist()
    )
    said = f"<p class='read'>{escape(caption)}</p>" if caption else ""
    return (
        f"{said}<div class='scroll whole' tabindex='0' role='region' aria-label='Table'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def document(title: str, body: Sequence[str], command: str) -> str:
    """The whole page."""
    swap = json.dumps([*zip(LIGHT, DARK, strict=True), (PAGE_LIGHT, PAGE_DARK)])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)} – fedtri</title><link rel="icon" href="data:,">
<style>{(HERE / "page.css").read_text()}</style></head>
<body><a class="skip" href="#figures">Skip to the figures</a><main>
{"".join(body).replace("<div class='figures'>", "<div class='figures' id='figures' tabindex='-1'>", 1)}
<footer><p>Made by <code>{escape(command)}</code>. The page needs no network; the numbers are in each run's
<code>rounds.jsonl</code> and <code>summary.json</code>.</p></footer></main>
<script type="application/json" id="colours">{swap}</script>
<script type="text/plain" id="plotly">{_unclosed(get_plotlyjs())}</script>
<script>{(HERE / "page.js").read_text()}</script></body></html>
"""


def _drawing(name: str, figure: go.Figure) -> str:
    data = _unclosed(figure.to_json(validate=False) or "")
    layout = figure.to_dict()["layout"]
    meta, title = layout["meta"], escape(layout["title"]["text"])
    return (
        f"<figure id='{name}' data-figure='{name}' aria-labelledby='title-{name}'><h2 id='title-{name}'>{title}</h2>"
        f"<p class='read'>{escape(meta['read'])}</p>"
        f"<div class='keys' role='group' aria-label='Series of: {title}'></div>"
        f"<div class='plot' role='img' aria-label='{escape(meta['alt'])}' style='height:{layout['height']}px'></div>"
        f"<details><summary>The numbers as a table<span hidden> of {title}</span></summary>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='Numbers of: {title}'></div></details>"
        f"<script type='application/json' id='data-{name}'>{data}</script></figure>"
    )


def _folders(runs: Sequence[Run]) -> pd.DataFrame:
    return pd.DataFrame({
        "folder": [str(run.folder) for run in runs],
        "method": [run.paper for run in runs],
        "seed": [str(run.seed) for run in runs],
        "rounds": [str(len(run.lines)) for run in runs],
        "state": ["finished" if run.finished else "not finished" for run in runs],
    })  # fmt: skip


def _unclosed(script: str) -> str:
    """The script or JSON, escaped so that nothing in it ends the HTML element around it."""
    return script.replace("</", "<\\/")


def _source(title: str, path: Path) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return f"<details><summary>{title}</summary><pre tabindex='0'>{escape(text)}</pre></details>"
