import pytest
from fedtri.methods import METHODS
from fedtri.testing import laws
@pytest.mark.parametrize("law", laws, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_law(name, law, tmp_path):
    law.check(METHODS[name], tmp_path)
