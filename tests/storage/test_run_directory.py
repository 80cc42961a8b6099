"""A run directory belongs to one run at a time, overwrites nothing, and is not left behind by a failed start."""

import pytest

from fedtri.errors import FedtriError
from fedtri.storage import run_directory


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_without_out_the_next_free_number_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        with run_directory.created(None, "fedit") as folder:
            (folder / "config.toml").touch()
        assert str(folder) == f"runs/fedit-{number}"


def test_an_empty_folder_may_be_used(tmp_path):
    with run_directory.created(str(tmp_path), "fedit") as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("name", ["notes.txt", "config.toml"])
def test_a_folder_with_something_in_it_is_refused_and_left_as_it_was(tmp_path, name):
    (tmp_path / name).write_text("mine")
    said = "holds a run; continue it with" if name == "config.toml" else "is not empty"
    with pytest.raises(FedtriError, match=said), run_directory.created(str(tmp_path), "fedit"):
        pass
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FedtriError, match="out is a file, expected a folder"):
        run_directory.created(str(tmp_path / "out"), "fedit").__enter__()
    with pytest.raises(FedtriError, match="cannot be made: Not a directory"):
        run_directory.created(str(tmp_path / "out" / "x"), "fedit").__enter__()


def test_a_folder_in_use_is_refused(tmp_path):
    with run_directory.created(str(tmp_path / "out"), "fedit") as folder:
        with pytest.raises(FedtriError, match="is in use by a running run"), run_directory.locked(folder):
            pass
        with pytest.raises(FedtriError, match="is in use by a running run"):
            run_directory.created(str(folder), "fedit").__enter__()


def stopped(out, error: BaseException, *present: str) -> None:
    """A run that has written these files when the error comes."""
    with run_directory.created(str(out), "fedit") as folder:
        for name in present:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        raise error


def test_a_start_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="mistake"):
        stopped(tmp_path / "out", ValueError("mistake"), "config.toml", "clients/a")
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_after_a_checkpoint_stays(tmp_path):
    with pytest.raises(ValueError, match="late"):
        stopped(tmp_path / "out", ValueError("late"), "checkpoints/00001.json")
    assert names(tmp_path / "out") == [".lock", "checkpoints"]


def test_an_interrupted_run_says_how_to_go_on_and_an_interrupted_start_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="fedtri resume"):
        stopped(tmp_path / "run", KeyboardInterrupt(), "config.toml")
    assert (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "start", KeyboardInterrupt(), "clients/a")
    assert not (tmp_path / "start").exists()


def test_what_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(FedtriError, match=r"expected a config\.toml in it, which is not there"):
        run_directory.require(tmp_path)
    with pytest.raises(FedtriError, match="there is no such folder"):
        run_directory.require(tmp_path / "no")
    run_directory.begin(tmp_path, "", method={}, clients=[], labels=[], device="cpu", seed=0, threads=1)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(FedtriError, match="the run is not finished; continue it with"):
        run_directory.read_summary(tmp_path)
    with pytest.raises(FedtriError, match=r"labels.json: cannot be read"):
        run_directory.read_labels(tmp_path)


def test_a_line_cut_short_is_left_out(tmp_path):
    run_directory.write_rounds(tmp_path, [{"round": 1}, {"round": 2}])
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "lo')
    assert [line["round"] for line in run_directory.read_rounds(tmp_path)] == [1, 2]


def test_the_environment_names_versions_device_and_seed():
    found = run_directory.environment("cpu", 7, 1)
    assert found["versions"]["torch"]
    assert (found["device"], found["seed"], found["threads"]) == ("cpu", 7, 1)
