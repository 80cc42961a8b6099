"""Nothing of a client's texts, labels, paths or errors reaches the server: planted strings are looked for."""

import logging
from pathlib import Path

from deploy.grid import Grid, Sites
from fedtri.deploy import coordinator, site

PLANTED = "planted7391"


def planted(path: Path, client: str) -> None:
    """A word in every text of this site, a label of its own in one row of client c's."""
    head, *rows = path.read_text().splitlines()
    rows = [f"{PLANTED}{client} {row}" for row in rows]
    if client == "c":
        rows[0] = rows[0].rpartition(",")[0] + f",{PLANTED}label"
    path.write_text("\n".join([head, *rows]) + "\n")


def test_no_planted_string_is_in_any_message_log_checkpoint_or_report(lab, tmp_path, monkeypatch):
    """c fails with its label in the error, a and b and d train."""
    monkeypatch.setattr(site, "LOG", logging.getLogger("a site's own log"))
    sites = Sites(tmp_path / PLANTED, lab)
    for client in ("a", "b", "c", "d"):
        planted(sites.folder / client / "data.csv", client)
    grid, out = Grid(sites), tmp_path / "out"
    path = sites.configure(method="ce_lora", out=str(out), network={"retries": 0, "minimum": 3}, evaluate=True)
    coordinator.lead(path, grid, {})
    said = (out / "rounds.jsonl").read_text()
    assert "c: failed while reading its data; the reason is in the site's own log" in said
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"rounds.jsonl", "run.log", "report.html", "summary.json", "config.toml"} <= {file.name for file in files}
    assert len(grid.sent) > 20
    for data in [*(file.read_bytes() for file in files), *grid.sent]:
        assert PLANTED.encode() not in data
