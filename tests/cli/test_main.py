"""How the command line ends, and which warnings of libraries it hides."""

import subprocess
import sys
import warnings

import pytest

from fedtri.cli import main, quiet

WITHOUT = "import sys; sys.modules[{!r}] = None; from fedtri.cli.main import main; main()"


def test_a_command_whose_extra_is_not_installed_says_which_in_one_line(tmp_path):
    """Seen to fail (a traceback) without the handler of ModuleNotFoundError."""
    asked = ["deploy", "check", str(tmp_path), "--federation", "f.toml", "--server", "host:1"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format("flwr"), *asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "fedtri: flwr is not installed, and this needs it; run: pip install 'fedtri[network]'\n"


def test_a_module_that_no_extra_brings_is_a_mistake_of_the_programs(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'fedtri.nothing'", name="fedtri.nothing")

    monkeypatch.setattr(main, "COMMANDS", (broken,))
    monkeypatch.setattr(sys, "argv", ["fedtri", "broken"])
    with pytest.raises(ModuleNotFoundError):
        main.main()


def said(category: type[Warning], text: str, module: str) -> list[str]:
    """What is shown of a warning that this module gives, once the known noise is silenced."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        quiet.known_noise()
        warnings.warn_explicit(text, category, "file.py", 1, module)
    return [str(one.message) for one in shown]


def test_only_the_noise_that_is_listed_is_hidden():
    """Seen to fail with `warnings.filterwarnings("ignore")`, which hid whatever a user should have read."""
    for noise in quiet.WARNINGS:
        module = noise.module.replace("\\", "")
        assert said(noise.category, f"{noise.begins} and more", module) == []
        assert said(noise.category, f"{noise.begins} and more", "fedtri.runs") != []
        assert said(noise.category, "your data holds NaN", module) != []
        assert said(UserWarning, f"{noise.begins} and more", module) != []
        assert noise.why
    for category in (UserWarning, RuntimeWarning, FutureWarning):
        assert said(category, "invalid value encountered in divide", "numpy") == ["invalid value encountered in divide"]
