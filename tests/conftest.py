"""One lab a session: its models and data are written once and only read."""

from collections.abc import Iterator

import pytest
import torch

from tiny import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """Tiny models and a data file in a folder of their own."""
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of this size are slower on two threads, and another count of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
