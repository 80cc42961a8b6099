"""A config says what it means: defaults, overrides, and one line for every mistake."""

from pathlib import Path

import pytest

from fedtri import config
from fedtri.config.strict import checked_options
from fedtri.errors import FedtriError


def written(tmp_path, text: str):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def complaint(*settings: str, path=None, **flags: object) -> str:
    with pytest.raises(FedtriError) as caught:
        config.load(path, settings, **flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


DEMO = Path(__file__).parents[2] / "experiments" / "demo.toml"


def test_a_methods_own_table_holds_for_it_alone():
    core, fedit = (config.load(DEMO, [f"method={name}"]) for name in ("gradient_core", "fedit"))
    assert (core.wire.up, core.targets != fedit.targets, fedit.wire.up) == ("int4", True, "float32")
    assert config.load(DEMO, ["wire.up=sign"]).wire.up == "sign"


def test_settings_override_flags_and_flags_override_the_file(tmp_path):
    path = written(tmp_path, "rounds = 1\nclients = 1\nseed = 1\n")
    found = config.load(path, ["seed=3"], clients=2, seed=2, method=None)
    assert (found.rounds, found.clients, found.seed, found.method) == (1, 2, 3, "ce_lora")


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ('targets=["a", "b"]', "targets", ["a", "b"]),
        ("partition=dirichlet:0.3", "partition", "dirichlet:0.3"),
        ("learning_rate=1", "learning_rate", 1),
        ("optimizer.schedule=cosine", "optimizer.schedule", "cosine"),
        (" data = a b ", "data", "a b"),
        ("evaluate=false", "evaluate", False),
        ('out="x=y"', "out", "x=y"),
        ("data=a=b", "data", "a=b"),
    ],
)
def test_a_setting_is_toml_or_else_text(setting, key, value):
    assert config.parse_setting(setting) == (key, value)


def test_a_whole_number_is_a_number_and_a_table_is_reached_by_a_dot():
    found = config.load(None, ["learning_rate=1", "optimizer.schedule=cosine", "optimizer.clip=false"])
    assert (found.learning_rate, found.optimizer.schedule, found.optimizer.clip) == (1.0, "cosine", False)


def test_what_is_written_down_is_complete_and_read_back_the_same(tmp_path):
    settings = ["partition=natural:site", "epochs=0.5", "method_options.temperature=0.1", "optimizer.clip=false"]
    found = config.load(None, settings)
    text = config.dumps(found)
    assert config.load(written(tmp_path, text)) == found
    assert "weight_decay" in text


def test_steps_on_the_command_line_replace_epochs_in_the_file_and_the_other_way_round(tmp_path):
    assert config.load(written(tmp_path, "epochs = 1"), ["steps=3"]).epochs is None
    found = config.load(written(tmp_path, "steps = 1"), ["epochs=3"])
    assert (found.steps, found.epochs) == (None, 3.0)


def test_a_natural_partition_has_as_many_clients_as_its_column_unless_told(tmp_path):
    assert config.load(None, ["partition=natural:site"]).clients is None
    assert config.load(written(tmp_path, "clients = 8"), ["partition=natural:site"]).clients is None
    assert config.load(written(tmp_path, 'clients = 3\npartition = "natural:site"')).clients == 3
    assert config.load(None, ["partition=natural:site"], clients=5).clients == 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("roudns=3", "--set roudns: unknown key; did you mean rounds?"),
        ("optimizer.schedul=cosine", "--set optimizer.schedul: unknown key; did you mean optimizer.schedule?"),
        ("schedule=cosine", "--set schedule: unknown key; did you mean optimizer.schedule?"),
        ("split.zzz=1", "--set split.zzz: unknown key; expected one of split.train, split.validation, split.test"),
        ("rounds", "--set rounds: expected key=value, such as rounds=3"),
        ("=3", "--set =3: expected key=value, such as rounds=3"),
        ("optimizer.=3", "--set optimizer.=3: expected key=value, such as rounds=3"),
        ("rounds=", "--set rounds: expected a whole number, got ''"),
        ("rounds=many", "--set rounds: expected a whole number, got 'many'"),
        ("rounds=2.5", "--set rounds: expected a whole number, got 2.5"),
        ("rounds=true", "--set rounds: expected a whole number, got true"),
        ("rounds=0", "--set rounds: expected at least 1, got 0"),
        ("fraction=2", "--set fraction: expected at most 1.0, got 2"),
        ("learning_rate=inf", "--set learning_rate: expected a finite number, got inf"),
        ("evaluate=1", "--set evaluate: expected true or false, got 1"),
        ("head=both", "--set head: expected 'default', 'personal' or 'shared', got 'both'"),
        ("optimizer=3", "--set optimizer: expected a table of keys, got 3"),
        ("optimizer.clip=true", "--set optimizer.clip: expected a number or false, got true"),
        ("optimizer.betas=[0.9, 7]", "--set optimizer.betas: expected a number below 1.0 in place 2, got 7"),
        ("optimizer.betas=0.9", "--set optimizer.betas: expected a list in [brackets], got 0.9"),
        ("columns.text=['a']", "--set columns.text: expected text, got ['a']"),
        ("columns.txt=a", "--set columns.txt: unknown key; did you mean columns.text?"),
        ("targets=[]", "--set targets: expected text or a list of at least 1, got []"),
    ],
)
def test_a_mistake_names_the_key_what_was_expected_and_what_was_found(setting, message):
    assert complaint(setting) == message


