"""The page: whole in one file, small, quick, and its colours can be seen."""

import re
import subprocess
import sys

import pytest

from fedtri.report import figures, overview, page, reading, tables
from fedtri.report.colours import DARK, LIGHT, PAGE_DARK, PAGE_LIGHT, contrast
from report import synthetic


@pytest.mark.parametrize(("colours", "behind"), [(LIGHT, PAGE_LIGHT), (DARK, PAGE_DARK)])
def test_every_colour_stands_out(colours, behind):
    assert min(contrast(colour, behind) for colour in colours) >= 3


def test_contrast_of_black_on_white():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)


def test_no_address_of_another_machine(tmp_path):
    text = page.of_run(reading.load(synthetic.write(tmp_path / "run")))
    head, _, rest = text.partition("plotly.js v")
    own = head + rest[rest.rindex("</script>\n<script>") :]
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", own)
    assert "default-src 'none'" in head
    assert text.count("plotly.js v") == 1


def test_names_cannot_end_a_script(tmp_path):
    folder = synthetic.write(tmp_path / "run", data="</script><img src=x onerror=alert(1)>", clients=2, rounds=2)
    text = page.of_run(reading.load(folder))
    assert "<img src=x" not in text
    for name in figures.of_run(reading.load(folder)):
        data = re.search(rf"id='data-{name}'>(.*?)</script>", text, re.DOTALL)
        assert data
        assert data[1].endswith("}")


def test_every_figure_has_words(tmp_path):
    runs = [reading.load(synthetic.write(tmp_path / m, m)) for m in ("local", "flora_na", "ce_lora")]
    drawn = [figure for run in runs for figure in figures.of_run(run).values()]
    drawn += overview.of_groups(tables.grouped(runs)).values()
    for figure in drawn:
        meta = figure.to_dict()["layout"]["meta"]
        assert len(meta["alt"]) > 10
        assert len(meta["read"]) > 10
        assert "nan" not in meta["alt"]


def test_the_report_imports_no_torch(tmp_path):
    folder = synthetic.write(tmp_path / "run")
    code = f"import sys, fedtri; from fedtri.report import page; page.of_run(fedtri.load({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True, timeout=120)
