"""Laws of the mixing weights, and numbers small enough for a hand."""

import math

import pytest
import torch

from fedtri.errors import FedtriError
from fedtri.similarity.mixing import row_stochastic


def test_one_client_keeps_to_itself():
    torch.testing.assert_close(row_stochastic(torch.full((1, 1), 2.0), top_k=5), torch.ones(1, 1))


def test_rows_sum_to_one_by_hand():
    s = torch.tensor([[2.0, 1, 1], [0, 2, 1], [1, 1, 2]])
    torch.testing.assert_close(row_stochastic(s)[0], torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(row_stochastic(s, top_k=2)[1], torch.tensor([0, 2 / 3, 1 / 3]))
    warm = torch.tensor([math.e**2, 1, 1]) / (math.e**2 + 2)
    torch.testing.assert_close(row_stochastic(s, temperature=0.5)[0], warm)


@pytest.mark.parametrize("temperature", [None, 0.01, 10.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 9999])
def test_weights_are_a_distribution_over_the_most_similar(temperature, top_k):
    """More clients than one block of rows; seen to fail with diagonal(0) in every block: some lose themselves."""
    m = 600
    s = torch.rand(m, m, generator=torch.Generator().manual_seed(0)) + 0.1
    w = row_stochastic(s, temperature=temperature, top_k=top_k)
    torch.testing.assert_close(w.sum(1), torch.ones(m))
    assert (w >= 0).all()
    if top_k in (1, 7):
        order = s.clone().fill_diagonal_(torch.inf)
        outside = order < order.topk(top_k).values[:, -1:]
        assert (w[outside] == 0).all()
    if top_k == 1:
        torch.testing.assert_close(w, torch.eye(m))


def test_weights_in_place_are_the_same_and_else_nothing_is_touched():
    s = torch.rand(9, 9)
    before = s.clone()
    w = row_stochastic(s, top_k=4)
    torch.testing.assert_close(s, before)
    assert row_stochastic(s, top_k=4, out=s) is s
    torch.testing.assert_close(s, w)


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"temperature": math.nan}, {"top_k": 0}])
def test_options_out_of_range_are_named(option):
    with pytest.raises(FedtriError, match=next(iter(option))):
        row_stochastic(torch.ones(2, 2), **option)
