"""What the README says is so: its Python runs, its tables and its tree are complete."""

import re
from pathlib import Path

import fedtri
from fedtri import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(lab, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tiny = [
        f"model={lab.model()}", f"data={lab.data}", 'columns.text=sentence', "columns.label=topic", "clients=3",
        "rounds=2", "steps=1", "rank=2",
    ]  # fmt: skip
    monkeypatch.setattr(fedtri, "load_config", lambda **flags: config.load(None, tiny, **flags), raising=False)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["1", "2"]
    assert (tmp_path / lines[-1].rsplit(" ", 1)[1] / "client-00" / "adapter_config.json").is_file()


def test_every_key_and_its_default_stand_in_the_table():
    rows = "\n".join(line for line in README.splitlines() if line.startswith("| `"))
    tables = re.findall(r"`\[(\w+)\]`", README)
    assert set(config.Config.model_fields) - set(tables) == set(re.findall(r"`(\w+)`", rows)) & set(
        config.Config.model_fields
    )
    defaults = config.Config.model_validate({})
    for key, said in re.findall(r"^\| `(\w+)`\s*\| `?([^`|]+?)`? \|", rows, re.MULTILINE):
        if key not in ("head", "weights", "init_adapter", "out"):
            assert str(getattr(defaults, key)).lower() == said, key


def test_the_tree_names_every_file():
    for path in (ROOT / "src" / "fedtri").glob("[!_]*"):
        if path.is_dir():
            assert re.search(rf"^      {path.name}/ +\w", README, re.MULTILINE), path
        else:
            assert re.search(rf"\b{re.escape(path.name)}\b", README.partition("## The tree")[2]), path
