"""Which file a command takes."""

from pathlib import Path

import pytest

from fedtri.cli.shared import DEMO, file_or_demo


@pytest.mark.parametrize(
    ("config", "settings", "data", "expected"),
    [
        (None, [], None, DEMO),
        (None, ["rounds=2"], None, DEMO),
        (None, [], "own.csv", None),
        (None, ["data=own.csv"], None, None),
        (None, ["data_options.limit=3"], None, DEMO),
        (Path("own.toml"), ["data=own.csv"], "own.csv", Path("own.toml")),
    ],
)
def test_the_demos_sizes_do_not_reach_other_data(config, settings, data, expected):
    """Seen to fail with the demo's file wherever none is given: its limit cut a user's data to 1,100 examples."""
    assert file_or_demo(config, settings, data) == expected
