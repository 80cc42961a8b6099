"""One lab a session: its models and data are written once and only read."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tiny import Lab

# a thread that waits for another must not take the core that this one needs; read when PyTorch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
hypothesis.settings.register_profile("fedtri", deadline=None)  # a busy machine is no mistake of the code's
hypothesis.settings.load_profile("fedtri")

FIRST = ("network", "benchmarks", "experiments", "mistakes", "checkpoint")
"""Files whose single cases take longest: begun last, they would leave all cores but one idle at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, the others in their order."""
    places = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


# torch and transformers take seconds to import, which the process that only deals tests to workers need not spend


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> "Lab":
    """Tiny models and a data file in a folder of their own."""
    from tiny import Lab

    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of this size are slower on two threads, and another count of threads may round otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