def test_a_mistake_names_the_file_or_the_option_it_stands_in(tmp_path):
    path = written(tmp_path, "roundss = 3")
    assert complaint(path=path) == f"{path}: roundss: unknown key; did you mean rounds?"
    assert complaint(clients=0) == "--clients: expected at least 1, got 0"


def test_a_value_is_not_a_table(tmp_path):
    path = written(tmp_path, "rounds = 3")
    assert complaint("rounds.x=1", path=path).startswith("--set rounds.x: rounds is a value, not a table")


def test_steps_and_epochs_exclude_each_other(tmp_path):
    path = written(tmp_path, "steps = 1\nepochs = 1")
    assert complaint(path=path).startswith(f"{path}: steps and epochs are both given")
    assert complaint("steps=1", "epochs=1").startswith("--set steps, --set epochs: both are given")


def test_the_split_must_be_whole():
    said = complaint("split.train=0.9")
    assert said.startswith("--set split.train: expected train + validation + test to be 1, got 0.9 + 0.1 + 0.2 = 1.2")


@pytest.mark.parametrize("text", [b"rounds = ", b"rounds = 1\n\xff", b"text,label\na,b\n"])
def test_a_file_that_is_not_toml(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    assert complaint(path=path).startswith(f"{path}: is not TOML: ")


def test_a_file_that_cannot_be_read(tmp_path):
    assert complaint(path=tmp_path / "no.toml").startswith(f"{tmp_path / 'no.toml'}: cannot be read: No such file")
    assert complaint(path=tmp_path).startswith(f"{tmp_path}: cannot be read: Is a directory")


def method(*, temperature: float | None = None, top_k: int = 1) -> None:
    """Stands for any method."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "hot"}, "options.temperature of mine: expected a number, got 'hot'"),
        ({"temperature": True}, "options.temperature of mine: expected a number, got true"),
        ({"top_k": 1.5}, "options.top_k of mine: expected a whole number, got 1.5"),
        ({"temp": 1}, "options.temp of mine: unknown key; did you mean temperature?"),
        ({"zzz": 1}, "options.zzz of mine: unknown key; expected one of temperature, top_k"),
    ],
)
def test_a_functions_options_are_checked_by_its_signature(given, message):
    with pytest.raises(FedtriError) as caught:
        checked_options(method, given, "options", "mine")
    assert str(caught.value) == message


def test_only_the_options_that_are_given_are_passed_on():
    assert checked_options(method, {"temperature": 1}, "options", "mine") == {"temperature": 1.0}


def test_a_function_without_options_says_so():
    with pytest.raises(FedtriError, match="unknown key; there are none; leave it out"):
        checked_options(lambda: None, {"a": 1}, "options", "mine")


def test_a_methods_own_table_holds_for_that_method_alone(tmp_path):
    """Nested tables are merged, what is asked for wins, and no table of methods is left. Seen to fail with the
    overlay laid over the settings."""
    path = tmp_path / "a.toml"
    path.write_text(
        "steps = 5\n[optimizer]\nwarmup = 1\n[methods.fed_sb]\nrank = 16\nepochs = 2.0\n"
        "[methods.fed_sb.optimizer.learning_rates]\nC = 0.02\n[methods.mine]\nrank = 2\n"
    )
    found = config.load(path, method="fed_sb")
    assert (found.rank, found.epochs, found.steps) == (16, 2.0, None)
    assert (found.optimizer.warmup, found.optimizer.learning_rates) == (1, {"C": 0.02})
    assert config.load(path, ["rank=3", "method=fed_sb"]).rank == 3
    assert (config.load(path).rank, config.load(path).steps) == (8, 5)
    assert config.load(path, method="x/y.py:mine").rank == 2
    assert config.load(path, ["methods.fedit.rank=4"], method="fedit").rank == 4
    assert config.load(path, method="fed_sb") == config.validated(found.model_dump(exclude_none=True))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[methods.fed_sb]\nrnak = 3", r"\[methods\.fed_sb\]: rnak: unknown key; did you mean rank\?$"),
        ("[methods.fed_sb]\nseed = 3", r"methods\.fed_sb\.seed: is the same for all methods; leave it out$"),
        ("[methods]\nfed_sb = 3", r"methods: expected a table for each method"),
    ],
)
def test_a_mistake_in_any_methods_table_is_one_line(line, said, tmp_path):
    """Though another method is run."""
    (tmp_path / "a.toml").write_text(line)
    with pytest.raises(FedtriError, match=said):
        config.load(tmp_path / "a.toml", method="fedit")
