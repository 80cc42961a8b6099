"""The laws that every method must pass, for methods in the package and outside it; see CONTRIBUTING.md.

    import pytest
    from fedtri.testing import laws

    @pytest.mark.parametrize("law", laws, ids=str)
    def test_my_method_keeps(law, tmp_path):
        law.check(mine, tmp_path)

A law brings its own tiny model and data: it needs no network and takes a second or so.
"""

from fedtri.testing.laws import Law, laws

__all__ = ["Law", "laws"]
