"""Figures as files: drawn by plotly's writer in a headless Chromium, or one line on what is missing."""

import plotly.io
import pytest

from fedtri.errors import FedtriError
from fedtri.report import figures, files, reading
from report import synthetic


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """An ordinary figure and a square one, by name."""
    found = figures.of_run(reading.load(synthetic.write(tmp_path_factory.mktemp("run"), "ce_lora", rounds=3)))
    return {name: found[name] for name in ("accuracy", "weights-matrix")}


def test_figures_as_files(tmp_path, drawn):
    """Seen to fail with the clients' hidden series drawn, whose names are then in the SVG."""
    pytest.importorskip("kaleido", reason="kaleido is not installed: pip install 'fedtri[figures]'")
    try:
        paths = files.write(drawn, tmp_path / "figures", "svg")
    except FedtriError as error:
        pytest.skip(f"no browser found: {error}")
    assert [path.name for path in paths] == [f"{name}.svg" for name in drawn]
    for path in paths:
        assert path.read_bytes().startswith(b"<svg")
        assert path.stat().st_size > 3000
    text = paths[0].read_text()
    assert "mean after local training" in text
    assert "client-00" not in text
    assert 'width="540"' in paths[1].read_text()


def test_plotlys_writer_is_asked_for_the_kind_of_file_by_its_name(tmp_path, drawn, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "find_spec", lambda name: plotly.io)
    monkeypatch.setattr(files, "write_images", lambda *args, **kwargs: asked.append((args, kwargs)))
    paths = files.write(drawn, tmp_path / "figures", "png")
    assert [path.name for path in paths] == [f"{name}.png" for name in drawn]
    assert all(str(path) in repr(asked) for path in paths)


def test_what_is_missing_is_one_line(tmp_path, drawn, monkeypatch):
    with pytest.raises(FedtriError, match="expected one of svg, png, got 'gif'"):
        files.write(drawn, tmp_path, "gif")
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(FedtriError, match=r"pip install 'fedtri\[figures\]'"):
        files.write(drawn, tmp_path)

    def without_browser(*args, **kwargs):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(files, "find_spec", lambda name: plotly.io)
    monkeypatch.setattr(files, "write_images", without_browser)
    with pytest.raises(FedtriError, match="apt-get install chromium"):
        files.write(drawn, tmp_path)
